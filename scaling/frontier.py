"""The compute frontier L(C): the lowest held-out nmse that any cell reaches with C training FLOPs."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scaling.estimate import Fit, Resamples, draw_counts, fit_law
from scaling.laws import Law
from scaling.tables import Table
from storage.errors import SaescaleError

_POINTS = 48
_WARM_UP = 0.05
_LEAST_CELLS = 3


class Curve(NamedTuple):
    """One cell's held-out curve: training FLOPs so far and ln nmse, [evaluations] each, FLOPs increasing."""

    cell_id: str
    n_latents: float
    flops: np.ndarray
    log_nmse: np.ndarray


@dataclass(frozen=True)
class Frontier:
    """The frontier at one k. `envelope` is ln nmse of every cell's smoothed curve on one grid of compute,
    [cells, grid], infinite outside the curve; `kept` [grid] marks the points that count for the law."""

    k: float
    curves: tuple[Curve, ...]
    grid: np.ndarray
    envelope: np.ndarray
    kept: np.ndarray
    winner: np.ndarray

    @property
    def flops(self) -> np.ndarray:
        return self.grid[self.kept]

    @property
    def nmse(self) -> np.ndarray:
        return np.exp(self.envelope.min(axis=0)[self.kept])


def read_curves(results: Table, curves: Table, k: float, axis: str = "flops") -> tuple[Curve, ...]:
    """The held-out curves of the finished cells at `k`, by number of latents.

    `axis` is "flops" (sparse FLOPs, as in the curves) or "flops_dense" (dense-equivalent: the curve's FLOPs
    times the cell's ratio of the two). Evaluations without a held-out nmse, or before any training, are passed over.
    """
    found = []
    for row in np.flatnonzero(results["k"] == k):
        own = curves["cell_id"] == results["cell_id"][row]
        own &= np.isfinite(curves["nmse"]) & (curves["nmse"] > 0) & (curves["flops"] > 0)
        if own.sum() < 3:
            continue
        flops, first = np.unique(curves["flops"][own], return_index=True)
        if axis == "flops_dense":
            flops = flops * results["flops_dense"][row] / results["flops"][row]
        log_nmse = np.log(curves["nmse"][own][first])
        cell_id = str(results["cell_id"][row])
        found.append(Curve(cell_id, float(results["n_latents"][row]), flops, log_nmse))
    return tuple(sorted(found, key=lambda c: (c.n_latents, c.cell_id)))


def find_frontier(k: float, curves: tuple[Curve, ...]) -> Frontier:
    """Smooths the curves lightly and takes their lower envelope on a logarithmic grid of compute.

    Points are dropped where they would bend the law: the first 5 % of every curve (warm-up), where the
    cheapest cells win (a still smaller cell might do better: the edge of the grid), and where a curve's end
    lets the envelope rise again.

    Raises SaescaleError for fewer than three sizes of SAE.
    """
    if len({c.n_latents for c in curves}) < _LEAST_CELLS:
        raise SaescaleError(
            f"law c at k = {k:g}: curves of {len({c.n_latents for c in curves})} different n; a frontier takes "
            f"at least {_LEAST_CELLS}. Add cells"
        )
    starts = [max(c.flops[0], _WARM_UP * c.flops[-1]) for c in curves]
    grid = np.geomspace(min(starts), max(c.flops[-1] for c in curves), _POINTS)
    # The grid's ends are the curves' ends but for rounding, which must not push them out of a curve.
    grid[-1] = max(c.flops[-1] for c in curves)
    envelope = np.full((len(curves), _POINTS), np.inf)
    for i, (curve, start) in enumerate(zip(curves, starts, strict=True)):
        inside = (grid >= start) & (grid <= curve.flops[-1])
        envelope[i, inside] = np.interp(np.log(grid[inside]), np.log(curve.flops), _smooth(curve.log_nmse))
    kept, winner = _keep(envelope[None], _cheapest(curves))
    return Frontier(k, curves, grid, envelope, kept[0], winner[0])


def fit_frontier(law: Law, frontier: Frontier, bootstraps: int, seed: int) -> Fit:
    """Fits L(C) to the frontier, with a bootstrap over cells: each resample has its own frontier.

    Raises SaescaleError when too few points of the frontier count.
    """
    count = len(frontier.curves)
    cheapest = _cheapest(frontier.curves)

    def resample(bootstraps: int, rng: np.random.Generator) -> Resamples:
        def enough(counts: np.ndarray) -> np.ndarray:
            kept, _ = _keep(_only(frontier.envelope, counts > 0), cheapest)
            return kept[:, frontier.kept].sum(axis=1) >= len(law.names)

        counts, redrawn = draw_counts(count, bootstraps, enough, rng)
        envelope = _only(frontier.envelope, counts > 0)
        kept, _ = _keep(envelope, cheapest)
        log_nmse = np.where(kept, envelope.min(axis=1), 0.0)
        return Resamples(log_nmse[:, frontier.kept], kept[:, frontier.kept].astype(float), redrawn)

    return fit_law(
        law,
        {"flops": frontier.flops},
        frontier.nmse,
        bootstraps=bootstraps,
        seed=seed,
        at={"k": frontier.k},
        resampler=resample,
        excluded=(
            f"{int((~frontier.kept).sum())} of {_POINTS} points of compute: warm-up, edge of the grid, "
            "or no better than with less compute",
        ),
    )


def _only(envelope: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[resamples, cells, grid]: infinite for cells that were not chosen ([resamples, cells])."""
    return np.where(chosen[:, :, None], envelope[None], np.inf)


def _keep(envelope: np.ndarray, cheapest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points of the envelopes [resamples, cells, grid] count, and which cell wins each: [resamples, grid]."""
    lowest = envelope.min(axis=1)
    winner = envelope.argmin(axis=1)
    before = np.minimum.accumulate(np.pad(lowest, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1], axis=1)
    return np.isfinite(lowest) & (lowest < before) & ~cheapest[winner], winner


def _cheapest(curves: tuple[Curve, ...]) -> np.ndarray:
    sizes = np.array([c.n_latents for c in curves])
    return sizes == sizes.min()


def _smooth(log_nmse: np.ndarray) -> np.ndarray:
    """Weighted by 1, 2, 1 over neighbouring evaluations; the ends, which a mean would bend, stay."""
    smooth = log_nmse.copy()
    smooth[1:-1] = 0.25 * log_nmse[:-2] + 0.5 * log_nmse[1:-1] + 0.25 * log_nmse[2:]
    return smooth
