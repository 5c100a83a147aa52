"""What a form misses, apart from the scatter of equal cells: where seeds repeat, the two can be told apart."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution

from saescale.scaling.laws.huber import Problem, minimise
from saescale.scaling.tables import Table
from saescale.storage.columns import COLUMNS

_LEVEL = 0.05
_SQUARES = 10.0  # of ln nmse: a Huber width that no residual reaches, which is least squares
_EXACT = 1e-8
_NAMES = ("cell_id", "seed")  # of what says what a cell is, those that may differ between equal cells


@dataclass(frozen=True)
class LackOfFit:
    """An F-test of lack of fit (Draper and Smith, Applied Regression Analysis, 1998, 2.1) on ln nmse.

    `pure` is the standard deviation between equal cells, `missed` that of what the form misses from one kind of cell to
    the next; `free` are the degrees of freedom of the two. `kinds` of cells there are, `repeated` of them with several
    cells.
    """

    f: float
    free: tuple[int, int]
    p: float
    pure: float
    missed: float
    kinds: int
    repeated: int

    @property
    def significant(self) -> bool:
        """Whether the form misses more than chance allows, at 5 %."""
        return self.p < _LEVEL

    @property
    def noise(self) -> float:
        """Standard deviation of ln nmse of one cell about the law where the form misses something."""
        return float(np.hypot(self.pure, self.missed))

    @property
    def shared(self) -> float:
        """The share of a cell's variance about the law that another seed of its kind has too, and cannot narrow."""
        return self.missed**2 / self.noise**2 if self.significant else 0.0

    @property
    def said(self) -> tuple[str, ...]:
        """The test; and where the form misses something, what that means and what to do, alike for every law."""
        test = f"F = {self.f:.3g} at {self.free[0]} and {self.free[1]} degrees of freedom, p = {self.p:.2g}"
        if not self.significant:
            return (
                f"no lack of fit is seen ({test}): what the law leaves over is the scatter of equal cells, "
                f"{self.pure:.2%}, and intervals go by that",
            )
        return (
            f"lack of fit ({test}): equal cells scatter by {self.pure:.2%}, and the law misses each kind of cell by a "
            f"further {self.missed:.2%}",
            "with a lack of fit intervals are widened by it and seeds count as one observation, so that more of them "
            "narrow nothing: add n and k, or try another form (n_flattens and n_steepens show a bend in n)",
        )

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        return {
            "F": self.f, "degrees_of_freedom": list(self.free), "p": self.p, "significant": self.significant,
            "sd_of_equal_cells": self.pure, "sd_missed": self.missed, "kinds": self.kinds, "repeated": self.repeated,
            "words": "; ".join(self.said),
        }  # fmt: skip


def kinds_of(cells: Table, columns: Iterable[str]) -> np.ndarray | None:
    """Which cells are equal but for their seed, as numbers [cells]; None where no two are.

    Equal in `columns`, in tokens and in everything that says what a cell is (storage/columns.py). Rows of one seed are
    none of them repeats: in what they differ the table does not say.
    """
    names = [c.name for c in COLUMNS.values() if c.role == "spec" and c.name not in _NAMES]
    names = [name for name in dict.fromkeys((*columns, "tokens", *names)) if name in cells]
    levels = [np.unique(cells[name], return_inverse=True)[1] for name in names]
    _, kinds = np.unique(np.stack(levels, axis=1), axis=0, return_inverse=True)
    kinds = np.ravel(kinds)
    if "seed" in cells:
        pairs = np.stack([kinds, np.unique(cells["seed"], return_inverse=True)[1]], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        alone = np.isin(kinds, found[counts > 1, 0])
        kinds = np.where(alone, kinds.max() + 1 + np.arange(len(kinds)), kinds)
    kinds = np.unique(kinds, return_inverse=True)[1]
    return kinds if len(kinds) > kinds.max() + 1 else None


def f_test(problem: Problem, best: np.ndarray, log_nmse: np.ndarray, kinds: np.ndarray) -> LackOfFit | None:
    """The test of a fit at `best` [coefficients] to ln nmse [cells]; by least squares, since F is of squares.

    None where no kind repeats, where there are no more kinds than coefficients, and where equal cells measure the same.
    """
    sizes = np.bincount(kinds)
    squares = replace(problem, delta=_SQUARES)
    found, loss = minimise(squares, best[None], log_nmse, np.ones(len(log_nmse)))
    free = len(sizes) - _used(problem, found[0]), len(log_nmse) - len(sizes)
    scatter = log_nmse - (np.bincount(kinds, log_nmse) / sizes)[kinds]
    if min(free) < 1 or float(np.abs(scatter).max()) < _EXACT:
        return None
    pure = float(scatter @ scatter) / free[1]
    missed = max(2 * float(loss[0]) - float(scatter @ scatter), 0.0) / free[0]
    each = (len(log_nmse) - float(sizes @ sizes) / len(log_nmse)) / max(len(sizes) - 1, 1)
    return LackOfFit(
        missed / pure, free, float(f_distribution.sf(missed / pure, *free)), float(np.sqrt(pure)),
        float(np.sqrt(max(missed - pure, 0.0) / each)), len(sizes), int((sizes > 1).sum()),
    )  # fmt: skip


def resampled_errors(
    lack: LackOfFit, residuals: np.ndarray, kinds: np.ndarray, bootstraps: int, rng: np.random.Generator
) -> np.ndarray:
    """Errors [bootstraps, cells] for a bootstrap where the form misses something: what all cells of a kind share, and
    each cell's own."""
    sizes = np.bincount(kinds)
    means = np.bincount(kinds, residuals) / sizes
    repeated = sizes[kinds] > 1
    own = ((residuals - means[kinds]) * np.sqrt(sizes / np.maximum(sizes - 1, 1))[kinds])[repeated]
    shared = smoothed(_scaled(means - means.mean(), lack.missed), (bootstraps, len(sizes)), rng)
    return shared[:, kinds] + smoothed(_scaled(own, lack.pure), (bootstraps, len(kinds)), rng)


def smoothed(pool: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draws from `pool` smoothed by a normal kernel of Silverman's width, with the pool's standard deviation (De
    Angelis, Hall and Young 1993)."""
    width = 1.06 * len(pool) ** -0.2
    scatter = pool.std() * rng.standard_normal(shape)
    return (rng.choice(pool, size=shape) + width * scatter) / np.sqrt(1 + width**2)


def _scaled(pool: np.ndarray, deviation: float) -> np.ndarray:
    return pool * (deviation / max(float(pool.std()), 1e-300))


def _used(problem: Problem, found: np.ndarray) -> int:
    """How many coefficients the fit took: not those on a bound, nor those of a term that is switched off."""
    slack = 1e-6 * (problem.high - problem.low)
    held = (found <= problem.low + slack) | (found >= problem.high - slack)
    off = held[problem.amplitudes][problem.term_of]
    return int((~held & ~off).sum())
