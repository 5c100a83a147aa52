"""The iso-FLOP view of a frontier: at each compute, which number of latents reaches the lowest nmse.

As approach 2 of Hoffmann et al. 2022 (2203.15556), with points interpolated on the curves in place of runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saescale.scaling.laws.estimate import Fit, Fitted, Resamples, chunks, draw_counts, fit_law
from saescale.scaling.laws.frontier import Frontier
from saescale.scaling.laws.law import Law
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

_LEAST_MINIMA = 3
_LEAST_SIZES = 3
_BIAS = (
    "iso-FLOP parabolas are symmetric in ln n and the loss is not where its exponents in n and in tokens differ: "
    "the optimal n is biased, its exponent less so"
)


@dataclass(frozen=True)
class IsoFlop:
    """A frontier seen at fixed compute, the one place where minima over n are found: laws, bootstraps and figures take
    them from here.

    `slices` [levels, sizes] is ln nmse of the best cell of each of `sizes` (infinite: no curve) at those points of the
    frontier's grid at which three sizes or more compare, `level` [levels] their indices. `minimum` [minima] are the
    levels whose lowest size has neighbours on both sides: at the smallest or largest n that reaches the compute, a size
    that was not trained might be better. Of these `flops`, `n_latents`, `tokens` and `nmse`, [minima] each.
    """

    frontier: Frontier
    sizes: np.ndarray
    level: np.ndarray
    slices: np.ndarray
    minimum: np.ndarray
    flops: np.ndarray
    n_latents: np.ndarray
    tokens: np.ndarray
    nmse: np.ndarray
    slope: tuple[float, float]
    warnings: tuple[str, ...] = (_BIAS,)

    @property
    def enough(self) -> bool:
        """Whether there are minima enough for a law."""
        return len(self.minimum) >= _LEAST_MINIMA

    @property
    def dropped(self) -> int:
        """How many levels have no minimum inside."""
        return len(self.level) - len(self.minimum)

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        columns = {"flops": self.flops, "n_latents": self.n_latents, "tokens": self.tokens, "nmse": self.nmse}
        return {
            "at": dict(self.frontier.at),
            "minima": [{name: float(v[i]) for name, v in columns.items()} for i in range(len(self.flops))],
            "dropped_at_edge": self.dropped,
            "warnings": list(self.warnings),
        }


def find_isoflop(frontier: Frontier, cells: Table) -> IsoFlop | None:
    """The slices and minima of a frontier; None where three sizes compare at no compute.

    `cells` has tokens and flops, from which the tokens of an n between two sizes follow.
    """
    if frontier.ends_only or not {"tokens", "flops", "n_latents"} <= set(cells.columns):
        return None
    own = np.ones(len(cells), dtype=bool)
    for column, value in frontier.at.items():
        own &= cells[column] == value
    # FLOPs per token are linear in n at one k, or all but linear (compute.py).
    own &= np.isfinite(cells["flops"]) & np.isfinite(cells["tokens"]) & (cells["tokens"] > 0)
    if len(np.unique(cells["n_latents"][own])) < 2:
        return None
    slope, base = np.polyfit(cells["n_latents"][own], (cells["flops"] / cells["tokens"])[own], 1)
    sizes, everything = _by_size(frontier, frontier.envelope[None])
    level = np.flatnonzero(np.isfinite(everything[0]).sum(axis=1) >= _LEAST_SIZES)
    if not len(level):
        return None
    slices = everything[0][level]
    best, nmse = _minima(np.log(sizes), slices)
    minimum = np.flatnonzero(np.isfinite(best))
    n, flops = np.exp(best[minimum]), frontier.grid[level[minimum]]
    return IsoFlop(
        frontier, sizes, level, slices, minimum, flops, n, flops / (slope * n + base), np.exp(nmse[minimum]),
        (float(slope), float(base)),
    )  # fmt: skip


def fit_isoflop(law: Law, view: IsoFlop, settings: FitSettings) -> Fit:
    """Fits n(C) or D(C) to the minima, with a bootstrap over cells: each resample has its own minima.

    Raises SaescaleError when there are too few.
    """
    frontier, slope, base = view.frontier, *view.slope
    level = view.level[view.minimum]

    def targets(log_n: np.ndarray) -> np.ndarray:
        return log_n if law.target == "n_latents" else np.log(view.flops) - np.log(slope * np.exp(log_n) + base)

    def resample(fitted: Fitted, bootstraps: int, rng: np.random.Generator) -> Resamples:
        def minima(counts: np.ndarray) -> np.ndarray:
            found = np.empty((len(counts), len(level)))
            for part in chunks(len(counts), frontier.envelope.size):
                chosen = np.where((counts[part] > 0)[:, :, None], frontier.envelope[None], np.inf)
                sizes, slices = _by_size(frontier, chosen)
                found[part] = [_minima(np.log(sizes), one[level])[0] for one in slices]
            return found

        def enough(counts: np.ndarray) -> np.ndarray:
            return np.isfinite(minima(counts)).sum(axis=1) >= len(law.names)

        counts, redrawn = draw_counts(len(frontier.envelope), bootstraps, enough, rng)
        best = minima(counts)
        valid = np.isfinite(best)
        return Resamples(targets(np.where(valid, best, np.log(view.n_latents))), valid.astype(float), redrawn)

    excluded = (f"{view.dropped} iso-FLOP minima at the edge of the grid",) if view.dropped else ()
    return fit_law(
        law, {"flops": view.flops}, np.exp(targets(np.log(view.n_latents))), settings,
        at=frontier.at, resampler=resample, excluded=excluded,
    )  # fmt: skip


def _by_size(frontier: Frontier, envelope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sizes, ln nmse of the best cell of each size [resamples, grid, sizes]) of envelopes [resamples, cells, grid]."""
    of = np.array([curve.n_latents for curve in frontier.curves])
    sizes = np.unique(of)
    return sizes, np.stack([envelope[:, of == n].min(axis=1) for n in sizes], axis=-1)


def _minima(log_n: np.ndarray, slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ln n, ln nmse) at the minimum of a parabola through the best size and its neighbours, [levels] each; NaN where
    the best has no neighbour on one side."""
    best, value = np.full(len(slices), np.nan), np.full(len(slices), np.nan)
    for row, y in enumerate(slices):
        there = np.flatnonzero(np.isfinite(y))
        if len(there) < _LEAST_SIZES:
            continue
        place = int(np.argmin(y[there]))
        if place in (0, len(there) - 1):
            continue
        near = there[place - 1 : place + 2]
        a, b, c = np.polyfit(log_n[near] - log_n[near[1]], y[near], 2)
        if a > 0:
            best[row], value[row] = log_n[near[1]] - b / (2 * a), c - b * b / (4 * a)
    return best, value
