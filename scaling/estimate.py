"""One law fitted to one set of points: several starts, a bootstrap, a hold-out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from scaling.huber import Problem, losses, minimise, polish
from scaling.laws import SYMBOLS, Law
from scaling.tables import number
from storage.errors import SaescaleError

STARTS = 64
HOLDOUT_BOOTSTRAPS = 200


class Resamples(NamedTuple):
    """Resampled data of a bootstrap: ln nmse and weights, [bootstraps, points] or broadcastable to it, and how
    many degenerate resamples were drawn again."""

    log_nmse: np.ndarray
    weights: np.ndarray
    redrawn: int


Resampler = Callable[[int, np.random.Generator], Resamples]


class Prediction(NamedTuple):
    """Predicted nmse and the 95 % interval of the law there (NaN without a bootstrap); [points] each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Fit:
    """A fitted law. `raw` [coefficients] and `draws` [bootstraps, coefficients] are raw coefficients (laws.py);
    `at` is what is held fixed, such as {"k": 32}; `columns` and `nmse` are the points, [points] each."""

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
    holdout: dict[str, object] | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def rms_log_residual(self) -> float:
        """Root mean square of ln predicted - ln measured over the points: 0.01 is about 1 % of nmse."""
        residuals = self.law.log_value(self.raw, self.columns) - np.log(self.nmse)
        return float(np.sqrt(np.mean(residuals**2)))

    def predict(self, columns: Mapping[str, np.ndarray]) -> Prediction:
        """The law at the points of `columns` ([points] each; those that the law names, FLOPs and tokens as in
        results.parquet)."""
        value = np.exp(self.law.log_value(self.raw, columns))
        if not len(self.draws):
            return Prediction(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        low, high = np.percentile(np.exp(self.law.log_value(self.draws, columns)), [2.5, 97.5], axis=0)
        return Prediction(value, low, high)

    def document(self) -> dict[str, object]:
        """This fit's entry in fits.json."""
        entry: dict[str, object] = {"law": self.law.name, "formula": self.law.formula, "at": dict(self.at)}
        entry["floor"] = self.law.has_floor
        reported, draws = self.law.to_reported(self.raw), self.law.to_reported(self.draws)
        entry["coefficients"] = {name: interval(reported[i], draws[:, i]) for i, name in enumerate(self.law.names)}
        if {"n_latents", "k"} <= set(self.law.columns):
            entry["exponent_of_n_at_k"] = {
                f"{k:g}": interval(
                    float(self.law.exponent_of(self.raw, "n_latents", {"k": k})),
                    self.law.exponent_of(self.draws, "n_latents", {"k": k}),
                )
                for k in np.unique(self.columns["k"])
            }
        return entry | {
            "points": len(self.nmse),
            "excluded": list(self.excluded),
            "rms_log_residual": self.rms_log_residual,
            "starts": {"tried": self.starts, "agree": self.agreeing},
            "bootstraps": {"fits": len(self.draws), "redrawn": self.redrawn},
            "holdout": self.holdout,
            "warnings": list(self.warnings),
        }


def interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """A value with its 95 % percentile interval over the bootstrap's draws (None where there are none)."""
    if not len(draws):
        return {"value": float(value), "low": None, "high": None}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def fit_law(
    law: Law,
    columns: Mapping[str, np.ndarray],
    nmse: np.ndarray,
    *,
    bootstraps: int = 1000,
    seed: int = 0,
    at: Mapping[str, float] | None = None,
    resampler: Resampler | None = None,
    excluded: tuple[str, ...] = (),
) -> Fit:
    """Fits `law` to nmse [points] at `columns` ([points] each).

    Minimises the summed Huber loss (delta = 1e-3) of the log residuals from 64 starts; each start draws the
    exponents and solves the amplitudes, in which a law is linear, by non-negative least squares. Intervals
    come from refits to `bootstraps` resamples, by default of the points (cells), deterministic in `seed`.

    Raises SaescaleError when the points are fewer than coefficients + 2 or a column takes too few values.

    The loss, summed over points and minimised from many starts, is that of Hoffmann et al. 2022 (2203.15556,
    approach 3), with nmse in place of the language model's loss.
    """
    columns = {c: np.asarray(columns[c], dtype=np.float64) for c in law.columns}
    if len(nmse) < len(law.names) + 2:
        raise SaescaleError(
            f"{len(nmse)} points for {len(law.names)} coefficients; it takes at least {len(law.names) + 2}. Add cells"
        )
    for column, values in columns.items():
        if len(np.unique(values)) < _levels(law):
            raise SaescaleError(
                f"{SYMBOLS[column]} takes {len(np.unique(values))} different values; "
                f"it takes at least {_levels(law)}. Add cells"
            )
    rng = np.random.default_rng(seed)
    log_nmse = np.log(nmse)
    ones = np.ones(len(nmse))
    problem, to_raw = _centred(law, columns, log_nmse)
    found, loss = minimise(problem, _starts(problem, log_nmse, rng), log_nmse, ones)
    best = polish(problem, found[np.argmin(loss)], log_nmse, ones)
    agreeing = int((loss <= 1.01 * losses(problem, best[None], log_nmse, ones)[0] + 1e-12).sum())
    draws, redrawn = np.empty((0, len(law.names))), 0
    if bootstraps:
        samples = (resampler or _resample_points(law, columns, log_nmse))(bootstraps, rng)
        draws, _ = minimise(problem, np.tile(best, (bootstraps, 1)), samples.log_nmse, samples.weights)
        redrawn = samples.redrawn
    return Fit(
        law, dict(at or {}), columns, np.asarray(nmse), to_raw @ best, draws @ to_raw.T, STARTS, agreeing,
        redrawn, excluded,
    )  # fmt: skip


def hold_out(fit: Fit, column: str, at_least: float, seed: int = 0) -> dict[str, object] | None:
    """What the law, fitted to the points with `column` < `at_least`, predicts for the others.

    `columns[column]` and `at_least` are in the column's unit. None when too few points remain for a fit.
    `log_error` is ln predicted - ln measured.
    """
    held = fit.columns[column] >= at_least
    rest = {c: v[~held] for c, v in fit.columns.items()}
    bootstraps = min(len(fit.draws), HOLDOUT_BOOTSTRAPS)
    try:
        refit = fit_law(fit.law, rest, fit.nmse[~held], bootstraps=bootstraps, seed=seed, at=fit.at)
    except SaescaleError:
        return None
    points = {c: v[held] for c, v in fit.columns.items()}
    prediction = refit.predict(points)
    errors = np.log(prediction.value) - np.log(fit.nmse[held])
    rows = []
    for i in range(int(held.sum())):
        row = {c: float(v[i]) for c, v in points.items()} | {
            "measured": float(fit.nmse[held][i]),
            "predicted": float(prediction.value[i]),
            "log_error": float(errors[i]),
        }
        if bootstraps:
            row |= {"low": float(prediction.low[i]), "high": float(prediction.high[i])}
        rows.append(row)
    return {
        "held_out": f"{SYMBOLS[column]} >= {number(at_least)}",
        "points": len(rows),
        "rms_log_error": float(np.sqrt(np.mean(errors**2))),
        "predictions": rows,
    }


def _levels(law: Law) -> int:
    """How many different values each column needs: two for a power, a third to tell it from another term."""
    return min(1 + len(law.terms), 3)


def _centred(law: Law, columns: Mapping[str, np.ndarray], log_nmse: np.ndarray) -> tuple[Problem, np.ndarray]:
    """The problem in logarithms relative to their means, and the matrix that takes its coefficients back.

    Centring takes the correlation between amplitudes and exponents out (and between beta and gamma), and
    gives bounds a meaning: they hold for the local exponents at the centre of the data.
    """
    logs = {c: np.log(v) for c, v in columns.items()}
    plain = law.design(logs)
    centred = law.design({c: v - v.mean() for c, v in logs.items()})
    to_raw = np.zeros((len(law.names), len(law.names)))
    low, high = [], []
    for j, term in enumerate(law.terms):
        own = np.flatnonzero(law.term_of == j)
        to_raw[np.ix_(own, own)] = np.linalg.lstsq(plain[:, own], centred[:, own], rcond=None)[0]
        low += [log_nmse.min() - 7.0, *(e.low for e in term.exponents)]
        high += [log_nmse.max() + 5.0, *(e.high for e in term.exponents)]
    return Problem(centred, law.term_of, np.array(low), np.array(high)), to_raw


def _starts(problem: Problem, log_nmse: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Starts [STARTS, coefficients]: random exponents, amplitudes by NNLS on relative errors."""
    terms = int(problem.term_of[-1]) + 1
    first = np.array([np.flatnonzero(problem.term_of == j)[0] for j in range(terms)])
    starts = rng.uniform(problem.low / 2, problem.high / 2, size=(STARTS, len(problem.low)))
    starts[:, first] = 0.0
    for start in starts:
        logs = np.stack([problem.design[:, problem.term_of == j] @ start[problem.term_of == j]
                         for j in range(terms)], axis=1)  # fmt: skip
        amplitudes, _ = nnls(np.exp(logs - log_nmse[:, None]), np.ones(len(log_nmse)))
        # An amplitude of zero would have no gradient: such a term starts at a hundredth of the mean instead.
        start[first] = np.log(np.maximum(amplitudes, 0.01 * np.exp(log_nmse.mean())))
    return starts


def _resample_points(law: Law, columns: Mapping[str, np.ndarray], log_nmse: np.ndarray) -> Resampler:
    levels = [np.unique(v, return_inverse=True)[1] for v in columns.values()]
    points = len(levels[0])

    def enough(weights: np.ndarray) -> np.ndarray:
        chosen = weights > 0
        good = chosen.sum(axis=1) >= len(law.names)
        for level in levels:
            seen = np.stack([chosen[:, level == v].any(axis=1) for v in range(level.max() + 1)], axis=1)
            good &= seen.sum(axis=1) >= _levels(law)
        return good

    def resample(bootstraps: int, rng: np.random.Generator) -> Resamples:
        weights, redrawn = draw_counts(points, bootstraps, enough, rng)
        return Resamples(log_nmse, weights, redrawn)

    return resample


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
