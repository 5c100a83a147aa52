"""One law fitted to one set of points: several starts, a bootstrap over cells, intervals of what follows from it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm, t

from saescale.scaling.kinds import Kind
from saescale.scaling.laws.huber import Problem, losses, minimise, polish
from saescale.scaling.laws.identify import Bound, Conditioning, Profile, bounds_reached, condition
from saescale.scaling.laws.lack_of_fit import LackOfFit, f_test, resampled_errors, smoothed
from saescale.scaling.laws.law import SYMBOLS, Law
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleError

STARTS = 64
_SETTINGS = FitSettings()
_QUANTILES = (2.5, 97.5)
_AT_ONCE = 2_000_000  # numbers of float64 that one temporary may hold
_FURTHEST = np.log(1e60)  # beyond it powers of the values are no numbers
_EQUAL = 1e-9  # of ln nmse: no difference at all
_SCATTER = norm.ppf((np.arange(40) + 0.5) / 40)


class Fitted(NamedTuple):
    """What a bootstrap starts from: ln of the law and ln measured - ln law at the points, [points] each, and how many
    coefficients it has."""

    log_value: np.ndarray
    residuals: np.ndarray
    coefficients: int


class Resamples(NamedTuple):
    """Resampled data of a bootstrap: ln nmse and weights, [bootstraps, points] or broadcastable to it, and how
    many degenerate resamples were drawn again."""

    log_nmse: np.ndarray
    weights: np.ndarray
    redrawn: int


Resampler = Callable[[Fitted, int, np.random.Generator], Resamples]


class Prediction(NamedTuple):
    """Predicted nmse with two 95 % intervals (NaN without a bootstrap); [points] each.

    `low`, `high`: of the law there, a confidence interval. `cell_low`, `cell_high`: of what one newly trained cell
    would measure, a prediction interval, wider by the scatter of cells about the law.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    cell_low: np.ndarray
    cell_high: np.ndarray


@dataclass(frozen=True)
class Fit:
    """A fitted law. `raw` [coefficients] and `draws` [bootstraps, coefficients] are raw coefficients (law.py);
    `at` is what is held fixed, such as {"k": 32}; `columns` and `nmse` (or what the law gives) are the points,
    [points] each. `widen` is what the bootstrap's intervals are widened by; `kind` says what is resampled. `kinds`
    [points]: which cells are equal but for their seed (None: no two), and `lack` what the form misses besides."""

    law: Law
    at: dict[str, float]
    columns: dict[str, np.ndarray]
    nmse: np.ndarray
    raw: np.ndarray
    draws: np.ndarray
    starts: int
    agreeing: int
    redrawn: int
    excluded: tuple[str, ...] = ()
    holdout: dict[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())
    kind: str = "cells"
    widen: float = 1.0
    conditioning: Conditioning | None = None
    profile: Profile | None = None
    kinds: np.ndarray | None = None
    lack: LackOfFit | None = None
    bounds: tuple[Bound, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)  # further keys of its entry in fits.json
    of: Kind = field(default_factory=dict)  # the kind of cells that it describes (kinds.py)
    asked_k: np.ndarray | None = None  # [points] of cells whose measured L0 stands in place of the k that was asked for

    @property
    def rms_log_residual(self) -> float:
        """Root mean square of ln predicted - ln measured over the points: 0.01 is about 1 % of nmse."""
        residuals = self.law.log_value(self.raw, self.columns) - np.log(self.nmse)
        return float(np.sqrt(np.mean(residuals**2)))

    @property
    def noise(self) -> float:
        """Standard deviation of ln nmse of one cell about the law, with the degrees of freedom that the fit took."""
        if self.misses and self.lack:
            return self.lack.noise
        points = len(self.nmse)
        return self.rms_log_residual * np.sqrt(points / max(points - len(self.law.names), 1))

    @property
    def misses(self) -> bool:
        """Whether the form misses more than the scatter of equal cells allows."""
        return self.lack is not None and self.lack.significant

    @property
    def free(self) -> int:
        """Degrees of freedom of the scatter about the law; where the form misses something, cells that are equal but
        for their seed have it in common and count as one."""
        return _observations(self.nmse, self.kinds if self.misses else None) - len(self.law.names)

    def observations(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(columns, ln nmse) of what the fit takes for independent: its points, or the means of equal cells."""
        log_nmse = np.log(self.nmse)
        if self.kinds is None or not self.misses:
            return self.columns, log_nmse
        _, first, sizes = np.unique(self.kinds, return_index=True, return_counts=True)
        return {c: v[first] for c, v in self.columns.items()}, np.bincount(self.kinds, log_nmse) / sizes

    def levels(self, column: str) -> np.ndarray:
        """The values of a column at which the points were asked for, each once."""
        return np.unique(self.asked_k if column == "k" and self.asked_k is not None else self.columns[column])

    @property
    def centre(self) -> dict[str, float]:
        """The geometric mean of each column over the points."""
        return {c: float(np.exp(np.log(v).mean())) for c, v in self.columns.items()}

    def spread(self, value: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the 95 % interval of what is `value` [...] at the best fit and `draws` [bootstraps, ...] in
        the bootstrap's; NaN without a bootstrap. Give logarithms of what is positive by nature."""
        value = np.asarray(value, dtype=np.float64)
        if not len(draws):
            return np.full_like(value, np.nan), np.full_like(value, np.nan)
        low, high = np.percentile(draws, _QUANTILES, axis=0)
        return value - self.widen * (value - low), value + self.widen * (high - value)

    def predict(self, columns: Mapping[str, np.ndarray]) -> Prediction:
        """The law at the points of `columns` ([points] each; those that the law names, FLOPs and tokens as in
        results.parquet)."""
        points = {c: np.asarray(columns[c], dtype=np.float64) for c in self.law.columns}
        count = len(next(iter(points.values())))
        parts = [self._predict({c: v[part] for c, v in points.items()}) for part in
                 chunks(count, max(len(self.draws), 1) * len(_SCATTER))]  # fmt: skip
        return Prediction(*(np.concatenate(ends) for ends in zip(*parts, strict=True)))

    def _predict(self, columns: Mapping[str, np.ndarray]) -> Prediction:
        value, draws = self.law.log_value(self.raw, columns), self.law.log_value(self.draws, columns)
        low, high = self.spread(value, draws)
        # Each draw scattered by the quantiles of a normal distribution: no further chance comes in.
        scattered = draws[:, None] + self.noise * _SCATTER[:, None]
        cell_low, cell_high = self.spread(value, scattered.reshape(-1, *value.shape))
        return Prediction(*(np.exp(v) for v in (value, low, high, cell_low, cell_high)))

    def exponent(self, column: str, at: Mapping[str, float]) -> dict[str, float | None]:
        """The exponent of `column` in the first term where the other columns are `at`, with its interval."""
        value, draws = (self.law.exponent_of(raw, column, at) for raw in (self.raw, self.draws))
        return _interval(value, *self.spread(value, draws))

    def coefficients(self) -> dict[str, dict[str, float | None]]:
        """Each coefficient of the formula with its interval."""
        # Raw coefficients are logarithms of amplitudes: their intervals are widened there.
        low, high = self.spread(self.raw, self.draws)
        if any(not bound.interval_only for bound in self.bounds):
            # Where refits stand on the bound with the best fit, that they agree says nothing of how well it is known.
            low, high = (np.where(high - low > _EQUAL, end, np.nan) for end in (low, high))
        values, ends = self.law.to_reported(self.raw), np.sort(self.law.to_reported(np.stack([low, high])), axis=0)
        return {name: _interval(values[i], *ends[:, i]) for i, name in enumerate(self.law.names)}

    def document(self) -> dict[str, Any]:
        """This fit's entry in fits.json."""
        entry: dict[str, Any] = {"law": self.law.name, "formula": self.law.formula, "at": dict(self.at)}
        if self.of:
            entry["of"] = dict(self.of)
        entry["floor"] = self.law.has_floor
        if self.law.target != "nmse":
            entry["target"] = self.law.target
        entry["coefficients"] = self.coefficients()
        entry["units"] = {coefficient.name: coefficient.unit for coefficient in self.law.coefficients()}
        for column, key in (("k", "exponent_of_n_at_k"), ("d_model", "exponent_of_n_at_d_model")):
            if {"n_latents", column} <= set(self.law.columns) and "n_latents" in self.law.leading:
                levels = self.levels(column)
                entry[key] = {f"{value:g}": self.exponent("n_latents", {column: value}) for value in levels}
        entry |= {
            "points": len(self.nmse),
            "excluded": list(self.excluded),
            "rms_log_residual": self.rms_log_residual,
            "starts": {"tried": self.starts, "agree": self.agreeing},
            "bootstraps": {
                "fits": len(self.draws), "redrawn": self.redrawn, "resampled": self.kind, "widened_by": self.widen,
            },
            "holdout": self.holdout,
            "warnings": list(self.warnings),
        }  # fmt: skip
        if self.lack:
            entry["lack_of_fit"] = self.lack.document()
        if self.bounds:
            entry["bounds_reached"] = [bound._asdict() for bound in self.bounds]
        if self.conditioning:
            entry |= self.conditioning.document(self.law.names)
        if self.profile:
            entry["profile_of_floor"] = self.profile.document()
        return entry | dict(self.more)


def fit_law(
    law: Law,
    columns: Mapping[str, np.ndarray],
    nmse: np.ndarray,
    settings: FitSettings = _SETTINGS,
    *,
    at: Mapping[str, float] | None = None,
    resampler: Resampler | None = None,
    excluded: tuple[str, ...] = (),
    agree: bool = True,
    kinds: np.ndarray | None = None,
) -> Fit:
    """Fits `law` to nmse [points] (or what else the law gives) at `columns` ([points] each, more than needed is fine).

    The loss is Huber's on ln predicted - ln measured with a width of 1e-3, summed over points and minimised by
    variable projection from many starts: that of Hoffmann et al. 2022 (2203.15556, approach 3), with nmse in place of
    the language model's loss. Intervals come from refits to resamples, by default of cells (see `resample_cells`);
    of `settings` the laws do not count here. `agree`: False spares the starts that only confirm the best one. `kinds`
    [points]: numbers that cells which are equal but for their seed share; where these tell a lack of fit, all cells of
    a kind have it in common.

    Raises SaescaleError when the points are fewer than coefficients + 2, a column takes too few values, or all points
    have one value, which every law meets.
    """
    columns = {c: np.asarray(columns[c], dtype=np.float64) for c in law.columns}
    if len(nmse) < len(law.names) + 2:
        raise SaescaleError(
            f"{len(nmse)} point{'s' if len(nmse) > 1 else ''} for {len(law.names)} coefficients; it takes at least "
            f"{len(law.names) + 2}. Add cells"
        )
    for column, values in columns.items():
        if len(np.unique(values)) < _levels(law):
            raise SaescaleError(
                f"{SYMBOLS.get(column, column)} takes {len(np.unique(values))} different values; "
                f"it takes at least {_levels(law)}. Add cells"
            )
    log_nmse = np.log(nmse)
    for name, logs in ((law.target, log_nmse), *((c, np.log(v)) for c, v in columns.items())):
        if np.abs(logs).max() > _FURTHEST:
            far = np.exp(logs[np.argmax(np.abs(logs))])
            raise SaescaleError(f"{name} is {far:.3g} at a point, which no law is fitted to; give it in other units")
    if np.ptp(log_nmse) < _EQUAL:
        raise SaescaleError(
            f"{law.target} is {nmse[0]:.6g} at all {len(nmse)} points: there is nothing that a law could follow; look "
            "whether it was rounded, or add cells"
        )
    rng = np.random.default_rng(settings.seed)
    ones = np.ones(len(nmse))
    problem, to_raw = centred(law, columns, log_nmse)
    starts = _starts(problem, log_nmse, rng, STARTS if agree else STARTS // 4)
    found, loss = minimise(problem, starts, log_nmse, ones)
    best = polish(problem, found[np.argmin(loss)], log_nmse, ones)
    agreeing = int((loss <= 1.01 * losses(problem, best[None], log_nmse, ones)[0] + 1e-12).sum())
    if kinds is not None:
        kinds = np.unique(kinds, return_inverse=True)[1]
    lack = None if kinds is None else f_test(problem, best, log_nmse, kinds)
    shared = kinds if lack and lack.significant else None
    draws, redrawn = np.empty((0, len(law.names))), 0
    if settings.refits:
        value = problem.log_value(best)
        fitted = Fitted(value, log_nmse - value, len(best))
        if lack and shared is not None:
            errors = resampled_errors(lack, fitted.residuals, shared, settings.refits, rng)
            samples = Resamples(value + errors, ones, 0)
        else:
            samples = (resampler or resample_cells)(fitted, settings.refits, rng)
        draws = _refits(problem, best, samples, settings.refits)
        redrawn = samples.redrawn
    # Only residuals of independent cells have the degrees of freedom that Student's t counts.
    free = max(_observations(nmse, shared) - len(best), 1)
    widen = 1.0 if resampler else float(t.ppf(0.975, free) / norm.ppf(0.975))
    kind = (
        "curves" if resampler else "residuals of cells" if shared is None else "residuals of kinds of cells and seeds"
    )
    return Fit(
        law, dict(at or {}), columns, np.asarray(nmse), law.ordered(to_raw @ best), law.ordered(draws @ to_raw.T),
        len(starts), agreeing, redrawn, excluded, kind=kind, widen=widen,
        conditioning=condition(law, problem, best, to_raw), kinds=kinds, lack=lack,
        bounds=bounds_reached(law, problem, best, draws),
    )  # fmt: skip


def _observations(nmse: np.ndarray, kinds: np.ndarray | None) -> int:
    """How many independent ones there are: cells, or kinds of cells where these are given."""
    return len(nmse) if kinds is None else int(kinds.max()) + 1


def chunks(items: int, each: int) -> Iterator[slice]:
    """Consecutive slices of `items`, so many that a temporary of `each` numbers an item stays within `_AT_ONCE`."""
    size = max(_AT_ONCE // max(each, 1), 1)
    return (slice(first, first + size) for first in range(0, items, size))


def _refits(problem: Problem, best: np.ndarray, samples: Resamples, bootstraps: int) -> np.ndarray:
    """The fits [bootstraps, coefficients] to resamples, all from the best one, some at a time: fits of a batch do not
    touch each other."""
    points = len(problem.design)
    log_nmse = np.broadcast_to(samples.log_nmse, (bootstraps, points))
    weights = np.broadcast_to(samples.weights, (bootstraps, points))
    draws = np.empty((bootstraps, len(best)))
    for part in chunks(bootstraps, points):
        starts = np.tile(best, (len(log_nmse[part]), 1))
        draws[part], _ = minimise(problem, starts, log_nmse[part], weights[part])
    return draws


def resample_cells(fitted: Fitted, bootstraps: int, rng: np.random.Generator) -> Resamples:
    """A smoothed bootstrap of the cells' residuals about the law; each cell keeps its place on the grid.

    A fit of absolute residuals meets as many cells exactly as it has coefficients, and a small grid loses a whole N or
    k when cells are drawn with replacement; so residuals are drawn, scaled by sqrt(cells / degrees of freedom) and
    smoothed (lack_of_fit.py). Percentiles are then widened by Student's t over the normal quantile.

    Of 300 simulated sweeps each, 95 % intervals held the exponent of n at fixed k, the law at four times the largest n
    and a new cell there in 91 to 97 %, 95 % in the mean: L(N, k) on 42, 24 and 16 cells, L(N) with a floor on 8. For
    scatter with heavy tails 95 to 99 %; where it grows threefold over the grid, which a warning says, only 84 to 96 %.
    Percentiles of cells drawn with replacement held 96 to 99 % on 42 cells and on 8, and 89 to 96 % on 16
    (tests/benchmarks/bench_coverage.py).
    """
    residuals = fitted.residuals - fitted.residuals.mean()
    cells = len(residuals)
    inflated = residuals * np.sqrt(cells / (cells - fitted.coefficients))
    return Resamples(fitted.log_value + smoothed(inflated, (bootstraps, cells), rng), np.ones(cells), 0)


def _interval(value: Any, low: Any, high: Any) -> dict[str, float | None]:
    """As in fits.json: None for the ends where there is no bootstrap."""
    ends = {"low": float(low), "high": float(high)}
    return {"value": float(value), **{name: end if np.isfinite(end) else None for name, end in ends.items()}}


def _levels(law: Law) -> int:
    """How many different values each column needs: two for a power, a third to tell it from another term."""
    return min(1 + len(law.terms), 3)


def centred(law: Law, columns: Mapping[str, np.ndarray], log_nmse: np.ndarray) -> tuple[Problem, np.ndarray]:
    """The problem in logarithms relative to their means, and the matrix that takes its coefficients back.

    Centring takes the correlation between amplitudes and exponents out (and between beta and gamma), and
    gives bounds a meaning: they hold for the local exponents at the centre of the data.
    """
    logs = {c: np.log(v) for c, v in columns.items()}
    plain = law.design(logs)
    relative = law.design({c: v - v.mean() for c, v in logs.items()})
    to_raw = np.zeros((len(law.names), len(law.names)))
    low, high = [], []
    for j, term in enumerate(law.terms):
        own = np.flatnonzero(law.term_of == j)
        to_raw[np.ix_(own, own)] = np.linalg.lstsq(plain[:, own], relative[:, own], rcond=None)[0]
        low += [log_nmse.min() - 7.0, *(e.low for e in term.exponents)]
        high += [log_nmse.max() + 5.0, *(e.high for e in term.exponents)]
    return Problem(relative, law.term_of, np.array(low), np.array(high), join=law.join), to_raw


def _starts(problem: Problem, log_nmse: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Starts [count, coefficients]: random exponents, amplitudes by NNLS on relative errors."""
    first, terms = problem.amplitudes, len(problem.amplitudes)
    starts = rng.uniform(problem.low / 2, problem.high / 2, size=(count, len(problem.low)))
    starts[:, first] = 0.0
    for start in starts:
        logs = np.stack([problem.design[:, problem.term_of == j] @ start[problem.term_of == j]
                         for j in range(terms)], axis=1)  # fmt: skip
        powers, _ = nnls(np.exp(problem.join * (logs - log_nmse[:, None])), np.ones(len(log_nmse)))
        amplitudes = np.maximum(powers, 1e-300) ** (1 / problem.join)
        # An amplitude of zero would have no gradient: such a term starts at a hundredth of the mean instead.
        start[first] = np.log(np.maximum(amplitudes, 0.01 * np.exp(log_nmse.mean())))
    return starts


def draw_counts(
    items: int, bootstraps: int, enough: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """How often each item is drawn in each resample [bootstraps, items], and how many resamples for which
    `enough` (counts [m, items] -> bool [m]) did not hold were drawn again."""
    chances = np.full(items, 1 / items)
    counts = rng.multinomial(items, chances, size=bootstraps)
    redrawn = 0
    while len(bad := np.flatnonzero(~enough(counts))):
        redrawn += len(bad)
        counts[bad] = rng.multinomial(items, chances, size=len(bad))
    return counts, redrawn
