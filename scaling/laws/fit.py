"""The laws of a sweep: everything that its cells and curves can carry, as the document fits.json."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.kinds import comparable, unlike, without_diverged
from saescale.scaling.laws.checks import (
    data_warnings,
    fit_warnings,
    frontier_warnings,
    holdout_warnings,
    unstable_exponent,
)
from saescale.scaling.laws.convergence import Convergence, find_convergence
from saescale.scaling.laws.estimate import Fit, centred, fit_law
from saescale.scaling.laws.frontier import Curve, Frontier, find_frontier, fit_frontier, frontier_of_ends, read_curves
from saescale.scaling.laws.holdout import compare_without_last, hold_out
from saescale.scaling.laws.identify import profile_floor
from saescale.scaling.laws.isoflop import IsoFlop, find_isoflop, fit_isoflop
from saescale.scaling.laws.lack_of_fit import kinds_of
from saescale.scaling.laws.law import SYMBOLS, Law, find_law, forms_of
from saescale.scaling.laws.leading import far_cells, leading_cells
from saescale.scaling.laws.settings import DEFAULT_LAWS, LEAST_BOOTSTRAPS, FitSettings
from saescale.scaling.tables import Table, check_cells, fingerprint, number, size_of
from saescale.scaling.words import listed
from saescale.storage.errors import SaescaleError

FORMAT = 1
METHOD = 3  # of fits and intervals: results of another method are fitted again
_SETTINGS = FitSettings()


class Skipped(NamedTuple):
    """A law that the data cannot carry, and why. `at` and `floor` as in a fit; {} where it concerns every k."""

    law: str
    at: dict[str, float]
    floor: bool
    reason: str


class CoefficientRow(NamedTuple):
    """A row of the coefficient table; `low` and `high` are None without a bootstrap."""

    law: str
    coefficient: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Laws:
    """All fits of one table of cells, with what was left out. `curves` are the held-out curves by k."""

    results: Table
    made_from: dict[str, Any]
    fits: tuple[Fit, ...]
    curves: dict[float, tuple[Curve, ...]]
    frontiers: tuple[Frontier, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    convergence: Convergence | None = None
    isoflops: tuple[IsoFlop, ...] = ()

    def document(self) -> dict[str, Any]:
        """fits.json (format 1)."""
        return {
            "format": FORMAT,
            "source": self.results.source,
            "made_from": self.made_from,
            "cells": len(self.results),
            "compute": "sparse training FLOPs",
            "fits": [fit.document() for fit in self.fits],
            "skipped": [entry._asdict() for entry in self.skipped],
            "excluded": list(self.results.excluded),
            "warnings": list(self.warnings),
            "tokens_to_convergence": self.convergence.document() if self.convergence else None,
            "iso_flop": [view.document() for view in self.isoflops if view.enough],
        }


def fit_laws(
    results: Table,
    curves: Table | None = None,
    settings: FitSettings = _SETTINGS,
) -> Laws:
    """Fits the named laws, each to what it is over (law.py): cells, at each k where k is not among its columns; the
    compute frontier at each k; the compute-optimal points on it.

    Each law takes its own columns of `results`: n_k n_latents and k, n n_latents, n_d n_latents and tokens, c the
    curves or, without them, flops; all of them nmse. Cells without a column k are taken for cells of one k. All forms
    of a law are fitted: n and c with and without an irreducible term. What the data cannot carry is listed in
    `skipped` with the reason: a law that was asked for and is in no fit is there. Cells whose nmse is above 1 have
    diverged and stay out unless `settings` keeps them. Deterministic.

    Raises SaescaleError for an unknown law and for values of nmse, n_latents or k that are not positive numbers.
    """
    made_from = describe_input(results, curves, settings)
    check_cells(results)
    kept = without_diverged(results, settings.keep_diverged)
    diverged, results = kept.excluded[len(results.excluded) :], kept
    # Only a law over subjects sees more than the most frequent one.
    subjects = comparable(results, over_subjects=True)
    results = comparable(results)
    by_k = _by_k(results)
    if curves is not None and not (len(curves) and {"cell_id", "n_latents", "k"} <= set(results.columns)):
        curves = None
    curves_at = {} if curves is None else {at["k"]: read_curves(cells, curves) for at, cells in by_k}
    found: list[Fit | Skipped] = []
    asked = {law: forms_of(law) for law in _in_order(settings.laws)}
    all_forms = [form for forms in asked.values() for form in forms]
    over = {form.over for form in all_forms}
    frontiers, no_frontier = _find_frontiers(results, by_k, curves, curves_at) if over - {"cells"} else ([], [])
    isoflops = tuple(view for frontier in frontiers if (view := find_isoflop(frontier, results)))
    for name, forms in asked.items():
        if forms[0].over == "cells":
            table = subjects if "d_model" in forms[0].columns else results
            groups = [({}, table)] if "k" in forms[0].columns else _by_k(table)
            found += _fit_cells(forms, table, groups, settings)
            continue
        found += [entry._replace(law=name) for entry in no_frontier]
        for frontier in frontiers if forms[0].over == "frontier" else ():
            found += _fit_frontier(forms, frontier, settings)
        if forms[0].over == "optimum":
            found += _fit_optimum(forms, frontiers, isoflops, settings)
    convergence = None if curves is None else find_convergence(results, curves, settings)
    said = [*unlike(results), *diverged, *data_warnings(results, convergence, all_forms), *_no_intervals(settings)]
    return Laws(
        results,
        made_from,
        tuple(entry for entry in found if isinstance(entry, Fit)),
        curves_at,
        tuple(frontiers),
        tuple(entry for entry in found if isinstance(entry, Skipped)),
        (*results.notes, *said),
        convergence,
        isoflops,
    )


def describe_input(results: Table, curves: Table | None, settings: FitSettings) -> dict[str, Any]:
    """What a document of fits.json depends on, its "made_from". Raises SaescaleError for an unknown law."""
    forms = [law.formula for name in settings.laws for law in forms_of(name)]
    return {
        "results": fingerprint(results, curves),
        "bootstraps": settings.bootstraps,
        "seed": settings.seed,
        "keep_diverged": settings.keep_diverged,
        "laws": list(settings.laws),
        "formulas": forms,
        "method": METHOD,
    }


def fit_all(
    results: Table,
    curves: Table | None = None,
    settings: FitSettings = _SETTINGS,
) -> dict[str, Any]:
    """`fit_laws` as the document of fits.json; raises what it raises."""
    return fit_laws(results, curves, settings).document()


def predict(entry: Mapping[str, Any], **columns: float | np.ndarray) -> np.ndarray:
    """nmse by one entry of fits.json's "fits" at n_latents=..., k=..., flops=... or tokens=... ([points]).

    `flops` are sparse training FLOPs and `tokens` training tokens of the whole training, as in
    results.parquet. Raises SaescaleError when a column that the law needs is missing or not positive.
    """
    law = find_law(entry["law"], entry["coefficients"])
    points = {}
    for column in law.columns:
        if column not in columns:
            raise SaescaleError(
                f"law {law.name} needs {column} ({SYMBOLS[column]}); got {', '.join(columns) or 'nothing'}"
            )
        points[column] = np.atleast_1d(np.asarray(columns[column], dtype=np.float64))
        if not (points[column] > 0).all():
            raise SaescaleError(f"law {law.name}: {column} must be positive")
    points = dict(zip(points, np.broadcast_arrays(*points.values()), strict=True))
    return law.value({name: c["value"] for name, c in entry["coefficients"].items()}, points)


def law_label(entry: Mapping[str, Any]) -> str:
    """A short name of one entry of "fits" or "skipped", such as "n at k = 32, with floor"."""
    return _label(entry["law"], [entry["at"]], entry["floor"])


def fit_notes(document: Mapping[str, Any]) -> list[str]:
    """What must be said beside the coefficients of a fits.json document: laws that were not fitted, warnings about the
    cells and about each fit. What holds for several k or laws is said once and names them."""
    skipped = _said_once([(entry, entry["reason"]) for entry in document["skipped"]])
    warned = _said_once([(entry, warning) for entry in document["fits"] for warning in entry["warnings"]])
    return [*(f"not fitted: {note}" for note in skipped), *document["warnings"], *warned]


def coefficient_rows(document: Mapping[str, Any]) -> list[CoefficientRow]:
    """The coefficient table of a fits.json document, exponents of n at each k included."""
    rows = []
    for entry in document["fits"]:
        label = law_label(entry)
        named = dict(entry["coefficients"])
        for key, symbol in (("exponent_of_n_at_k", "k"), ("exponent_of_n_at_d_model", "s")):
            named |= {f"exponent of n at {symbol} = {level}": v for level, v in entry.get(key, {}).items()}
        rows += [CoefficientRow(label, name, v["value"], v["low"], v["high"]) for name, v in named.items()]
    return rows


def _no_intervals(settings: FitSettings) -> list[str]:
    few = 0 < settings.bootstraps < LEAST_BOOTSTRAPS
    text = f"{settings.bootstraps} bootstrap fits give no 95 % interval, and none is shown: it takes {LEAST_BOOTSTRAPS}"
    return [text + ", better 1000"] if few else []


def _in_order(laws: Sequence[str]) -> list[str]:
    """Those that are fitted by default first, since the others are read beside them."""
    return [*(law for law in DEFAULT_LAWS if law in laws), *(law for law in laws if law not in DEFAULT_LAWS)]


def _by_k(results: Table) -> list[tuple[dict[str, float], Table]]:
    """The cells of each k, with what they have in common."""
    if "k" not in results:
        return [({}, results)]
    return [({"k": float(k)}, results.select(results["k"] == k)) for k in np.unique(results["k"])]


def _fit_cells(
    forms: tuple[Law, ...],
    results: Table,
    groups: list[tuple[dict[str, float], Table]],
    settings: FitSettings,
) -> list[Fit | Skipped]:
    """All forms of a law of cells for each group; the largest n is held out, and the costliest quarter of cells."""
    try:
        results.require(forms[0].columns)
    except SaescaleError as error:
        return [Skipped(forms[0].name, {}, False, str(error))]
    found: list[Fit | Skipped] = []
    for at, cells in groups:
        fit_one = partial(
            fit_law,
            columns=cells.columns,
            nmse=cells["nmse"],
            settings=settings,
            at=at,
            excluded=cells.excluded,
            kinds=kinds_of(cells, forms[0].columns),
        )
        check = partial(_checked_cells, cells=cells, settings=settings)
        found += _fit_forms(forms, at, fit_one, check)
    return found


def _find_frontiers(
    results: Table,
    groups: list[tuple[dict[str, float], Table]],
    curves: Table | None,
    curves_at: Mapping[float, tuple[Curve, ...]],
) -> tuple[list[Frontier], list[Skipped]]:
    """The frontier of each group, from curves where there are any."""
    if curves is None:
        try:
            results.require(("flops",))
        except SaescaleError as error:
            return [], [Skipped("c", {}, False, f"without curves law c takes the flops of cells: {error}")]
        return [frontier_of_ends(at, cells) for at, cells in groups], []
    frontiers: list[Frontier] = []
    skipped: list[Skipped] = []
    for at, _ in groups:
        try:
            frontiers.append(find_frontier(at, curves_at[at["k"]]))
        except SaescaleError as error:
            skipped.append(Skipped("c", at, False, str(error)))
    return frontiers, skipped


def _fit_frontier(forms: tuple[Law, ...], frontier: Frontier, settings: FitSettings) -> list[Fit | Skipped]:
    """All forms of law c; the upper half of the compute is held out, an extrapolation by a factor of 2."""

    def fit_one(law: Law) -> Fit:
        return replace(fit_frontier(law, frontier, settings), warnings=tuple(frontier_warnings(frontier)))

    def check(fit: Fit) -> Fit:
        half = float(fit.columns["flops"].max()) / 2
        return _held_out(
            fit, fit.columns["flops"] >= half, f"C >= {number(half)}", "the upper half of the compute", settings
        )

    return _fit_forms(forms, frontier.at, fit_one, check)


def _fit_optimum(
    forms: tuple[Law, ...],
    frontiers: Sequence[Frontier],
    isoflops: Sequence[IsoFlop],
    settings: FitSettings,
) -> list[Fit | Skipped]:
    """A compute-optimal law at each k where iso-FLOP minima were found."""
    views = {tuple(view.frontier.at.items()): view for view in isoflops}
    found: list[Fit | Skipped] = []
    for frontier in frontiers:
        view = views.get(tuple(frontier.at.items()))
        if view is None or not view.enough:
            reason = (
                "no compute at which at least three sizes of n compete with the best one inside; add sizes, and curves"
            )
            found += [Skipped(law.name, frontier.at, law.has_floor, reason) for law in forms]
            continue

        def fit_one(law: Law, view: IsoFlop = view) -> Fit:
            return replace(fit_isoflop(law, view, settings), warnings=view.warnings)

        def check(fit: Fit) -> Fit:
            return replace(fit, warnings=(*fit.warnings, *fit_warnings(fit)))

        found += _fit_forms(forms, frontier.at, fit_one, check)
    return found


def _fit_forms(
    forms: tuple[Law, ...], at: dict[str, float], fit_one: Callable[[Law], Fit], check: Callable[[Fit], Fit]
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


def _checked_cells(fit: Fit, cells: Table, settings: FitSettings) -> Fit:
    """With what independent cells say besides: hold-outs, the profile of the floor, the law without its last term."""
    column = "n_latents" if "n_latents" in cells else fit.law.columns[0]
    largest = float(cells[column].max())
    held = cells[column] >= largest
    label = f"{SYMBOLS.get(column, column)} >= {number(largest)}"
    fit = _held_out(fit, held, label, label, settings)
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
    names = [f"{size_of(cells, row)}, nmse {value:.4g}" for row, value in enumerate(fit.nmse)]
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


def _held_out(fit: Fit, held: np.ndarray, label: str, said: str, settings: FitSettings) -> Fit:
    holdout = hold_out(fit, held, label, settings)
    warnings = [*fit.warnings, *fit_warnings(fit)]
    if holdout is None:
        warnings.append(f"too few points remain without {said}: nothing was held out")
    elif fit.kind != "curves":  # the points of a frontier are not independent cells
        warnings += holdout_warnings(holdout)
    return replace(fit, holdout=holdout, warnings=tuple(warnings))


def _said_once(notes: Sequence[tuple[Mapping[str, Any], str]]) -> list[str]:
    """Each text once, after the laws that it concerns; `notes` are (entry of fits or skipped, text)."""
    concerned: dict[str, dict[tuple[str, bool], list[Mapping[str, float]]]] = {}
    for entry, text in notes:
        concerned.setdefault(text, {}).setdefault((entry["law"], entry["floor"]), []).append(entry["at"])
    return [
        "; ".join(_label(law, ats, floor) for (law, floor), ats in laws.items()) + f": {text}"
        for text, laws in concerned.items()
    ]


def _label(law: str, ats: Sequence[Mapping[str, float]], floor: bool) -> str:
    """Such as "n at k = 8, 16, with floor" for n with a floor at k = 8 and at k = 16."""
    held = "".join(f" at {column} = {listed((f'{at[column]:g}' for at in ats), ', ')}" for column in ats[0])
    return law + held + (", with floor" if floor else "")
