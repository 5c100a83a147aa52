"""95 % intervals over documents: tokens of one document are alike, so it is documents that are drawn again."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

RESAMPLES, SEED = 1_000, 0
_AT_A_TIME = 2**22  # counts of documents

Sums = Mapping[str, np.ndarray]  # of each column


class Estimate(NamedTuple):
    value: float
    low: float | None  # None with fewer than two documents, or where the value is not defined
    high: float | None


def by_document(
    doc: np.ndarray, columns: Mapping[str, np.ndarray], statistics: Mapping[str, Callable[[Sums], np.ndarray]]
) -> dict[str, Estimate]:
    """Each statistic, a function of the columns' sums over rows, with a bootstrap over documents: expanded percentile
    intervals (Hesterberg 2014, arXiv 1411.5279), as plain ones hold the truth too rarely where documents are few.

    `doc` [rows] says which document a row is of, `columns` are [rows]; `statistics` get sums of any shape and give that
    shape. 1,000 resamples from seed 0, the same documents for all statistics.
    """
    ids, place = np.unique(doc, return_inverse=True)
    names = list(columns)
    sums = np.stack([np.bincount(place, np.asarray(columns[name], np.float64), len(ids)) for name in names])
    rng = np.random.default_rng(SEED)
    drawn: list[np.ndarray] = []  # [columns, resamples] each
    tail = 0.025
    if len(ids) > 1:
        tail = _tail(len(ids))
        at_a_time = max(1, _AT_A_TIME // len(ids))
        for start in range(0, RESAMPLES, at_a_time):
            size = min(at_a_time, RESAMPLES - start)
            counts = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size)
            drawn.append(sums @ counts.T)
    resampled = np.concatenate(drawn, axis=1) if drawn else np.empty((len(names), 0))
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, statistic in statistics.items():
            value = float(statistic(dict(zip(names, sums.sum(axis=1), strict=True))))
            many = np.asarray(statistic(dict(zip(names, resampled, strict=True))))
            many = many[np.isfinite(many)]
            low, high = map(float, np.quantile(many, [tail, 1 - tail])) if many.size else (None, None)
            found[name] = Estimate(value, low, high)
    return found


def _tail(units: int) -> float:
    """The share of resamples beyond either end: that at which a normal mean would have Student's interval, since means
    of resamples scatter by a factor sqrt((n - 1) / n) too little, and by a normal law."""
    return float(norm.cdf(-np.sqrt(units / (units - 1)) * t.ppf(0.975, units - 1)))


def ratio(of: str, to: str) -> Callable[[Sums], np.ndarray]:
    """The sum of one column over that of another."""
    return lambda sums: np.asarray(sums[of] / sums[to])


def means_of(columns: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """The mean of each column [units], of units that were drawn (latents, tasks): the same resamples for all."""
    units = np.ones(len(next(iter(columns.values()))))
    statistics = {name: ratio(name, "units") for name in columns}
    return by_document(np.arange(len(units)), {**columns, "units": units}, statistics)


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of `values` [units]."""
    return means_of({"mean": values})["mean"]
