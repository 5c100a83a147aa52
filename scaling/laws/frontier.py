"""The compute frontier L(C): the lowest held-out nmse that any cell reaches with C training FLOPs.

The compute-MSE frontier of Gao et al. 2024 (2406.04093), here at each k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saescale.scaling.laws.convergence import LEAST_POINTS
from saescale.scaling.laws.estimate import Fit, Fitted, Resamples, chunks, draw_counts, fit_law
from saescale.scaling.laws.law import Law
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

_POINTS = 48
_WARM_UP = 0.05
_LEAST_CELLS = 3
_ABOVE = 0.1
_NO_ROWS = np.empty(0, dtype=int)


class Curve(NamedTuple):
    """One cell's held-out curve: training FLOPs so far and ln nmse, [evaluations] each, FLOPs increasing."""

    cell_id: str
    n_latents: float
    flops: np.ndarray
    log_nmse: np.ndarray


@dataclass(frozen=True)
class Frontier:
    """The frontier of the cells of one k, `at` = {"k": k} (or {}, where the cells name none).

    `envelope` is ln nmse of every cell's smoothed curve on `grid`, one grid of training FLOPs: [cells, grid],
    infinite outside the curve. `kept` [grid] marks the points that count for the law, `winner` [grid] the cell
    that is lowest, `edge` [cells] cells whose points never count. `ends_only`: made of cells' last points.
    """

    at: dict[str, float]
    curves: tuple[Curve, ...]
    grid: np.ndarray
    envelope: np.ndarray
    kept: np.ndarray
    winner: np.ndarray
    edge: np.ndarray
    ends_only: bool = False

    @property
    def flops(self) -> np.ndarray:
        """Training FLOPs of the points that count, [points]."""
        return self.grid[self.kept]

    @property
    def nmse(self) -> np.ndarray:
        """The lowest held-out nmse there, [points]."""
        return np.exp(self.envelope.min(axis=0)[self.kept])


def read_curves(cells: Table, curves: Table) -> tuple[Curve, ...]:
    """The held-out curves of `cells`, by number of latents; cells with fewer than three evaluations have none.

    Evaluations without a held-out nmse, before any training, or with far more latents than k are passed over. Compute
    is sparse training FLOPs.
    """
    found = []
    usable = np.isfinite(curves["nmse"]) & (curves["nmse"] > 0) & (curves["flops"] > 0)
    of_cell = curves.rows_of("cell_id")
    for row, cell_id in enumerate(cells["cell_id"].tolist()):
        own = of_cell.get(cell_id, _NO_ROWS)
        own = at_its_k(cells, row, curves, own[usable[own]])
        if len(own) < LEAST_POINTS:
            continue
        flops, first = np.unique(curves["flops"][own], return_index=True)
        log_nmse = np.log(curves["nmse"][own][first])
        found.append(Curve(str(cells["cell_id"][row]), float(cells["n_latents"][row]), flops, log_nmse))
    return tuple(sorted(found, key=lambda c: (c.n_latents, c.cell_id)))


def at_its_k(cells: Table, row: int, curves: Table, own: np.ndarray) -> np.ndarray:
    """Of the rows `own` of a cell's curve those that say what it reaches with k latents: where k is a target, none with
    an L0 more than 10 % above it.

    Before its penalty has taken hold such a cell has many more active latents, and reconstructs better than it ever
    will with k.
    """
    if not {"l0_error", "k"} <= set(cells.columns) or "l0" not in curves or np.isnan(cells["l0_error"][row]):
        return own
    return own[curves["l0"][own] <= (1 + _ABOVE) * cells["k"][row]]


def find_frontier(at: Mapping[str, float], curves: tuple[Curve, ...]) -> Frontier:
    """Smooths the curves lightly and takes their lower envelope on a logarithmic grid of compute.

    Points are dropped where they would bend the law: the first 5 % of every curve (warm-up), where the
    cheapest cells win (a still smaller cell might do better: the edge of the grid), and where a curve's end
    lets the envelope rise again.

    Raises SaescaleError for fewer than three sizes of SAE.
    """
    if len({c.n_latents for c in curves}) < _LEAST_CELLS:
        raise SaescaleError(
            f"curves of {len({c.n_latents for c in curves})} different n; a frontier takes at least {_LEAST_CELLS}. "
            "Add cells"
        )
    starts = [max(c.flops[0], _WARM_UP * c.flops[-1]) for c in curves]
    grid = np.geomspace(min(starts), max(c.flops[-1] for c in curves), _POINTS)
    # The grid's ends are the curves' ends but for rounding, which must not push them out of a curve.
    grid[-1] = max(c.flops[-1] for c in curves)
    envelope = np.full((len(curves), _POINTS), np.inf)
    for i, (curve, start) in enumerate(zip(curves, starts, strict=True)):
        inside = (grid >= start) & (grid <= curve.flops[-1])
        envelope[i, inside] = np.interp(np.log(grid[inside]), np.log(curve.flops), _smooth(curve.log_nmse))
    edge = _cheapest(curves)
    kept, winner = _keep(envelope[None], edge)
    return Frontier(dict(at), curves, grid, envelope, kept[0], winner[0], edge)


def frontier_of_ends(at: Mapping[str, float], cells: Table) -> Frontier:
    """The frontier where only the ends of cells are known: those that no cell with less compute equals.

    `cells` has columns flops and nmse. All cells may count, the smallest too: an end is where its cell is best.
    """
    grid = np.unique(cells["flops"])
    envelope = np.where(cells["flops"][:, None] == grid, np.log(cells["nmse"])[:, None], np.inf)
    edge = np.zeros(len(cells), dtype=bool)
    kept, winner = _keep(envelope[None], edge)
    return Frontier(dict(at), (), grid, envelope, kept[0], winner[0], edge, ends_only=True)


def fit_frontier(law: Law, frontier: Frontier, settings: FitSettings) -> Fit:
    """Fits L(C) to the frontier, with a bootstrap over cells: each resample has its own frontier.

    Raises SaescaleError when too few points of the frontier count.
    """

    def resample(fitted: Fitted, bootstraps: int, rng: np.random.Generator) -> Resamples:
        def enough(counts: np.ndarray) -> np.ndarray:
            kept, _ = _resampled(frontier, counts > 0)
            return kept[:, frontier.kept].sum(axis=1) >= len(law.names)

        counts, redrawn = draw_counts(len(frontier.envelope), bootstraps, enough, rng)
        kept, lowest = _resampled(frontier, counts > 0)
        log_nmse = np.where(kept, lowest, 0.0)
        return Resamples(log_nmse[:, frontier.kept], kept[:, frontier.kept].astype(float), redrawn)

    dropped = int((~frontier.kept).sum())
    if frontier.ends_only:
        excluded = f"{dropped} of {len(frontier.grid)} points of compute: no better than with less compute"
    else:
        excluded = (
            f"{dropped} of {_POINTS} points of compute: warm-up, edge of the grid, or no better than with less compute"
        )
    return fit_law(
        law,
        {"flops": frontier.flops},
        frontier.nmse,
        settings,
        at=frontier.at,
        resampler=resample,
        excluded=(excluded,) if dropped else (),
    )


def _resampled(frontier: Frontier, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points count and the lowest ln nmse, [resamples, grid] each, with only the cells of `chosen`
    [resamples, cells]; some resamples at a time, since together they take resamples x cells x grid."""
    kept = np.empty((len(chosen), len(frontier.grid)), dtype=bool)
    lowest = np.empty((len(chosen), len(frontier.grid)))
    for part in chunks(len(chosen), frontier.envelope.size):
        envelope = np.where(chosen[part, :, None], frontier.envelope, np.inf)
        kept[part], _ = _keep(envelope, frontier.edge)
        lowest[part] = envelope.min(axis=1)
    return kept, lowest


def _keep(envelope: np.ndarray, edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points of the envelopes [resamples, cells, grid] count, and which cell wins each: [resamples, grid]."""
    lowest = envelope.min(axis=1)
    winner = envelope.argmin(axis=1)
    before = np.minimum.accumulate(np.pad(lowest, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1], axis=1)
    return np.isfinite(lowest) & (lowest < before) & ~edge[winner], winner


def _cheapest(curves: tuple[Curve, ...]) -> np.ndarray:
    sizes = np.array([c.n_latents for c in curves])
    return sizes == sizes.min()


def _smooth(log_nmse: np.ndarray) -> np.ndarray:
    """Weighted by 1, 2, 1 over neighbouring evaluations; the ends, which a mean would bend, stay."""
    smooth = log_nmse.copy()
    smooth[1:-1] = 0.25 * log_nmse[:-2] + 0.5 * log_nmse[1:-1] + 0.25 * log_nmse[2:]
    return smooth
