"""What reaches a value of a metric: the smallest N by a law that is known, solved here by bisection."""

import numpy as np
import pytest
from scipy.optimize import brentq

from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.laws.scales import scale_of
from saescale.scaling.metrics import Metric
from saescale.scaling.planning.reach import smallest, target_of, target_words
from saescale.storage.errors import SaescaleError
from tests.scaling.test_over_metrics import distance, laws_of, write_run


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetricLaws, ...]:
    run = write_run(tmp_path_factory.mktemp("run"), noise=0.004)
    return laws_of(run, [f"sim.{name}" for name in ("falling", "to_one")], 100)


def test_the_smallest_n_is_that_of_the_law(laws: tuple[MetricLaws, ...]) -> None:
    for k, wanted in ((16, 0.15), (64, 0.10)):
        truth = brentq(lambda n: distance(n, k) - wanted, 64, 2**24)  # noqa: B023
        for own in laws:
            (found,) = smallest(own, wanted, [k], 512, 2**20)
            assert found.n_latents is not None
            assert found.sure is not None
            assert found.low is not None
            assert found.high is not None
            assert found.n_latents == pytest.approx(truth, rel=0.12)
            assert found.sure > found.n_latents
            assert own.scale.distance(np.array(found.value)) == pytest.approx(wanted, rel=0.02)
            assert found.low < found.value < found.high
            assert found.beyond == pytest.approx(max(found.n_latents / 16384, 1))


def test_no_n_is_smaller_than_k_or_what_was_asked_for(laws: tuple[MetricLaws, ...]) -> None:
    (easy,) = smallest(laws[0], 5.0, [64], 8, 2**20)
    assert easy.n_latents == 64
    (bounded,) = smallest(laws[0], 5.0, [8], 512, 2**20)
    assert bounded.n_latents == 512
    none, there = smallest(laws[0], 0.1, [8, 64], 512, 2**20)
    assert none.n_latents is None
    assert there.n_latents is not None


def test_what_no_n_reaches_is_one_line(laws: tuple[MetricLaws, ...]) -> None:
    with pytest.raises(
        SaescaleError, match=r"no N up to 16384 reaches sim\.to_one at least 0\.99 at k = 8, 16: the law"
    ):
        smallest(laws[1], 0.01, [8, 16], 512, 16384)
    without = laws[0].__class__(**{**laws[0].__dict__, "fits": ()})
    with pytest.raises(SaescaleError, match=r"no law of sim\.falling in N and k to plan from"):
        smallest(without, 0.1, [8], 512, 1024)


@pytest.mark.parametrize(
    ("metric", "within", "reach", "distance", "words"),
    [
        (Metric("higher", limit=1.0), 0.01, None, 0.01, "a.m at least 0.99"),
        (Metric("lower", limit="original"), 0.01, None, 0.04, "a.m at most 4.04"),
        (Metric("higher", bounded=True), 0.2, None, 0.25, "a.m at least 0.8"),
        (Metric("lower", bounded=True), 0.2, None, 0.25, "a.m at most 0.2"),
        (Metric("lower"), None, 0.3, 0.3, "a.m at most 0.3"),
        (Metric("higher"), None, 4.0, 0.25, "a.m at least 4"),
    ],
)
def test_targets(metric: Metric, within: float | None, reach: float | None, distance: float, words: str) -> None:
    scale = scale_of("a.m", metric, 4.0)
    found = target_of(scale, within, reach)
    assert found == pytest.approx(distance)
    assert target_words(scale, found) == words


@pytest.mark.parametrize(
    ("metric", "within", "reach", "message"),
    [
        (Metric("lower"), 0.01, None, "--within: a.m has no value that 1 % of it could be meant of"),
        (Metric("higher"), 0.01, None, "give --reach"),
        (Metric("lower"), None, None, "--metric takes what to reach"),
        (Metric("lower"), None, -0.1, "--reach -0.1: a.m cannot be that"),
        (Metric("higher", limit=1.0), None, 1.0, "--reach 1: a.m cannot be that, or only where nothing is lost at all"),
        (Metric("higher", bounded=True), None, 1.5, "cannot be that"),
    ],
)
def test_targets_without_meaning(metric: Metric, within: float | None, reach: float | None, message: str) -> None:
    with pytest.raises(SaescaleError) as raised:
        target_of(scale_of("a.m", metric), within, reach)
    assert message in str(raised.value)
