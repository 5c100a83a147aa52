"""All forms of a law tried on one set of points: each is fitted and checked, or it is skipped with the reason."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.kinds import Kind
from saescale.scaling.laws.checks import fit_warnings, holdout_warnings, unstable_exponent
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.holdout import hold_out
from saescale.scaling.laws.law import Law
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleError

_ONE_KIND: Kind = {}


class Skipped(NamedTuple):
    """A law that the data cannot carry, and why. `at`, `floor` and `of` as in a fit; {} where it concerns all."""

    law: str
    at: Mapping[str, float]
    floor: bool
    reason: str
    of: Kind = _ONE_KIND

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        kind = {"of": dict(self.of)} if self.of else {}
        return {"law": self.law, "at": dict(self.at), **kind, "floor": self.floor, "reason": self.reason}


def fit_forms(
    forms: tuple[Law, ...], at: Mapping[str, float], fit_one: Callable[[Law], Fit], check: Callable[[Fit], Fit]
) -> list[Fit | Skipped]:
    """Each form fitted and checked; with both fitted, the one with the floor says when floor and exponent trade off."""
    fits: list[Fit] = []
    skipped: list[Fit | Skipped] = []
    for law in forms:
        try:
            fits.append(check(fit_one(law)))
        except SaescaleError as error:
            skipped.append(Skipped(law.name, at, law.has_floor, str(error)))
    plain = next((fit for fit in fits if not fit.law.has_floor), None)
    for i, fit in enumerate(fits):
        if plain and fit.law.has_floor and len(fits) == 2 and (warning := unstable_exponent(fit, plain)):
            fits[i] = replace(fit, warnings=(*fit.warnings, warning))
    return [*fits, *skipped]


def held_out(fit: Fit, held: np.ndarray, label: str, said: str, settings: FitSettings) -> Fit:
    """With what the other points predict of those that are `held` [points], and with what the fit itself says."""
    holdout = hold_out(fit, held, label, settings)
    warnings = [*fit.warnings, *fit_warnings(fit)]
    if holdout is None:
        warnings.append(f"too few points remain without {said}: nothing was held out")
    elif fit.kind != "curves":  # the points of a frontier are not independent cells
        warnings += holdout_warnings(holdout)
    return replace(fit, holdout=holdout, warnings=tuple(warnings))
