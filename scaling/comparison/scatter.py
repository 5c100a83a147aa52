"""How far equal cells scatter, and draws of what a comparison would have found with other seeds.

Every interval of a comparison comes from here, and from one thing: the scatter of ln nmse of one cell. Cells of one
sweep see the same batches and are measured on the same held-out rows, so what those have in common moves all
architectures alike and is in no difference between them; what is left is the seed. A bootstrap over seeds would need
many (of two it gives intervals that are too narrow by a third, of one none), and draws of a law's fit hold what its
form misses, which is no uncertainty of a difference. So the scatter is pooled over the groups of an architecture, where
seeds repeat, and each group's mean is drawn about what was measured, by Student's t with the degrees of freedom that
the scatter has. The same draws go through interpolations, envelopes and medians, which need no formula of their own
then.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from saescale.scaling.comparison.arms import Arms
from saescale.scaling.metrics import Values

DRAWS = 2000
_ENOUGH = 4  # degrees of freedom with which an architecture's own scatter is known
_QUANTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; None where the scatter of cells is not known."""

    value: float
    low: float | None
    high: float | None

    def document(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def each(self, change: Callable[[float], float]) -> "Interval":
        """With a rising function of the value and of its ends."""
        low, high = (None if end is None else float(change(end)) for end in (self.low, self.high))
        return Interval(float(change(self.value)), low, high)

    def scaled(self, factor: float) -> "Interval":
        """Times a positive factor."""
        return self.each(lambda value: factor * value)

    @property
    def exp(self) -> "Interval":
        """Of a logarithm: of the number itself."""
        return self.each(math.exp)

    @property
    def less_one(self) -> "Interval":
        """Of the logarithm of a ratio: how far the ratio is from 1."""
        return self.each(math.expm1)

    @property
    def negative(self) -> "Interval":
        """Of the same difference, taken the other way."""
        turned = Interval(self.value, self.high, self.low)
        return turned.each(lambda value: -value)

    @property
    def sign(self) -> int:
        """Whether it is above 0 (1), below (-1), or not told apart from it (0)."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Scatter:
    """Standard deviation of ln nmse of one cell of each architecture and its degrees of freedom; `how` in words.

    Empty where nothing tells: no seed repeats, and there are too few N and k for a smooth surface.
    """

    sd: Mapping[str, float]
    free: Mapping[str, int]
    how: str
    of_surface: bool = False

    def draws(self, arms: Arms, seed: int = 0, count: int = DRAWS) -> np.ndarray:
        """ln nmse of each group as other seeds might have had it: [count, groups]; [0, groups] where nothing tells."""
        if not self.sd:
            return np.empty((0, len(arms)))
        rng = np.random.default_rng(seed)
        found = arms.log_nmse + np.zeros((count, 1))
        for name in arms.architectures:
            own = arms.at(name)
            # One chance for the scatter of an architecture, not one for each group.
            shared = np.sqrt(self.free[name] / rng.chisquare(self.free[name], (count, 1)))
            normal = rng.standard_normal((count, len(own)))
            found[:, own] += self.sd[name] * shared * normal / np.sqrt(arms.cells[own])
        return found


def find_scatter(arms: Arms) -> Scatter:
    """From seeds where they repeat; else from what a smooth surface in ln N and ln k leaves over in each architecture,
    which holds what that misses too and so is rather too wide."""
    repeats = {name: _of_seeds(arms, name) for name in arms.architectures}
    if sum(free for _, free in repeats.values()) >= 2:
        return _pooled(repeats, "the scatter of equal cells over their seeds")
    surfaces = {name: _of_surface(arms, name) for name in arms.architectures}
    if sum(free for _, free in surfaces.values()) >= 2:
        pooled = _pooled(surfaces, "no seed repeats: what a smooth surface in N and k leaves over")
        return replace(pooled, of_surface=True)
    return Scatter({}, {}, "no seed repeats, and there are too few N and k to tell the scatter of cells")


def interval(value: float, draws: np.ndarray) -> Interval:
    """The 95 % interval of `value` from `draws` [draws] of it: as far on one side as the draws lie on the other."""
    if not len(draws):
        return Interval(float(value), None, None)
    low, high = np.percentile(draws, _QUANTILES)
    return Interval(float(value), float(2 * value - high), float(2 * value - low))


def above(ends: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether values lie above others by more than the 95 % interval of their difference; of each (value, low, high)
    along the last axis, [..., 3]. The squares of how far the two reach towards each other add up (Zou and Donner 2008),
    as if they were measured apart: on shared samples the difference is rather better known."""
    reach = np.hypot(ends[..., 0] - ends[..., 1], others[..., 2] - others[..., 0])
    return np.asarray(ends[..., 0] - others[..., 0] > reach)


def with_ends(values: Values) -> np.ndarray:
    """(value, low, high) of each cell, [cells, 3], for `above`: of a cell without an interval thrice its value."""
    value, low, high = values
    return np.stack([value, np.where(np.isfinite(low), low, value), np.where(np.isfinite(high), high, value)], axis=1)


def _pooled(found: Mapping[str, tuple[float, int]], how: str) -> Scatter:
    """An architecture's own scatter where it is known well enough, else that of all."""
    total = sum(free for _, free in found.values())
    pooled = float(np.sqrt(sum(squares for squares, _ in found.values()) / total))
    sd, degrees = {}, {}
    for name, (squares, free) in found.items():
        enough = free >= _ENOUGH
        sd[name] = float(np.sqrt(squares / free)) if enough else pooled
        degrees[name] = free if enough else total
    return Scatter(sd, degrees, how)


def _of_seeds(arms: Arms, name: str) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) within the groups of an architecture."""
    squares, free = 0.0, 0
    for group in arms.at(name):
        values = np.log(arms.table["nmse"][arms.rows[group]])
        squares += float(((values - values.mean()) ** 2).sum())
        free += len(values) - 1
    return squares, free


def _of_surface(arms: Arms, name: str) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) about a surface of second order."""
    own = arms.at(name)
    return about_surface(arms.n_latents[own], arms.l0[own], arms.log_nmse[own], 2, arms.k[own])


def about_surface(
    n_latents: np.ndarray, k: np.ndarray, values: np.ndarray, order: int, levels: np.ndarray | None = None
) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) of `values` [cells] about a polynomial of that order in ln N and ln k, of a
    lower one in what has as few values; `levels` [cells] are k where `k` is what was measured of it."""
    x, y = np.log(n_latents), np.log(k)
    most = [len(np.unique(given)) - 1 for given in (n_latents, k if levels is None else levels)]
    powers = [(i, j) for i in range(order + 1) for j in range(order + 1 - i) if i <= most[0] and j <= most[1]]
    design = np.stack([(x - x.mean()) ** i * (y - y.mean()) ** j for i, j in powers], axis=1)
    free = len(values) - np.linalg.matrix_rank(design)
    if free < 1:
        return 0.0, 0
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float((left**2).sum()), int(free)
