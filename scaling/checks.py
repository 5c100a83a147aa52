"""Warnings in words: where the data cannot carry what a law claims."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from scaling.estimate import Fit
from scaling.laws import SYMBOLS
from scaling.tables import Table, number

_RANGE = 8.0
_DEAD = 0.1
_FALL = 0.02
_TRADED = 0.9
_WIDE = 0.25
_SMALL_FLOOR = 0.02


@dataclass(frozen=True)
class _Cells:
    labels: list[str]

    def __str__(self) -> str:
        shown = "; ".join(self.labels[:4])
        return shown + (f"; and {len(self.labels) - 4} more" if len(self.labels) > 4 else "")


def data_warnings(results: Table, curves: Table | None) -> list[str]:
    """What is wrong with the cells, whatever law is fitted to them."""
    warnings = []
    for column, symbol in (("n_latents", "N"), ("k", "k")):
        low, high = results[column].min(), results[column].max()
        if high / low < _RANGE:
            warnings.append(
                f"{symbol} spans only a factor of {high / low:.3g} ({number(low)} to {number(high)}): exponents from "
                f"less than a factor of {_RANGE:g} are local slopes, not laws"
            )
    if "d_model" in results:
        near = np.unique(results["k"][results["k"] > results["d_model"] / 4])
        if len(near):
            values = ", ".join(f"{k:g}" for k in near)
            warnings.append(
                f"k = {values} is above d_model / 4 = {results['d_model'][0] / 4:g}: the law holds for k "
                "much smaller than d_model"
            )
    if "dead_fraction" in results:
        rows = np.flatnonzero(results["dead_fraction"] > _DEAD)
        if len(rows):
            cells = _Cells(
                [
                    f"N = {number(results['n_latents'][r])}, k = {results['k'][r]:g}: {results['dead_fraction'][r]:.0%}"
                    for r in rows
                ]
            )
            warnings.append(
                f"{len(rows)} cells have more than {_DEAD:.0%} dead latents ({cells}): their effective N "
                "is smaller, which flattens the law in N"
            )
    for k in np.unique(results["k"]):
        own = results["k"] == k
        sizes = np.unique(results["n_latents"][own])
        means = [np.log(results["nmse"][own & (results["n_latents"] == n)]).mean() for n in sizes]
        rises = [f"{number(a)} to {number(b)}" for a, b, fall in zip(sizes[:-1], sizes[1:], np.diff(means), strict=True)
                 if fall >= 0]  # fmt: skip
        if rises:
            warnings.append(
                f"nmse does not fall with N at k = {k:g} (from N = {'; '.join(rises)}): those cells are "
                "undertrained or too noisy for a law"
            )
    if curves is not None and "cell_id" in results:
        falling = _unconverged(results, curves)
        if falling:
            warnings.append(
                f"{len(falling)} cells are not converged, their held-out nmse still fell by more than "
                f"{_FALL:.0%} over the last quarter of training ({_Cells(falling)}): L(N, k) describes "
                "this budget of tokens, not convergence"
            )
    return warnings


def fit_warnings(fit: Fit) -> list[str]:
    """What the fit itself says about how well its coefficients are determined."""
    law, warnings = fit.law, []
    if fit.agreeing < 2:
        warnings.append(f"only {fit.agreeing} of {fit.starts} starts reach the best fit: it may not be the global one")
    if not len(fit.draws):
        return warnings
    if {"n_latents", "k"} <= set(law.columns):
        flat = []
        for k in np.unique(fit.columns["k"]):
            low, high = np.percentile(law.exponent_of(fit.draws, "n_latents", {"k": k}), [2.5, 97.5])
            if low <= 0 <= high:
                flat.append(f"{k:g}")
        if flat:
            warnings.append(f"the exponent of n cannot be told from 0 at k = {', '.join(flat)}")
    if len(law.terms) > 1:
        warnings += _floor_warnings(fit)
    return warnings


def unstable_exponent(with_floor: Fit, without: Fit) -> str | None:
    """In words, when a floor changes the exponent by a quarter or more while the residual hardly changes."""
    a, b = (f.law.to_reported(f.raw)[1] for f in (with_floor, without))
    similar = without.rms_log_residual < 1.5 * with_floor.rms_log_residual + 1e-3
    if similar and abs(a - b) > _WIDE * abs(b):
        return (
            f"floor and exponent are not told apart: the exponent is {a:.3g} with and {b:.3g} without the irreducible "
            f"term at nearly the same residual ({with_floor.rms_log_residual:.2g} and "
            f"{without.rms_log_residual:.2g})"
        )
    return None


def _floor_warnings(fit: Fit) -> list[str]:
    law = fit.law
    centre = {c: float(np.exp(np.log(v).mean())) for c, v in fit.columns.items()}
    design = law.design({c: np.array([np.log(v)]) for c, v in centre.items()})[0]
    own = law.term_of == len(law.terms) - 1
    floor = fit.draws[:, own] @ design[own]
    total = law.log_value(fit.draws, {c: np.array([v]) for c, v in centre.items()})[:, 0]
    low, high = np.percentile(np.exp(floor - total), [2.5, 97.5])
    warnings = []
    if low < _SMALL_FLOOR:
        warnings.append(
            f"the data do not determine the irreducible term: at their centre it is between {low:.0%} and "
            f"{high:.0%} of nmse"
        )
    column = law.columns[0]
    exponent = law.exponent_of(fit.draws, column, centre)
    if np.ptp(exponent) > 1e-9 and np.ptp(floor) > 1e-9:
        correlation = float(spearmanr(exponent, floor).statistic)
        least, middle, most = np.percentile(exponent, [2.5, 50, 97.5])
        if abs(correlation) > _TRADED and most - least > _WIDE * abs(middle):
            warnings.append(
                f"floor and exponent are traded off: the exponent of {SYMBOLS[column]} lies between "
                f"{least:.3g} and {most:.3g} depending on the irreducible term (rank correlation "
                f"{correlation:.2f} over the resamples)"
            )
    return warnings


def _unconverged(results: Table, curves: Table) -> list[str]:
    falling = []
    for row, cell_id in enumerate(results["cell_id"]):
        own = (curves["cell_id"] == cell_id) & np.isfinite(curves["nmse"]) & (curves["nmse"] > 0)
        if own.sum() < 3:
            continue
        order = np.argsort(curves["tokens"][own])
        tokens, nmse = curves["tokens"][own][order], curves["nmse"][own][order]
        fall = 1 - nmse[-1] / np.interp(0.75 * tokens[-1], tokens, nmse)
        if fall > _FALL:
            falling.append(f"N = {number(results['n_latents'][row])}, k = {results['k'][row]:g}: {fall:.1%}")
    return falling
