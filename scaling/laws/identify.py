"""How well points determine the coefficients of a law: correlations, conditioning, bounds, the profile of the floor."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import f as f_distribution

from saescale.scaling.laws.huber import Problem, minimise
from saescale.scaling.laws.law import Law

_VALUES = 25
_ROBUST = 1.345  # Huber's width in standard deviations at which 95 % of least squares' efficiency is kept
_LEAST_SCALE = 1e-6
_NO_SHARE = 1e-6
_NEAR = 1e-6
_TAIL = 0.025
_STEEPEST = 100.0  # ln of an amplitude, beyond which squares of it are no numbers


@dataclass(frozen=True)
class Conditioning:
    """Condition numbers of J^T J at the best fit, J the derivatives of ln L, and the correlations that go with it.

    `coefficients`: with the coefficients of the formula, all together. `projected`: of what is searched, the exponents
    at the centre of the data with the amplitudes projected out. `correlation` [coefficients, coefficients]: of the
    formula's coefficients, from the inverse of J^T J.
    """

    coefficients: float
    projected: float
    correlation: np.ndarray

    def document(self, names: tuple[str, ...]) -> dict[str, Any]:
        """As in fits.json; a number that is not finite is null."""
        return {
            "condition_number": {"coefficients": _finite(self.coefficients), "projected": _finite(self.projected)},
            "correlation": {"names": list(names), "matrix": [[_finite(v) for v in row] for row in self.correlation]},
        }


def condition(law: Law, problem: Problem, centred: np.ndarray, to_raw: np.ndarray) -> Conditioning:
    """Of a fit at `centred` [coefficients], the coordinates of `problem`; `to_raw` takes them to raw ones (law.py)."""
    _, jacobian = problem.slopes(centred)
    raw = to_raw @ centred
    # d ln L / d reported: amplitudes are reported as such unless they are logarithms.
    scale = np.ones(len(raw))
    for first, term in zip(problem.amplitudes, law.terms, strict=True):
        if not term.logarithmic:
            scale[first] = np.exp(np.clip(-raw[first], -_STEEPEST, _STEEPEST))
        for offset, exponent in enumerate(term.exponents, 1):
            scale[first + offset] = exponent.sign
    reported = jacobian @ np.linalg.inv(to_raw) * scale
    amplitudes, _ = np.linalg.qr(jacobian[:, problem.amplitudes])
    searched = jacobian[:, problem.exponents]
    searched = searched - amplitudes @ (amplitudes.T @ searched)
    # Correlations do not depend on units; columns of one length keep the inverse within what float64 can tell.
    unit = reported / np.maximum(np.linalg.norm(reported, axis=0), 1e-300)
    covariance = np.linalg.pinv(unit.T @ unit, rcond=1e-13)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    correlation = np.clip(covariance / np.outer(spread, spread), -1.0, 1.0)
    return Conditioning(_condition_number(reported), _condition_number(searched), correlation)


class Bound(NamedTuple):
    """A coefficient on a bound, in what the formula calls it; `value`: its bound there, at the centre of the data.
    `interval_only`: the best fit is inside, an end of the 95 % interval is not."""

    name: str
    value: float
    interval_only: bool


def bounds_reached(law: Law, problem: Problem, best: np.ndarray, draws: np.ndarray) -> tuple[Bound, ...]:
    """The exponents on their bounds, of the best fit [coefficients] and of the bootstrap's [bootstraps, coefficients],
    both in the coordinates of `problem`. A term that is next to nothing everywhere has no exponent to speak of, nor has
    in the bootstrap any but the first: where a floor is not determined, a warning says that already."""
    best, draws = law.ordered(best), law.ordered(draws)
    value = problem.log_value(best)
    names = [exponent for term in law.terms for exponent in (None, *term.exponents)]
    found = []
    for i in problem.exponents:
        own, exponent = problem.term_of == problem.term_of[i], names[i]
        assert exponent is not None
        if (problem.design[:, own] @ best[own] - value).max() < np.log(_NO_SHARE):
            continue
        slack = _NEAR * (problem.high[i] - problem.low[i])
        for bound in (problem.low[i], problem.high[i]):
            first = len(draws) and problem.term_of[i] == 0
            share = float(np.mean(np.abs(draws[:, i] - bound) <= slack)) if first else 0.0
            on_it = abs(best[i] - bound) <= slack
            if on_it or share > _TAIL:
                found.append(Bound(exponent.name, float(exponent.sign * bound), not on_it))
    return tuple(found)


@dataclass(frozen=True)
class Profile:
    """The irreducible term held at each of `floor` (nmse at the centre of the data), all else fitted: [values] each.

    `exponent` is the local exponent there of the law's first column that the first term has, `ratio` the loss beyond
    the best fit's in units in which 95 % of samples stay below `limit`. The interval of the floor is where it does:
    [low, high], with `high` None where it is open above, that is, where the highest floor that could be below all
    points is still inside.
    """

    floor: np.ndarray
    exponent: np.ndarray
    rms_log_residual: np.ndarray
    ratio: np.ndarray
    limit: float
    low: float
    high: float | None

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        columns = {name: getattr(self, name) for name in ("floor", "exponent", "rms_log_residual", "ratio")}
        rows = [{name: float(values[i]) for name, values in columns.items()} for i in range(len(self.floor))]
        return {"low": self.low, "high": self.high, "limit": self.limit, "values": rows}


def profile_floor(law: Law, problem: Problem, centred: np.ndarray, log_y: np.ndarray) -> Profile | None:
    """The profile likelihood of the last term at the centre of the data; None for a law of one term.

    The likelihood is Huber's with a width of 1.345 robust standard deviations: the fit's own width of 1e-3 makes it
    a sum of absolute residuals, whose ratio has no scale of its own. Its ratio is compared with the F distribution
    (Huber and Ronchetti, Robust Statistics, 2009, 13.2), which allows for the few degrees of freedom.
    """
    free = len(log_y) - len(centred)
    if len(law.terms) < 2 or free < 1:
        return None
    last = problem.amplitudes[-1]
    residuals = problem.log_value(centred) - log_y
    scale = max(1.4826 * float(np.median(np.abs(residuals))) * np.sqrt(len(log_y) / free), _LEAST_SCALE)
    problem = replace(problem, delta=_ROBUST * scale)
    best, lowest = minimise(problem, centred[None], log_y, np.ones(len(log_y)))
    slopes = np.clip(problem.log_value(best[0]) - log_y, -problem.delta, problem.delta)
    unit = float(slopes @ slopes) / free / max(float(np.mean(np.abs(slopes) < problem.delta)), 0.1)
    limit = float(f_distribution.ppf(0.95, 1, free))
    # From no floor to one as high as the lowest point, then closer where the interval ends.
    top = float(np.exp(log_y.min())) * 1.02
    floors = np.unique([*np.linspace(0.0, top, _VALUES), float(np.exp(best[0, last]))])
    fits, loss = _hold(problem, best[0], log_y, floors)
    inside = 2 * (loss - lowest[0]) / unit <= limit
    edges = np.flatnonzero(inside[:-1] != inside[1:])
    floors = np.unique(np.concatenate([floors, *(np.linspace(floors[i], floors[i + 1], 8) for i in edges)]))
    fits, loss = _hold(problem, best[0], log_y, floors)
    ratio = np.maximum(2 * (loss - min(lowest[0], loss.min())) / unit, 0.0)
    within = floors[ratio <= limit]
    rms = np.sqrt(np.mean((problem.log_value(fits) - log_y) ** 2, axis=1))
    high = None if ratio[-1] <= limit else float(within.max())
    return Profile(floors, fits[:, _lead(law)], rms, ratio, limit, low=float(within.min()), high=high)


def _lead(law: Law) -> int:
    """The coefficient that is the local exponent at the centre of the first of the law's columns in its first term."""
    exponents = law.terms[0].exponents
    columns = [column for column in law.columns if column in law.leading]
    # Of a product of columns only the others' logarithms, which are 0 there, would be left: a power alone comes first.
    own = [i for column in columns for i, e in enumerate(exponents) if e.columns == (column,)]
    return 1 + (own[0] if own else 0)


def _hold(problem: Problem, best: np.ndarray, log_y: np.ndarray, floors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fits [floors, coefficients], losses [floors]) with the last amplitude held at each of `floors`.

    All start from the best fit, and then from what their neighbours found, where a floor far off leads elsewhere.
    """
    last, ones = problem.amplitudes[-1], np.ones(len(log_y))
    bounds = np.tile(problem.low, (len(floors), 1)), np.tile(problem.high, (len(floors), 1))
    for bound in bounds:
        bound[:, last] = np.log(np.maximum(floors, np.exp(problem.low[last])))
    held = replace(problem, low=bounds[0], high=bounds[1])
    fits, loss = minimise(held, np.tile(best, (len(floors), 1)), log_y, ones)
    for shift in (1, -1):
        again, lost = minimise(held, np.roll(fits, shift, axis=0), log_y, ones)
        better = lost < loss
        fits[better], loss[better] = again[better], lost[better]
    return fits, loss


def _condition_number(jacobian: np.ndarray) -> float:
    """Of J^T J; infinite where a coefficient has no effect."""
    values = np.linalg.svd(jacobian, compute_uv=False)
    return float((values[0] / values[-1]) ** 2) if len(values) and values[-1] > 0 else float("inf")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
