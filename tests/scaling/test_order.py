"""One order of architectures everywhere."""

from saescale.scaling.order import BASELINES, KNOWN, in_order
from saescale.trainers.architectures.architecture import ARCHITECTURES


def test_every_architecture_of_saescale_has_its_place() -> None:
    assert set(KNOWN) == set(ARCHITECTURES.names())
    assert set(BASELINES) < set(KNOWN)


def test_a_user_s_stand_between_the_others_and_the_baselines() -> None:
    assert in_order(["pca", "zeta", "relu", "topk", "alpha", "relu"]) == ("topk", "relu", "alpha", "zeta", "pca")
