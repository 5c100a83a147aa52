"""Minimises summed Huber losses of log residuals, many fits of one law at a time.

All fits of a batch (starts of a multi-start, resamples of a bootstrap) move together through numpy, so that a
thousand bootstrap fits take about a second.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, minimize

from scaling.laws import log_sum

DELTA = 1e-3
_STALLED = 1e-7
_PATIENCE = 4


class Problem(NamedTuple):
    """What is fitted: `design` [points, coefficients], `term_of` [coefficients], `low` and `high`
    [coefficients] (the coefficients stay within), and the Huber width of the log residuals."""

    design: np.ndarray
    term_of: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: float = DELTA


def losses(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of Huber losses of each fit: [fits], for raw [fits, coefficients], log_y and weights
    [fits, points] (or broadcastable)."""
    residuals = log_sum(raw, problem.design, problem.term_of)[0] - log_y
    return (weights * _huber(residuals, problem.delta)).sum(axis=-1)


def minimise(
    problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray, iterations: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Local minima from the starts `raw` [fits, coefficients]: (coefficients of the same shape, losses [fits]).

    Levenberg-Marquardt on iteratively reweighted squares: each step solves the weighted normal equations of
    one quadratic that touches the Huber loss from above, and is kept only where the loss falls.
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
        step = _step(problem, now, y, w, damping[active])
        trial = np.clip(now + step, problem.low, problem.high)
        loss = losses(problem, trial, y, w)
        better = loss < best[active]
        gain = (best[active] - loss) / np.maximum(best[active], 1e-300)
        raw[active[better]] = trial[better]
        best[active[better]] = loss[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 6)
        stalled[active] = np.where(better & (gain > _STALLED), 0, stalled[active] + 1)
        active = active[(stalled[active] < _PATIENCE) & (damping[active] < 1e12) & (best[active] > 1e-24)]
    return raw, best


def polish(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One fit [coefficients] brought to its minimum by L-BFGS-B with exact gradients."""

    def loss_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, jacobian = log_sum(x, problem.design, problem.term_of)
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


def _step(problem: Problem, raw: np.ndarray, log_y: np.ndarray, weights: np.ndarray, damping: np.ndarray) -> np.ndarray:
    value, jacobian = log_sum(raw, problem.design, problem.term_of)
    residuals = value - log_y
    majorant = weights / np.maximum(np.abs(residuals) / problem.delta, 1.0)
    weighted = (jacobian * majorant[..., None]).transpose(0, 2, 1)
    gradient = (weighted @ residuals[..., None])[..., 0]
    normal = weighted @ jacobian
    # A coefficient at its bound that the loss pushes outwards stays out of the step.
    held = ((raw <= problem.low) & (gradient > 0)) | ((raw >= problem.high) & (gradient < 0))
    normal = np.where(held[:, :, None] | held[:, None, :], 0.0, normal)
    gradient = np.where(held, 0.0, gradient)
    diagonal = np.einsum("bii->bi", normal)
    largest = diagonal.max(axis=1, keepdims=True) + 1e-300
    ridge = damping[:, None] * np.maximum(diagonal, 1e-10 * largest) + 1e-14 * largest
    normal = normal + np.eye(raw.shape[1]) * np.where(held, largest, ridge)[:, None, :]
    return -np.linalg.solve(normal, gradient[..., None])[..., 0]


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))
