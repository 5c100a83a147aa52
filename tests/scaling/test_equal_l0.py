"""Known differences at equal N and L0 come back, with intervals that hold them, and an order."""

from itertools import combinations

import numpy as np
import pytest

from saescale.scaling.comparison.compare import Comparison, compare
from saescale.scaling.comparison.sentences import outcome
from saescale.scaling.tables import Table
from tests.scaling.known_arms import KS, SIZES, Known, Rows, known_arms, law


def compared(rows: Rows) -> Comparison:
    (found,) = compare(Table.from_rows(rows))
    return found


@pytest.mark.parametrize("seeds", [(0, 1), (0,)])
def test_intervals_of_differences_hold_the_truth(seeds: tuple[int, ...]) -> None:
    """In 24 sweeps of which two architectures have another L0 than k: compared where L0 is k."""
    arms = {"topk": Known(), "gated": Known(1.0, l0=0.96), "relu": Known(1.02, l0=1.07)}
    truth = {"topk": 0.0, "gated": 0.0, "relu": np.log(1.02)}
    held = of_all = at_one = points = 0
    for seed in range(24):
        found = compared(known_arms(arms, seeds=seeds, seed=seed, noise=0.006))
        for (first, second), (difference, shared) in found.order.pairs.items():
            assert shared >= len(SIZES) * (len(KS) - 1)
            assert difference.low is not None
            assert difference.high is not None
            held += difference.low <= truth[first] - truth[second] <= difference.high
            of_all += 1
        for entry in found.leaders():
            own = found.places.by_point[entry["n_latents"], entry["k"]]
            if {"topk", "relu"} <= own.keys():
                one = found.places.difference(own["topk"], own["relu"])
                assert one.low is not None
                assert one.high is not None
                at_one += one.low <= -truth["relu"] <= one.high
                points += 1
    assert 0.89 <= held / of_all <= 1.0
    assert 0.91 <= at_one / points <= 0.99


def test_the_order_says_which_are_not_told_apart() -> None:
    arms = {"relu": Known(1.2), "prolu": Known(1.1), "gated": Known(1.0), "topk": Known(1.0)}
    words = {compared(known_arms(arms, seed=seed)).order.words for seed in range(8)}
    assert words <= {"topk ~ gated < prolu < relu", "gated ~ topk < prolu < relu",
                     "topk < gated < prolu < relu", "gated < topk < prolu < relu"}  # fmt: skip
    # At 95 % now and then two that are equal are told apart.
    assert any("~" in text for text in words)


def test_neighbours_whose_own_cells_say_the_contrary_are_not_called_equal() -> None:
    """Where two share one point of twelve, the others may order them otherwise."""
    rows = known_arms({"topk": Known(), "gated": Known(1.3), "relu": Known(2.0)}, noise=0.001)
    shared = [row for row in rows if (row["n_latents"], row["k"]) == (512, 8)]
    rows = [row for row in rows if row["architecture"] != "topk" or row in shared or row["k"] == 32]
    rows = [row for row in rows if row["architecture"] != "gated" or row in shared or row["k"] == 16]
    for row in shared:
        row["nmse"] *= 0.5 if row["architecture"] == "gated" else 1.0
    found = compared(rows)
    assert found.order.words == "topk > gated < relu"
    (said,) = [text for text in outcome(found) if text.startswith("In order")]
    assert "(> where those N and L0 that both have say the contrary of all others): topk > gated < relu." in said


def test_an_architecture_that_lacks_the_hard_cells_is_not_ahead_for_it() -> None:
    rows = known_arms({"topk": Known(), "switch": Known(1.1)}, noise=0.0)
    rows = [r for r in rows if r["architecture"] == "topk" or (r["k"] == 32 and r["n_latents"] == 4096)]
    order = compared(rows).order
    assert order.architectures == ("topk", "switch")
    ((difference, points),) = order.pairs.values()
    assert (points, difference.value) == (1, pytest.approx(-np.log(1.1)))


def test_nmse_is_read_where_l0_is_k() -> None:
    """Against the law itself at L0 = k, for cells whose L0 is 7 % higher: a straight line in logarithms is close."""
    found = compared(known_arms({"topk": Known(), "relu": Known(1.0, l0=1.07)}, noise=0.0, ks=(8, 12, 16, 24)))
    for n in SIZES:
        for k in (12, 16, 24):
            assert found.places.nmse(found.places.by_point[n, k]["relu"]).value == pytest.approx(law(n, k), rel=2e-3)


def test_what_is_too_far_off_k_is_left_out_and_named() -> None:
    rows = known_arms(
        {"topk": Known(), "prolu": Known(1.0, l0=0.7), "relu": Known(l0=0.96)}, sizes=(512, 1024), ks=(16,)
    )
    found = compared(rows)
    assert found.places.left_out == (
        "prolu at N = 512, k = 16: its L0 is 11.2",
        "prolu at N = 1024, k = 16: its L0 is 11.2",
    )
    assert set(found.places.by_point[512, 16]) == {"topk", "relu"}  # one cell within 5 % stands for its k


def test_who_does_not_beat_a_baseline_is_named() -> None:
    arms = {
        "topk": Known(),
        "switch": Known(1.5),
        "jumprelu": Known(1.4),
        "pca": Known(1.4),
        "frozen_encoder": Known(1.6),
    }
    found = compared(known_arms(arms, ks=(16,)))
    by_name = {(u.architecture, u.baseline) for u in found.unbeaten}
    assert by_name == {("switch", "pca"), ("jumprelu", "pca")}
    assert sum(u.architecture == "switch" for u in found.unbeaten) == len(SIZES)


def test_intervals_hold_what_a_cell_at_another_l0_may_be_off_by() -> None:
    """With one k nothing can be interpolated: cells that are 3 % off stand for it, and lie 1 % higher or lower."""
    truth = {"topk": Known(), "jumprelu": Known(1.01, l0=1.03), "relu": Known(1.03, l0=0.97), "gated": Known(l0=0.97)}
    held = sides = 0
    for seed in range(20):
        places = compared(known_arms(truth, ks=(16,), noise=0.002, seed=seed)).places
        for own in places.by_point.values():
            for first, second in combinations(own, 2):
                found = places.difference(own[first], own[second])
                assert found.low is not None
                assert found.high is not None
                held += found.low <= np.log(truth[first].worse / truth[second].worse) <= found.high
                sides += 1
        # What is off by the same is compared as it is.
        for own in places.by_point.values():
            found = places.difference(own["gated"], own["relu"])
            assert found.low is not None
            assert found.high is not None
            assert found.high - found.low < 0.02
    assert held / sides > 0.95
