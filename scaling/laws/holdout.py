"""What a law is worth: predictions of cells that it was not fitted to, and whether its last term is needed."""

from dataclasses import replace
from typing import Any

import numpy as np

from saescale.scaling.laws.estimate import Fit, fit_law
from saescale.scaling.laws.law import SYMBOLS, Law
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleError

BOOTSTRAPS = 400
_DECIDES = 10.0
_TELLS = 2.0
_LEAST_RESIDUAL = 1e-6
_SETTINGS = FitSettings()


def hold_out(fit: Fit, held: np.ndarray, label: str, settings: FitSettings = _SETTINGS) -> dict[str, Any] | None:
    """What the law, fitted to the points that are not `held` (bool [points]), predicts for those that are.

    None when too few points remain for a fit. Of each prediction: `log_error` = ln predicted - ln measured; `low` and
    `high`, the interval in which one cell should lie; `law_low` and `law_high`, that of the law itself. `covered` is
    how many of the measured values lie in theirs.
    """
    try:
        refit = _refit(fit, fit.law, ~held, replace(settings, bootstraps=min(len(fit.draws), BOOTSTRAPS)))
    except SaescaleError:
        return None
    measured = fit.nmse[held]
    points = {c: v[held] for c, v in fit.columns.items()}
    prediction = refit.predict(points)
    errors = np.log(prediction.value) - np.log(measured)
    rows = []
    for i in range(len(measured)):
        row = {c: float(v[i]) for c, v in points.items()} | {
            "measured": float(measured[i]),
            "predicted": float(prediction.value[i]),
            "log_error": float(errors[i]),
        }
        if len(refit.draws):
            row |= {"low": float(prediction.cell_low[i]), "high": float(prediction.cell_high[i])}
            row |= {"law_low": float(prediction.low[i]), "law_high": float(prediction.high[i])}
        rows.append(row)
    document: dict[str, Any] = {
        "held_out": label,
        "points": len(rows),
        "rms_log_error": float(np.sqrt(np.mean(errors**2))),
    }
    if len(refit.draws):
        inside = (prediction.cell_low <= measured) & (measured <= prediction.cell_high)
        document |= {"covered": int(inside.sum()), "coverage": float(inside.mean())}
    return document | {"predictions": rows}


def compare_without_last(fit: Fit, held: np.ndarray | None, settings: FitSettings = _SETTINGS) -> dict[str, Any] | None:
    """The law beside itself without its last term (the irreducible one, or a broken law's second power), in numbers
    and in words. None for a law of one term and where too few cells remain.

    `aicc_difference`: how much higher the corrected Akaike criterion is without it, under the likelihood that goes
    with the fit's sum of absolute residuals (Laplace's). `held` (bool [points]): what the hold-out leaves out.
    """
    if len(fit.law.terms) < 2 or len(fit.nmse) < len(fit.law.names) + 3:
        return None
    shorter, settings = _without_last(fit.law), replace(settings, bootstraps=0)
    everything = np.ones(len(fit.nmse), dtype=bool)
    try:
        without = _refit(fit, shorter, everything, settings)
    except SaescaleError:
        return None
    difference = _aicc(without) - _aicc(fit)
    column = fit.law.columns[0]
    centre = fit.centre
    document = {
        "without": ", ".join(name for name in fit.law.names if name not in shorter.names),
        "aicc_difference": difference,
        "rms_log_residual": {"with": fit.rms_log_residual, "without": without.rms_log_residual},
        f"exponent_of_{SYMBOLS.get(column, column)}": {
            "with": float(fit.law.exponent_of(fit.raw, column, centre)),
            "without": float(shorter.exponent_of(without.raw, column, centre)),
        },
    }
    words = _in_words(difference)
    if held is not None and held.any() and not held.all():
        errors = {}
        for name, law in (("with", fit.law), ("without", shorter)):
            try:
                rest = _refit(fit, law, ~held, settings)
            except SaescaleError:
                continue
            predicted = law.log_value(rest.raw, {c: fit.columns[c][held] for c in law.columns})
            errors[name] = float(np.sqrt(np.mean((predicted - np.log(fit.nmse[held])) ** 2)))
        document["rms_log_error_held_out"] = errors
        if len(errors) == 2:
            words += (
                f"; held-out cells are predicted within {errors['with']:.2%} with it, {errors['without']:.2%} without"
            )
    return document | {"words": words}


def _without_last(law: Law) -> Law:
    terms = law.terms[:-1]
    used = {column for term in terms for exponent in term.exponents for column in exponent.columns}
    return replace(
        law, terms=terms, columns=tuple(c for c in law.columns if c in used), join=law.join if len(terms) > 1 else 1.0
    )


def _refit(fit: Fit, law: Law, kept: np.ndarray, settings: FitSettings) -> Fit:
    columns = {c: v[kept] for c, v in fit.columns.items()}
    kinds = None if fit.kinds is None else fit.kinds[kept]
    return fit_law(law, columns, fit.nmse[kept], settings, at=fit.at, agree=False, kinds=kinds)


def _aicc(fit: Fit) -> float:
    residuals = fit.law.log_value(fit.raw, fit.columns) - np.log(fit.nmse)
    points, parameters = len(residuals), len(fit.law.names) + 1
    deviance = 2 * points * np.log(2 * np.e * max(float(np.mean(np.abs(residuals))), _LEAST_RESIDUAL))
    return float(deviance + 2 * parameters + 2 * parameters * (parameters + 1) / max(points - parameters - 1, 1))


def _in_words(difference: float) -> str:
    size = f"AICc {abs(difference):.1f} {'lower' if difference > 0 else 'higher'} with it"
    if difference > _DECIDES:
        return f"the cells need the last term ({size})"
    if difference > _TELLS:
        return f"the cells speak for the last term ({size})"
    if difference > -_TELLS:
        return f"the cells do not tell whether there is a last term ({size})"
    return f"the cells do without the last term ({size})"
