"""Minimises summed Huber losses of log residuals, many fits of one law at a time.

By variable projection (Golub and Pereyra 1973): given the exponents a law is linear in its amplitudes, so that only
the exponents are searched and the amplitudes follow by non-negative least squares. All fits of a batch (starts of a
multi-start, resamples of a bootstrap) move together through numpy, so that a thousand bootstrap fits take about a
second.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, minimize

from saescale.scaling.laws.law import log_sum, log_total

DELTA = 1e-3
_STALLED = 1e-7
_PATIENCE = 4


@dataclass(frozen=True)
class Problem:
    """What is fitted: `design` [points, coefficients], `term_of` [coefficients], `low` and `high` [coefficients] or
    [fits, coefficients] (the coefficients stay within; equal ones hold a coefficient), the Huber width of the log
    residuals, and how the terms are joined (see Law.join)."""

    design: np.ndarray
    term_of: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: float = DELTA
    join: float = 1.0

    @cached_property
    def amplitudes(self) -> np.ndarray:
        """The index of each term's log amplitude, [terms]: its first coefficient."""
        return np.array([np.flatnonzero(self.term_of == j)[0] for j in range(int(self.term_of[-1]) + 1)])

    @cached_property
    def exponents(self) -> np.ndarray:
        """The indices of the coefficients that are searched."""
        return np.setdiff1d(np.arange(len(self.term_of)), self.amplitudes)

    def log_value(self, raw: np.ndarray) -> np.ndarray:
        """ln L [..., points] at raw [..., coefficients]."""
        return log_total(raw, self.design, self.term_of, self.join)

    def slopes(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln L [..., points], its derivative [..., points, coefficients]) at raw [..., coefficients]."""
        return log_sum(raw, self.design, self.term_of, self.join)

    def of(self, fits: np.ndarray) -> "Problem":
        """The problem of some of the fits [indices], where each has its own bounds."""
        return self if self.low.ndim == 1 else replace(self, low=self.low[fits], high=self.high[fits])


def losses(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of Huber losses of each fit: [fits], for raw [fits, coefficients], log_y and weights
    [fits, points] (or broadcastable)."""
    residuals = problem.log_value(raw) - log_y
    return (weights * _huber(residuals, problem.delta)).sum(axis=-1)


def minimise(
    problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray, iterations: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Local minima from the starts `raw` [fits, coefficients]: (coefficients of the same shape, losses [fits]).

    Levenberg-Marquardt in the exponents on iteratively reweighted squares: each step solves the weighted normal
    equations of one quadratic that touches the Huber loss from above, with the amplitudes projected out, solves the
    amplitudes again at the new exponents, and is kept only where the loss falls.
    """
    fits, points = len(raw), len(problem.design)
    raw = np.clip(raw, problem.low, problem.high)
    log_y = np.broadcast_to(log_y, (fits, points))
    weights = np.broadcast_to(weights, (fits, points))
    best = losses(problem, raw, log_y, weights)
    damping = np.full(fits, 1e-3)
    stalled = np.zeros(fits, dtype=int)
    active = np.arange(fits)
    for _ in range(iterations):
        if not len(active):
            break
        now, y, w = raw[active], log_y[active], weights[active]
        bounded = problem.of(active)
        trial = np.clip(now + _step(bounded, now, y, w, damping[active]), bounded.low, bounded.high)
        loss = losses(problem, trial, y, w)
        projected = solve_amplitudes(bounded, trial, y, w)
        projected_loss = losses(problem, projected, y, w)
        gained = projected_loss < loss
        trial[gained], loss[gained] = projected[gained], projected_loss[gained]
        better = loss < best[active]
        gain = (best[active] - loss) / np.maximum(best[active], 1e-300)
        raw[active[better]] = trial[better]
        best[active[better]] = loss[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 6)
        stalled[active] = np.where(better & (gain > _STALLED), 0, stalled[active] + 1)
        active = active[(stalled[active] < _PATIENCE) & (damping[active] < 1e12) & (best[active] > 1e-24)]
    return raw, best


def solve_amplitudes(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`raw` [fits, coefficients] with the amplitudes that fit best at its exponents, as log amplitudes within bounds.

    Log residuals are linearised about `raw`, in which amplitudes (to the power `join`) are linear: non-negative least
    squares with the weights of `_majorant`. An amplitude of zero becomes the lowest that the bounds allow.
    """
    value = problem.log_value(raw)
    residuals = value - log_y
    logs = [(raw[:, own] @ problem.design[:, own].T) for own in _terms(problem)]
    # Each term's share of the prediction [fits, points, terms]; scaling all shares of a term scales its amplitude.
    shares = np.exp(problem.join * (np.stack(logs, axis=-1) - value[..., None]))
    target = 1.0 - problem.join * residuals
    weighted = shares * _majorant(problem, residuals, weights)[..., None]
    normal = weighted.transpose(0, 2, 1) @ shares
    scales = _nnls(normal, (weighted * target[..., None]).sum(axis=1))
    solved = raw.copy()
    solved[:, problem.amplitudes] += np.log(np.maximum(scales, 1e-300)) / problem.join
    return np.clip(solved, problem.low, problem.high)


def polish(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One fit [coefficients] brought to its minimum by L-BFGS-B with exact gradients."""

    def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, jacobian = problem.slopes(x)
        residuals = value - log_y
        slope = weights * np.clip(residuals, -problem.delta, problem.delta)
        # In units of delta^2, or the default tolerances would end the search early.
        scale = problem.delta**-2
        return float((weights * _huber(residuals, problem.delta)).sum() * scale), slope @ jacobian * scale

    found = minimize(
        loss_and_gradient,
        raw,
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(problem.low, problem.high),
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30},
    )
    return np.asarray(found.x) if found.fun <= loss_and_gradient(raw)[0] else raw


def _terms(problem: Problem) -> list[np.ndarray]:
    return [problem.term_of == j for j in range(len(problem.amplitudes))]


def _majorant(problem: Problem, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of the squares that touch the Huber loss from above at these residuals."""
    return weights / np.maximum(np.abs(residuals) / problem.delta, 1.0)


def _step(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """The step of all coefficients [fits, coefficients]. Only exponents are damped: with the amplitudes free to
    follow, that is the step of variable projection with Kaufman's Jacobian."""
    value, jacobian = problem.slopes(raw)
    residuals = value - log_y
    weighted = (jacobian * _majorant(problem, residuals, weights)[..., None]).transpose(0, 2, 1)
    gradient = (weighted @ residuals[..., None])[..., 0]
    normal = weighted @ jacobian
    # A coefficient at its bound that the loss pushes outwards stays out of the step.
    held = ((raw <= problem.low) & (gradient > 0)) | ((raw >= problem.high) & (gradient < 0))
    normal = np.where(held[:, :, None] | held[:, None, :], 0.0, normal)
    gradient = np.where(held, 0.0, gradient)
    diagonal = np.einsum("bii->bi", normal)
    largest = diagonal.max(axis=1, keepdims=True) + 1e-300
    ridge = damping[:, None] * np.maximum(diagonal, 1e-10 * largest)
    ridge[:, problem.amplitudes] = np.minimum(ridge[:, problem.amplitudes], 1e-10 * largest)
    normal = normal + np.eye(raw.shape[1]) * np.where(held, largest, ridge + 1e-14 * largest)[:, None, :]
    return -np.linalg.solve(normal, gradient[..., None])[..., 0]


def _nnls(normal: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Non-negative least squares of a batch from its normal equations [fits, terms, terms] and [fits, terms].

    Laws have two or three terms: every set of positive ones is solved and the best feasible one kept, which is exact.
    """
    fits, terms = moments.shape
    best, lowest = np.zeros((fits, terms)), np.zeros(fits)
    for size in range(terms, 0, -1):
        for chosen in map(list, combinations(range(terms), size)):
            block = normal[:, chosen][:, :, chosen]
            ridge = 1e-14 * np.einsum("bii->bi", block).max(axis=1) + 1e-300
            block = block + np.eye(size) * ridge[:, None, None]
            solution = np.linalg.solve(block, moments[:, chosen, None])[..., 0]
            objective = -(solution * moments[:, chosen]).sum(axis=1)
            better = (solution >= 0).all(axis=1) & (objective < lowest)
            rows = np.flatnonzero(better)
            best[rows] = 0.0
            best[rows[:, None], chosen] = solution[rows]
            lowest[rows] = objective[rows]
        if size == terms and (best > 0).all():
            break
    return best


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))
