"""Known ratios of compute come back, with intervals that hold them, and what is never reached is not made up."""

import numpy as np
import pytest

from saescale.scaling.comparison.compare import Comparison, compare
from saescale.scaling.tables import Table
from tests.scaling.known_arms import KS, Known, Rows, known_arms, known_curves


def compared(rows: Rows, curves: bool = True) -> Comparison:
    (found,) = compare(Table.from_rows(rows), Table.from_rows(known_curves(rows)) if curves else None)
    return found


def test_without_noise_the_ratio_is_exact() -> None:
    arms = {"topk": Known(), "gated": Known(1.0, 1.6), "switch": Known(1.0, 0.3)}
    found = compared(known_arms(arms, noise=0.0))
    assert {(r.architecture, r.k) for r in found.ratios} == {(name, k) for name in ("gated", "switch") for k in KS}
    for ratios in found.ratios:
        truth = arms[ratios.architecture].cost
        assert ratios.median is not None
        assert ratios.median.value == pytest.approx(truth, rel=0.02)
        assert [level.reached for level in ratios.levels] == ["both"] * 5
        for level in ratios.levels:
            assert level.ratio is not None
            assert level.ratio.value == pytest.approx(truth, rel=0.03)


def test_intervals_of_ratios_hold_the_truth() -> None:
    held = bounded = 0
    for seed in range(30):
        found = compared(known_arms({"topk": Known(), "gated": Known(1.0, 1.6)}, seed=seed, noise=0.006))
        for ratios in found.ratios:
            assert ratios.median is not None
            low, high = ratios.median.low, ratios.median.high
            held += (low is None or low <= 1.6) and (high is None or high >= 1.6)
            bounded += low is not None and high is not None
    assert 0.90 <= held / 90 <= 1.0
    assert bounded > 84  # no interval holds the truth by being endless


def test_what_never_gets_there_has_no_ratio() -> None:
    found = compared(known_arms({"topk": Known(), "pca": Known(3.0), "relu": Known(1.1)}))
    of = {r.architecture: r for r in found.ratios if r.k == 16}
    assert of["pca"].median is None
    assert {level.reached for level in of["pca"].levels} == {"never"}
    reached = [level.reached for level in of["relu"].levels]
    assert reached[0] == "both"
    assert reached[-1] == "never"
    # The other way, levels of the worse one are reached before the better one's curves begin, or soon.
    (other,) = compare(Table.from_rows(rows := known_arms({"alpha": Known(4.0), "beta": Known()}, ks=(16,))),
                       Table.from_rows(known_curves(rows)))  # fmt: skip
    assert other.reference == "beta"


def test_what_may_never_get_there_is_open_above() -> None:
    """An architecture that just reaches a level reaches it in some draws only: then no ratio is too large."""
    open_above = 0
    for seed in range(5):
        found = compared(known_arms({"topk": Known(), "gated": Known(1.03)}, noise=0.02, seed=seed))
        for level in (level for ratios in found.ratios for level in ratios.levels if level.ratio is not None):
            low, high = level.ratio.low, level.ratio.high
            assert low is None or low <= level.ratio.value
            assert high is None or high >= level.ratio.value
            open_above += low is not None and high is None
    assert open_above > 2


def test_a_cell_that_misses_its_k_has_no_part() -> None:
    found = compared(known_arms({"topk": Known(), "prolu": Known(0.5, l0=0.8)}))
    assert [list(own) for own in found.envelopes.values()] == [["topk"]] * len(KS)
    assert found.ratios == ()


def test_without_curves_the_ends_of_cells_are_the_envelope() -> None:
    rows = known_arms({"topk": Known(), "gated": Known(1.0, 2.0)}, noise=0.0)
    found = compared(rows, curves=False)
    flops, nmse = found.envelopes[16.0]["topk"].line
    ends = {r["flops"]: r["nmse"] for r in rows if r["architecture"] == "topk" and r["k"] == 16 and not r["seed"]}
    for c, value in ends.items():
        assert nmse[np.argmin(np.abs(np.log(flops / (1.02 * c))))] == pytest.approx(value)
    assert (np.diff(nmse) <= 0).all()


def test_more_seeds_do_not_look_better() -> None:
    """Seeds are averaged before the lowest N is taken: with eight of them noise gains nothing."""
    arms = {"topk": Known(), "gated": Known()}
    found = []
    for seed in range(20):
        rows = known_arms(arms, seeds=range(8), ks=(16,), seed=seed, noise=0.03)
        rows = [r for r in rows if r["architecture"] == "gated" or r["seed"] < 2]
        (ratios,) = compared(rows).ratios
        assert ratios.median is not None
        found.append(np.log(ratios.median.value))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) + 0.02
