"""Where nmse and a metric disagree about which cells are better: among cells of equal compute, and of equal L0.

Cells of a larger N and k are better by any measure, and cost more. So only such pairs of cells are compared as a user
would choose between: those that took about the same training compute, and those that have about the same L0.

They disagree about a pair where both differences are larger than cells scatter about their laws, and that of the metric
is also larger than the cells' own intervals allow for (those of an evaluation, over its documents or prompts). nmse has
none: it is of one large set of rows that all cells share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from saescale.scaling.comparison.scatter import above, with_ends
from saescale.scaling.kinds import Kind
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.laws.scales import Scale
from saescale.scaling.tables import Table

Equal = Literal["compute", "L0"]
WITHIN: Mapping[Equal, float] = {"compute": 1.25, "L0": 1.1}  # factors up to which two cells count as equal
_SCATTER = 0.01  # of ln nmse, and of ln distance, where no law says how cells scatter
_MOST = 2_000  # cells whose pairs are compared; of more as many, evenly taken
_LISTED = 50  # contradictions of fits.json, the clearest first
_ENDS = ("value", "value_low", "value_high")  # of the metric of each cell
_SURE = 2.0 * np.sqrt(2.0)  # standard deviations of the difference of two cells that scatter


class Cell(NamedTuple):
    """A cell in a comparison, by its row in `Disagreement.cells`, with both measures."""

    row: int
    nmse: float
    value: float


class Contradiction(NamedTuple):
    """Two cells of which nmse prefers one and the metric the other, both by more than cells scatter, and the metric by
    more than the cells' own intervals allow for."""

    by_nmse: Cell
    by_metric: Cell


class Ranked(NamedTuple):
    """Pairs of cells that are equal in compute or L0. `alike` of the `pairs` are ordered alike by both; the
    `correlation` is Kendall's tau over them. `best`: of each group of equal cells those that either measure puts
    first, the group's largest compute or L0 before them. `untold`: pairs that would be contradictions if it were not
    for the intervals of the metric."""

    equal: Equal
    pairs: int
    alike: int
    contradictions: tuple[Contradiction, ...]
    untold: int
    best: tuple[tuple[float, Cell, Cell], ...]

    @property
    def correlation(self) -> float:
        return 2 * self.alike / self.pairs - 1

    @property
    def other_best(self) -> tuple[tuple[float, Cell, Cell], ...]:
        """The groups whose best cells differ and are told apart."""
        sure = {(found.by_nmse.row, found.by_metric.row) for found in self.contradictions}
        return tuple(group for group in self.best if (group[1].row, group[2].row) in sure)


class Disagreement(NamedTuple):
    """Of one metric on the cells of one source, of all architectures; the column `distance` of `cells` is that of the
    metric on its scale."""

    name: str
    scale: Scale
    of: Kind
    cells: Table
    ranked: tuple[Ranked, ...]

    def document(self) -> dict[str, Any]:
        """An entry of `disagreements` of fits.json."""
        return {
            "metric": self.name, "of": dict(self.of),
            "equal": [
                {
                    "in": r.equal, "within": WITHIN[r.equal], "pairs": r.pairs, "alike": r.alike,
                    "rank_correlation": r.correlation,
                    "contradicting": len(r.contradictions), "untold": r.untold,
                    "contradictions": [{"by_nmse": self._cell(c.by_nmse), "by_metric": self._cell(c.by_metric)}
                                       for c in r.contradictions[:_LISTED]],
                    "best": [{"at": at, "by_nmse": self._cell(a), "by_metric": self._cell(b)} for at, a, b in r.best],
                } for r in self.ranked
            ],
        }  # fmt: skip

    def _cell(self, cell: Cell) -> dict[str, Any]:
        names = [name for name in ("cell_id", "architecture", "n_latents", "k") if name in self.cells]
        return {n: self.cells[n][cell.row].item() for n in names} | {"nmse": cell.nmse, "value": cell.value}


def find_disagreements(metrics: Sequence[MetricLaws], nmse_scatter: float | None = None) -> list[Disagreement]:
    """Of each metric on each source, where there are pairs to compare. `nmse_scatter`: standard deviation of ln nmse of
    a cell about its law."""
    groups: dict[tuple[str, tuple[Any, ...]], list[MetricLaws]] = {}
    for laws in metrics:
        rest = tuple((name, value) for name, value in laws.of.items() if name != "architecture")
        groups.setdefault((laws.name, rest), []).append(laws)
    found = []
    for (name, rest), own in groups.items():
        cells = _together(own)
        noise = [min(fit.noise for fit in laws.fits) for laws in own if laws.fits]
        scatter = (_SCATTER if nmse_scatter is None else nmse_scatter, min(noise, default=_SCATTER))
        ranked = [r for equal in WITHIN if (r := _ranked(equal, cells, own[0].scale, scatter)) is not None]
        if ranked:
            found.append(Disagreement(name, own[0].scale, dict(rest), cells, tuple(ranked)))
    return found


def _together(metrics: Sequence[MetricLaws]) -> Table:
    """The cells of several kinds, with the metric's distance beside their nmse."""
    tables = [
        replace(m.cells, columns=m.cells.columns | {"distance": m.cells["nmse"], "nmse": m.nmse} | _ends(m))
        for m in metrics
    ]
    names = [name for name in tables[0].columns if all(name in table for table in tables)]
    cells = Table({name: np.concatenate([table[name] for table in tables]) for name in names}, tables[0].source)
    if len(cells) <= _MOST:
        return cells
    kept = np.zeros(len(cells), dtype=bool)
    kept[np.linspace(0, len(cells) - 1, _MOST).round().astype(int)] = True
    return cells.select(kept)


def _ends(laws: MetricLaws) -> dict[str, np.ndarray]:
    return dict(zip(_ENDS, with_ends(laws.values).T, strict=True))


def _ranked(equal: Equal, cells: Table, scale: Scale, scatter: tuple[float, float]) -> Ranked | None:
    size = _size(equal, cells)
    if size is None or len(cells) < 2:
        return None
    logs = np.log(size)
    first, second = np.triu_indices(len(cells), 1)
    other = np.zeros(len(first), dtype=bool)
    for name in ("n_latents", "k", "architecture"):
        if name in cells:
            other |= cells[name][first] != cells[name][second]
    near = other & (np.abs(logs[first] - logs[second]) <= np.log(WITHIN[equal]) + 1e-9)
    first, second = first[near], second[near]
    by_nmse = np.log(cells["nmse"][second]) - np.log(cells["nmse"][first])
    by_metric = np.log(cells["distance"][second]) - np.log(cells["distance"][first])
    differ = (by_nmse != 0) & (by_metric != 0)
    if not differ.any():
        return None
    first, second, by_nmse, by_metric = (v[differ] for v in (first, second, by_nmse, by_metric))
    alike = int((np.sign(by_nmse) == np.sign(by_metric)).sum())
    sure = (np.sign(by_nmse) != np.sign(by_metric)) & (np.abs(by_nmse) > _SURE * scatter[0])
    sure &= np.abs(by_metric) > _SURE * scatter[1]
    ends = np.stack([cells[name] for name in _ENDS], axis=1)
    told = sure & (above(ends[first], ends[second]) | above(ends[second], ends[first]))
    weight = np.minimum(np.abs(by_nmse) / scatter[0], np.abs(by_metric) / scatter[1])
    contradictions = []
    for i in sorted(np.flatnonzero(told).tolist(), key=lambda i: -weight[i]):
        pair = (int(first[i]), int(second[i])) if by_nmse[i] > 0 else (int(second[i]), int(first[i]))
        contradictions.append(Contradiction(*(_cell(row, cells, scale) for row in pair)))
    best = tuple(_best(equal, size, cells, scale))
    return Ranked(equal, len(first), alike, tuple(contradictions), int((sure & ~told).sum()), best)


def _best(equal: Equal, size: np.ndarray, cells: Table, scale: Scale) -> list[tuple[float, Cell, Cell]]:
    """The best cells of each group of equal ones, formed from the smallest size up."""
    order, found, start = np.argsort(size, kind="stable"), [], 0
    for end in range(1, len(order) + 1):
        if end < len(order) and size[order[end]] <= WITHIN[equal] * size[order[start]]:
            continue
        own = order[start:end]
        start = end
        if len(own) > 1:
            rows = (int(own[np.argmin(cells[name][own])]) for name in ("nmse", "distance"))
            by_nmse, by_metric = (_cell(row, cells, scale) for row in rows)
            found.append((float(size[own].max()), by_nmse, by_metric))
    return found


def _size(equal: Equal, cells: Table) -> np.ndarray | None:
    """Compute, or L0 (k where it is not known), of the cells; None where it is not known of each."""
    names = ("flops",) if equal == "compute" else ("l0", "k")
    for name in names:
        if name in cells and np.isfinite(cells[name]).all() and (cells[name] > 0).all():
            return cells[name]
    return None


def _cell(row: int, cells: Table, scale: Scale) -> Cell:
    return Cell(row, float(cells["nmse"][row]), float(scale.value(cells["distance"][row])))
