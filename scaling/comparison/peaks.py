"""Where a metric is best along k, or along N, and whether nmse goes on falling beyond: more of either is not more of
what was to be found.

Along one axis, at each value of the other, a cubic spline goes through ln distance (laws/scales.py) over the logarithm
of the axis; the best place is its least value between the neighbours of the best cells. It is a peak where both ends
of what was tried are worse than the best cells by more than cells scatter, and by more than the cells' own intervals
(those of an evaluation, over its prompts or documents) allow for: what a few prompts tell may be theirs alone. Where
only the first holds, it cannot be told. Intervals are of a bootstrap over cells:
each is drawn about what was measured as far as equal cells scatter, by their seeds where they repeat, else by what a
surface of third order in ln N and ln k leaves over. Over all N (or k) the curves are averaged, and what counts is how
they differ from each other: a peak that all of them share is seen there though each by itself scatters too much.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.stats import norm
from scipy.stats import t as student

from saescale.scaling.comparison.scatter import DRAWS, Interval, about_surface, above, with_ends
from saescale.scaling.kinds import Kind
from saescale.scaling.laws.over_metrics import MetricLaws

Along = Literal["k", "n_latents"]
_LEAST = 3  # values of an axis along which there may be a peak
_SCATTER = 0.01  # of ln distance, where nothing tells
_SURE = 2.0 * np.sqrt(2.0)  # standard deviations of the difference of two cells that scatter
_STEPS = 200  # of the grid on which a spline's least value is looked for
_QUANTILES = (2.5, 97.5)


class Point(NamedTuple):
    """Cells at one place of the axis: the metric, and their nmse (geometric mean over seeds)."""

    place: float
    value: float
    nmse: float


class _Mean(NamedTuple):
    """Of the cells at one place of a curve; `ends` [3]: value, low and high of the metric."""

    log_distance: float
    log_nmse: float
    ends: np.ndarray


class Best(NamedTuple):
    """Where the metric is best along an axis at the value `at` of the other, None over all of them. `best` are the best
    cells, `lowest` those of the lowest nmse, `first` and `last` the ends of what was tried; `place` is that of the
    peak, in units of the axis, None where there is none, or where it is `untold`, as the cells' own intervals allow for
    the difference from an end. `nmse_falls`: at every step along the axis."""

    at: float | None
    best: Point
    lowest: Point
    first: float
    last: float
    nmse_falls: bool
    place: Interval | None
    untold: bool = False

    @property
    def peaks_alone(self) -> bool:
        """Whether it peaks, and nmse is lower elsewhere."""
        return self.place is not None and self.lowest.place != self.best.place

    @property
    def untold_alone(self) -> bool:
        """Whether that is what cannot be told."""
        return self.untold and self.lowest.place != self.best.place


class Peaks(NamedTuple):
    """Of one metric of the cells of one kind along one axis. `overall`: of the mean curve, where three or more can be
    averaged. `power`: the exponent with which the best place goes with the other axis, where three or more have one."""

    name: str
    of: Kind
    along: Along
    found: tuple[Best, ...]
    overall: Best | None
    power: Interval | None

    @property
    def everywhere(self) -> list[Best]:
        """First over all."""
        return [*([] if self.overall is None else [self.overall]), *self.found]

    @property
    def alone(self) -> list[Best]:
        """Where it peaks and nmse is lower elsewhere."""
        return [best for best in self.everywhere if best.peaks_alone]

    def document(self) -> dict[str, Any]:
        """An entry of `peaks` of fits.json."""
        other = "n_latents" if self.along == "k" else "k"
        return {
            "metric": self.name, "of": dict(self.of), "along": self.along,
            "best": [
                {
                    other: b.at, "tried": [b.first, b.last], "peak": b.place and b.place.document(),
                    "untold": b.untold, "nmse_falls": b.nmse_falls,
                    "best_cells": {self.along: b.best.place, "value": b.best.value, "nmse": b.best.nmse},
                    "lowest_nmse": {self.along: b.lowest.place, "value": b.lowest.value, "nmse": b.lowest.nmse},
                } for b in (*self.found, *([self.overall] if self.overall else []))
            ],
            "power": self.power and self.power.document(),
        }  # fmt: skip


def find_peaks(metrics: Sequence[MetricLaws], seed: int = 0) -> list[Peaks]:
    """Of each metric along k and along N, where there are three values of it; in their order."""
    found: list[Peaks] = []
    axes: tuple[Along, ...] = ("k", "n_latents")
    for laws in metrics:
        if len(laws.cells):
            sd, free = _scatter(laws)
            for along in axes:
                found += _along(laws, along, sd, free, np.random.default_rng(seed))
    return found


def _scatter(laws: MetricLaws) -> tuple[float, int]:
    """(standard deviation of ln distance of one cell, its degrees of freedom; 0 where nothing tells)."""
    cells = laws.cells
    y = np.log(cells["nmse"])
    squares, free = 0.0, 0
    _, group = np.unique(np.stack([cells["n_latents"], cells["k"]]), axis=1, return_inverse=True)
    for each in np.unique(group):
        own = y[group == each]
        squares, free = squares + float(((own - own.mean()) ** 2).sum()), free + len(own) - 1
    if free < 2:
        squares, free = about_surface(cells["n_latents"], cells["k"], y, order=3)
    return (float(np.sqrt(squares / free)), free) if free >= 2 else (_SCATTER, 0)


def _along(laws: MetricLaws, along: Along, sd: float, free: int, rng: np.random.Generator) -> Iterator[Peaks]:
    other = "n_latents" if along == "k" else "k"
    rows: list[Best] = []
    curves: list[dict[float, _Mean]] = []  # by place
    places: dict[float, np.ndarray] = {}  # ln of the peak, at each value of the other axis: as measured, then drawn
    # One chance for the scatter, not one for each cell.
    chance = np.sqrt(free / rng.chisquare(free, DRAWS)) if free else np.zeros(DRAWS)
    for at in np.unique(laws.cells[other]):
        own = laws.cells[other] == at
        points, log_distance, seeds = _points(laws, along, own)
        if len(points) < _LEAST:
            continue
        x = np.log([point.place for point in points])
        best = int(np.argmin(log_distance))
        sure = np.sqrt((1 / seeds[best] + 1 / seeds[[0, -1]]) / 2) * _SURE * sd
        ends = _ends(laws, along, own)
        worse = (log_distance[[0, -1]] - log_distance[best] > sure).all()
        untold = bool(worse) and not _beyond(laws, ends[[best]], ends[[0, -1]])
        place = None
        if worse and not untold:
            noise = rng.standard_normal((DRAWS, len(points))) * chance[:, None] * sd / np.sqrt(seeds)
            drawn = _lowest(x, np.concatenate([log_distance[None], log_distance + noise]))
            place = _interval(drawn, x) if free else Interval(float(np.exp(drawn[0])), None, None)
            places[float(at)] = drawn
        rows.append(_best(float(at), points, best, place, untold))
        means = zip(points, log_distance.tolist(), ends, strict=True)
        curves.append({point.place: _Mean(y, float(np.log(point.nmse)), each) for point, y, each in means})
    if rows:
        yield Peaks(laws.name, laws.of, along, tuple(rows), _overall(laws, curves, rng), _power(places, free))


def _best(at: float | None, points: Sequence[Point], best: int, place: Interval | None, untold: bool) -> Best:
    nmse = np.array([point.nmse for point in points])
    falls = bool((np.diff(nmse) < 0).all())
    lowest = points[int(np.argmin(nmse))]
    return Best(at, points[best], lowest, points[0].place, points[-1].place, falls, place, untold)


def _beyond(laws: MetricLaws, best: np.ndarray, others: np.ndarray) -> bool:
    """Whether the 95 % intervals of the differences of `best` [1, 3] from all `others` [others, 3], of both cells' own
    (value, low, high), lie on its better side."""
    return bool((above(others, best) if laws.metric.better == "lower" else above(best, others)).all())


def _overall(laws: MetricLaws, curves: Sequence[dict[float, _Mean]], rng: np.random.Generator) -> Best | None:
    """Of the mean of several curves, at the places that all of them have: a peak where both ends are worse than the
    best by Student's t over the curves; its interval is of a bootstrap over them, expanded as their number asks for."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    n = len(curves)
    if n < _LEAST or len(shared) < _LEAST:
        return None
    y = np.array([[curve[place].log_distance for place in shared] for curve in curves])
    log_nmse = np.array([[curve[place].log_nmse for place in shared] for curve in curves])
    # The same prompts measured them all: a mean over curves is known no better than each of them.
    ends = np.mean([[curve[place].ends for place in shared] for curve in curves], axis=0)
    mean = y.mean(axis=0)
    best = int(np.argmin(mean))
    values = laws.scale.value(np.exp(mean)), np.exp(log_nmse.mean(axis=0))
    points = [Point(*map(float, each)) for each in zip(shared, *values, strict=True)]
    worse = y[:, [0, -1]] - y[:, [best]]
    quantile = student.ppf(0.975, n - 1)
    place, untold = None, False
    if (worse.mean(axis=0) > quantile * worse.std(axis=0, ddof=1) / np.sqrt(n)).all():
        untold = not _beyond(laws, ends[[best]], ends[[0, -1]])
        x = np.log(shared)
        again = y[rng.integers(n, size=(DRAWS, n))].mean(axis=1)
        tail = 100 * norm.cdf(-np.sqrt(n / (n - 1)) * quantile)
        if not untold:
            place = _interval(_lowest(x, np.concatenate([mean[None], again])), x, (tail, 100 - tail))
    return _best(None, points, best, place, untold)


def _ends(laws: MetricLaws, along: Along, own: np.ndarray) -> np.ndarray:
    """(value, low, high) of the metric at each place of the axis, [places, 3]: means over seeds, which the same prompts
    measured. Where a cell has no interval its value is that."""
    rows = with_ends(laws.values)[own]
    places, group = np.unique(laws.cells[along][own], return_inverse=True)
    return np.array([rows[group == each].mean(axis=0) for each in range(len(places))])


def _points(laws: MetricLaws, along: Along, own: np.ndarray) -> tuple[list[Point], np.ndarray, np.ndarray]:
    """The cells of `own` along the axis, ln distance of each, and how many seeds it is of."""
    places, group = np.unique(laws.cells[along][own], return_inverse=True)
    seeds = np.bincount(group)
    log_distance, log_nmse = (
        np.bincount(group, np.log(values[own])) / seeds for values in (laws.cells["nmse"], laws.nmse)
    )
    values = laws.scale.value(np.exp(log_distance))
    points = [Point(*map(float, each)) for each in zip(places, values, np.exp(log_nmse), strict=True)]
    return points, log_distance, seeds


def _lowest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the spline through each row of y [rows, places] is lowest between the neighbours of its lowest place."""
    grid = np.linspace(x[0], x[-1], _STEPS)
    curves = CubicSpline(x, y, axis=1)(grid)
    best = np.argmin(y, axis=1)
    low, high = x[np.maximum(best - 1, 0)], x[np.minimum(best + 1, len(x) - 1)]
    curves[(grid < low[:, None] - 1e-9) | (grid > high[:, None] + 1e-9)] = np.inf
    found: np.ndarray = grid[np.argmin(curves, axis=1)]
    return found


def _interval(drawn: np.ndarray, x: np.ndarray, quantiles: tuple[float, float] = _QUANTILES) -> Interval:
    """An end that is as far as was tried is open."""
    low, high = np.percentile(drawn[1:], quantiles)
    return Interval(
        float(np.exp(drawn[0])),
        float(np.exp(low)) if low > x[0] else None,
        float(np.exp(high)) if high < x[-1] else None,
    )


def _power(places: Mapping[float, np.ndarray], free: int) -> Interval | None:
    """By least squares through the logarithms of the peaks, and through each draw of them."""
    if len(places) < _LEAST:
        return None
    x = np.log(list(places))
    x = x - x.mean()
    slopes = x @ np.stack(list(places.values())) / (x @ x)
    low, high = map(float, np.percentile(slopes[1:], _QUANTILES)) if free else (None, None)
    return Interval(float(slopes[0]), low, high)
