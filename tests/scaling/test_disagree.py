"""Where nmse and a metric disagree: found again where it was planted, against a count of all pairs by hand."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from saescale.scaling.comparison.disagree import Disagreement, find_disagreements
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.laws.scales import scale_of
from saescale.scaling.metrics import Metric, Values
from saescale.scaling.report.metrics import metric_sentences
from saescale.scaling.tables import Table

# Each pair of lines has equal compute; the last two are those that nmse and the metric order otherwise.
CELLS = [
    (512, 8, 1.0e12, 0.40, 0.80), (256, 16, 1.1e12, 0.45, 0.90),
    (1024, 8, 2.0e12, 0.30, 0.60), (512, 16, 2.2e12, 0.35, 0.70),
    (2048, 8, 4.0e12, 0.25, 0.58), (1024, 16, 4.4e12, 0.20, 0.65),
]  # fmt: skip
FALLS = Metric("lower")


def laws_of(
    cells: Sequence[tuple[float, ...]], of: dict[str, Any] | None = None, metric: Metric = FALLS, within: float = np.nan
) -> MetricLaws:
    """`within`: how far the 95 % intervals of the cells reach, as a share of their values."""
    names = ("n_latents", "k", "flops", "own", "value")
    rows = [dict(zip(names, map(float, cell), strict=True)) | {"cell_id": str(i)} for i, cell in enumerate(cells)]
    table = Table.from_rows([{**row, **(of or {}), "nmse": row["own"]} for row in rows])
    scale = scale_of("a.m", metric)
    value, nmse = table["value"], table["nmse"]
    table = replace(table, columns=table.columns | {"nmse": scale.distance(value)})
    reach = np.abs(value) * within
    return MetricLaws("a.m", metric, scale, table, Values(value, value - reach, value + reach), nmse, of=of or {})


def found_in(*laws: MetricLaws) -> Disagreement:
    (found,) = find_disagreements(laws, 0.005)
    return found


def test_a_planted_disagreement_is_found() -> None:
    found = found_in(laws_of(CELLS))
    compute, l0 = found.ranked
    assert (compute.equal, compute.pairs, compute.alike) == ("compute", 3, 2)
    assert compute.correlation == pytest.approx(1 / 3)
    (pair,) = compute.contradictions
    assert (pair.by_nmse.row, pair.by_metric.row) == (5, 4)
    assert [(a.row, b.row) for _, a, b in compute.best] == [(0, 0), (2, 2), (5, 4)]
    assert [at for at, _, _ in compute.other_best] == [4.4e12]
    # At equal L0 both say that a larger N is better.
    by_hand = [
        (a, b) for a, b in combinations(CELLS, 2) if a[1] == b[1]
    ]  # fmt: skip
    alike = sum((a[3] < b[3]) == (a[4] < b[4]) for a, b in by_hand)
    assert (l0.pairs, l0.alike) == (len(by_hand), alike) == (6, 6)
    said = metric_sentences([found])
    assert said[0] == (
        "At equal compute nmse and a.m order 2 of 3 pairs of cells alike (compute within a factor of 1.25; rank "
        "correlation 0.33). They disagree on one pair by more than cells scatter: nmse prefers N\u00a0=\u00a01024, "
        "k\u00a0=\u00a016 (nmse 0.2, m 0.65) to N\u00a0=\u00a02048, k\u00a0=\u00a08 (nmse 0.25, m 0.58). The best cell "
        "is another: up to compute\u00a0=\u00a04.4 × 10¹² N\u00a0=\u00a01024, k\u00a0=\u00a016 by nmse and "
        "N\u00a0=\u00a02048, k\u00a0=\u00a08 by a.m."
    )
    assert said[1].endswith("rank correlation 1.00), and disagree on none by more than cells scatter.")
    document = found.document()
    assert document["equal"][0]["contradictions"][0]["by_metric"] == {
        "cell_id": "4", "n_latents": 2048.0, "k": 8.0, "nmse": 0.25, "value": 0.58,
    }  # fmt: skip


def test_what_is_within_the_scatter_of_cells_is_no_disagreement() -> None:
    near = [*CELLS[:4], (2048, 8, 4.0e12, 0.2002, 0.58), CELLS[5]]
    compute = found_in(laws_of(near)).ranked[0]
    assert (compute.pairs, compute.alike, compute.contradictions, compute.other_best) == (3, 2, (), ())
    assert metric_sentences([found_in(laws_of(near))]) == [
        "nmse and a.m agree about the best (N, k): they order 2 of 3 pairs of cells of equal compute (within a factor "
        "of 1.25; rank correlation 0.33) and 6 of 6 pairs of cells of equal L0 (within a factor of 1.1; rank "
        "correlation 1.00) alike, and the others differ by less than cells scatter."
    ]


def test_what_the_cells_own_intervals_allow_for_is_no_disagreement() -> None:
    """Those of 0.58 and 0.65 reach towards each other by hypot(0.58, 0.65) = 0.87 of what each reaches by."""
    narrow, wide = (found_in(laws_of(CELLS, within=within)).ranked[0] for within in (0.078, 0.083))
    assert 0.078 * 0.8711 < 0.65 - 0.58 < 0.083 * 0.8711
    assert (len(narrow.contradictions), narrow.untold) == (1, 0)
    assert (wide.contradictions, wide.untold, wide.other_best) == ((), 1, ())
    assert (wide.pairs, wide.alike, wide.best) == (narrow.pairs, narrow.alike, narrow.best)
    found = found_in(laws_of(CELLS, within=0.083))
    assert metric_sentences([found]) == [
        "nmse and a.m agree about the best (N, k): they order 2 of 3 pairs of cells of equal compute (within a factor "
        "of 1.25; rank correlation 0.33) and 6 of 6 pairs of cells of equal L0 (within a factor of 1.1; rank "
        "correlation 1.00) alike, and the others differ by less than cells scatter, or than their own intervals allow "
        "for."
    ]
    assert [entry["untold"] for entry in found.document()["equal"]] == [1, 0]
    # Beside one that is told.
    more = [*CELLS, (4096, 8, 8.0e12, 0.20, 0.30), (2048, 16, 8.8e12, 0.15, 0.60)]
    said = metric_sentences([found_in(laws_of(more, within=0.083))])[0]
    assert (
        "They disagree on one pair by more than cells scatter: nmse prefers N\u00a0=\u00a02048, k\u00a0=\u00a016"
        in said
    )
    assert said.endswith("The intervals of single cells allow for one more.")


@pytest.mark.parametrize("seed", range(2))
def test_cells_that_are_alike_are_seldom_told_apart_by_what_few_samples_say(seed: int) -> None:
    """200 pairs of equal truth in the metric, each cell measured on samples of its own that scatter by 5 %."""
    rng = np.random.default_rng(seed)
    cells: list[tuple[float, ...]] = []
    for pair in range(200):
        measured = 0.5 * (1 + 0.05 * rng.standard_normal(2))
        cells += [(2.0 * pair + i, 8.0 * (1 + i), 10.0 ** (6 + 0.2 * pair), 0.4 - 0.1 * i, measured[i]) for i in (0, 1)]
    compute = found_in(laws_of(cells, within=1.96 * 0.05)).ranked[0]
    assert compute.pairs == 200
    # By scatter alone some 70 of the 100 that come out the other way round; a half of 5 % of all is five.
    assert len(compute.contradictions) + compute.untold > 50
    assert len(compute.contradictions) <= 12


def test_a_metric_that_rises_is_ranked_the_other_way_round() -> None:
    rising = [(*cell[:4], 1 - cell[4]) for cell in CELLS]
    found = found_in(laws_of(rising, metric=Metric("higher", limit=1.0)))
    assert found.ranked[0].contradictions[0].by_metric.row == 4
    assert found.ranked[0].contradictions[0].by_metric.value == pytest.approx(0.42)


def test_architectures_of_one_source_are_compared_and_sources_are_not() -> None:
    first = laws_of(CELLS[:1], {"architecture": "topk", "site": "resid_post.1"})
    other = laws_of([(512, 8, 1.0e12, 0.35, 0.90)], {"architecture": "gated", "site": "resid_post.1"})
    elsewhere = laws_of([(512, 8, 1.0e12, 0.35, 0.90)], {"architecture": "gated", "site": "resid_post.2"})
    found = found_in(first, other, elsewhere)
    assert found.of == {"site": "resid_post.1"}
    assert [r.equal for r in found.ranked] == ["compute", "L0"]
    said = metric_sentences([found])[1]
    assert "(resid_post.1)" in said or "(at resid_post.1)" in said
    assert "nmse prefers gated, N\u00a0=\u00a0512, k\u00a0=\u00a08 (nmse 0.35, m 0.9) to topk, N" in said


@pytest.mark.parametrize("seed", range(3))
def test_pairs_and_rank_correlation_are_those_of_a_count_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = [
        (2.0**i, 8 * 2.0**j, 10 ** rng.uniform(12, 13), *rng.uniform(0.1, 0.9, 2)) for i in range(5) for j in (0, 1)
    ]
    pairs = [(a, b) for a, b in combinations(cells, 2) if max(a[2], b[2]) <= 1.25 * min(a[2], b[2])]
    signs = [np.sign((a[3] - b[3]) * (a[4] - b[4])) for a, b in pairs]
    ranked = found_in(laws_of(cells)).ranked[0]
    assert ranked.pairs == len(pairs)
    assert ranked.correlation == pytest.approx(np.mean(signs))


def test_one_cell_is_no_comparison() -> None:
    assert find_disagreements([laws_of(CELLS[:1])]) == []
