"""Cells that lead a fit by themselves, and cells that no other agrees with."""

import numpy as np

from saescale.scaling.laws.estimate import chunks
from saescale.scaling.laws.huber import Problem, losses, minimise

_CLOSER = 6.0
_SPARE = 3
_MOST = 400  # of more cells none leads a fit of absolute residuals
_LEAST = 1e-5
_FAR = 12.0  # above what normal scatter gave in any of 144 simulated sweeps of 8 to 20 cells
_NOTICED = 0.05  # of ln nmse


def leading_cells(problem: Problem, best: np.ndarray, log_nmse: np.ndarray) -> np.ndarray:
    """The cells without any one of which all others are met at least six times as closely [their indices], the one
    that leads most first.

    A fit of absolute residuals passes by a wrong cell unless nothing stands against it, as at a corner of the grid.
    """
    cells = len(log_nmse)
    if not len(best) + _SPARE <= cells <= _MOST:
        return np.empty(0, dtype=int)
    ratio = np.empty(cells)
    for part in chunks(cells, cells**2):
        left = np.arange(cells)[part]
        weights = np.ones((len(left), cells))
        weights[np.arange(len(left)), left] = 0.0
        # Also from the middle of the bounds: what a wrong cell has drawn to a bound may not find its way back.
        middle = best.copy()
        middle[problem.exponents] = 0.0
        without = np.full(len(left), np.inf)
        for start in (best, middle):
            _, loss = minimise(problem, np.tile(start, (len(left), 1)), log_nmse, weights)
            without = np.minimum(without, loss)
        there = losses(problem, np.tile(best, (len(left), 1)), log_nmse, weights)
        # Below the Huber width losses are of squares, and what is left there is no disagreement.
        least = _LEAST * problem.delta * cells
        ratio[left] = (there + least) / (without + least)
    order = np.argsort(-ratio, kind="stable")
    return order[ratio[order] >= _CLOSER]


def far_cells(residuals: np.ndarray, coefficients: int) -> np.ndarray:
    """The cells [their indices] that a fit passes by, the farthest first: their residuals of ln nmse [cells] are at
    least twelve times those of the others."""
    off = np.abs(residuals)
    # A fit of absolute residuals meets as many cells exactly as it has coefficients.
    others = np.sort(off)[coefficients:]
    if len(others) < _SPARE:
        return np.empty(0, dtype=int)
    order = np.argsort(-off, kind="stable")
    return order[off[order] >= max(_NOTICED, _FAR * float(np.median(others)))]
