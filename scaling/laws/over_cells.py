"""Laws of cells: one fit for all of them, or for those of each k, with what independent cells say besides."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from saescale.scaling.laws.attempt import Skipped, fit_forms, held_out
from saescale.scaling.laws.estimate import Fit, centred, fit_law
from saescale.scaling.laws.holdout import compare_without_last, hold_out
from saescale.scaling.laws.identify import profile_floor
from saescale.scaling.laws.lack_of_fit import kinds_of
from saescale.scaling.laws.law import SYMBOLS, Law
from saescale.scaling.laws.leading import far_cells, leading_cells
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.levels import measured_k
from saescale.scaling.tables import Table, number, size_of
from saescale.scaling.words import listed
from saescale.storage.errors import SaescaleError


def by_k(cells: Table) -> list[tuple[dict[str, float], Table]]:
    """The cells of each k, with what they have in common."""
    if "k" not in cells:
        return [({}, cells)]
    return [({"k": float(k)}, cells.select(cells["k"] == k)) for k in np.unique(cells["k"])]


def fit_cells(forms: tuple[Law, ...], cells: Table, settings: FitSettings) -> list[Fit | Skipped]:
    """All forms of a law, at each k where k is none of its columns; the largest n is held out, and the costliest
    quarter of cells. A law in k takes the measured L0 of cells that had k for a target."""
    try:
        cells.require(forms[0].columns)
    except SaescaleError as error:
        return [Skipped(forms[0].name, {}, False, str(error))]
    found: list[Fit | Skipped] = []
    measured = "k" in forms[0].columns and (measured_k(cells) != cells["k"]).any()
    for at, own in [({}, cells)] if "k" in forms[0].columns else by_k(cells):
        fit_one = partial(
            fit_law,
            columns=own.columns | ({"k": measured_k(own)} if measured else {}),
            nmse=own["nmse"],
            settings=settings,
            at=at,
            excluded=own.excluded,
            kinds=kinds_of(own, forms[0].columns),
        )
        check = partial(_checked, cells=own, settings=settings, asked_k=own["k"] if measured else None)
        found += fit_forms(forms, at, fit_one, check)
    return found


def _checked(fit: Fit, cells: Table, settings: FitSettings, asked_k: np.ndarray | None) -> Fit:
    """With what independent cells say besides: hold-outs, the profile of the floor, the law without its last term."""
    fit = replace(fit, asked_k=asked_k)
    column = "n_latents" if "n_latents" in cells else fit.law.columns[0]
    largest = float(cells[column].max())
    held = cells[column] >= largest
    label = f"{SYMBOLS.get(column, column)} >= {number(largest)}"
    fit = held_out(fit, held, label, label, settings)
    more: dict[str, Any] = {}
    if "flops" in cells and np.isfinite(cells["flops"]).all():
        least = float(np.quantile(cells["flops"], 0.75, method="higher"))
        costly = cells["flops"] >= least
        # Where they are the same cells, so are the predictions.
        same = (costly == held).all()
        text = f"C >= {number(least)}"
        more["holdout_compute"] = (
            {**fit.holdout, "held_out": text} if same and fit.holdout else hold_out(fit, costly, text, settings)
        )
    fit, led = _with_wrong_cells(fit, cells)
    if led:
        more["leading_cells"] = led
    profile = None
    if len(fit.draws):
        if fit.law.join == 1:
            columns, log_nmse = fit.observations()
            problem, to_raw = centred(fit.law, columns, log_nmse)
            profile = profile_floor(fit.law, problem, np.linalg.solve(to_raw, fit.raw), log_nmse)
        if comparison := compare_without_last(fit, held, settings):
            more["without_last_term"] = comparison
    return replace(fit, profile=profile, more=more)


def _with_wrong_cells(fit: Fit, cells: Table) -> tuple[Fit, list[int]]:
    """With a warning that names the cells that lead the fit or lie far from it; the indices of those that lead."""
    log_nmse = np.log(fit.nmse)
    problem, to_raw = centred(fit.law, fit.columns, log_nmse)
    led = leading_cells(problem, np.linalg.solve(to_raw, fit.raw), log_nmse).tolist()
    expected = fit.law.log_value(fit.raw, fit.columns)
    far = [row for row in far_cells(log_nmse - expected, len(fit.raw)).tolist() if row not in led]
    what = fit.law.target
    names = [f"{size_of(cells, row)}, {what} {value:.4g}" for row, value in enumerate(fit.nmse)]
    said = []
    if led:
        cases = listed(names[row] for row in led)
        said.append(f"single cells lead this fit, without one of them the others agree far better: {cases}")
    if far:
        cases = listed(f"{names[row]} where it says {np.exp(expected[row]):.4g}" for row in far)
        said.append(f"single cells lie far from this fit, which the others agree on: {cases}")
    for i, rows in enumerate(filter(None, (led, far))):
        example = f", as with --where 'cell_id!={cells['cell_id'][rows[0]]}'" if "cell_id" in cells else ""
        said[i] += f"; look at their curves, train them again or leave them out{example}"
    return replace(fit, warnings=(*fit.warnings, *said)), led
