"""The laws of a sweep: everything that its cells and curves can carry, as the document fits.json."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from scaling.checks import data_warnings, fit_warnings, frontier_warnings, unstable_exponent
from scaling.estimate import Fit, fit_law, hold_out
from scaling.frontier import Curve, Frontier, find_frontier, fit_frontier, frontier_of_ends, read_curves
from scaling.laws import C_FLOOR, LAWS, N_D, N_FLOOR, N_K, SYMBOLS, C, Law, N, find_law
from scaling.tables import Table, check_cells, comparable, fingerprint, number
from storage.errors import SaescaleError

FORMAT = 1
LAW_NAMES = tuple(dict.fromkeys(law.name for law in LAWS))
DEFAULT_LAWS = ("n_k", "n", "c")
BOOTSTRAPS = 1000


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
        }


def fit_laws(
    results: Table,
    curves: Table | None = None,
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    laws: Sequence[str] = DEFAULT_LAWS,
) -> Laws:
    """Fits the named laws: n_k to all cells, n and n_d at each k, c to the compute frontier at each k.

    Each law takes its own columns of `results`: n_k n_latents and k, n n_latents, n_d n_latents and tokens, c the
    curves or, without them, flops; all of them nmse. Cells without a column k are taken for cells of one k. n and c
    are fitted with and without an irreducible term. What the data cannot carry is listed in `skipped` with the
    reason: a law that was asked for and is in no fit is there. Deterministic in `seed`.

    Raises SaescaleError for an unknown law and for values of nmse, n_latents or k that are not positive numbers.
    """
    made_from = describe_input(results, curves, bootstraps, seed, laws)
    check_cells(results)
    results = comparable(results)
    by_k = _by_k(results)
    if curves is not None and not (len(curves) and {"cell_id", "n_latents", "k"} <= set(results.columns)):
        curves = None
    curves_at = {} if curves is None else {at["k"]: read_curves(cells, curves) for at, cells in by_k}
    frontiers: list[Frontier] = []
    found: list[Fit | Skipped] = []
    if "n_k" in laws:
        found += _fit_cells((N_K,), results, [({}, results)], bootstraps, seed)
    if "n" in laws:
        found += _fit_cells((N, N_FLOOR), results, by_k, bootstraps, seed)
    if "n_d" in laws:
        found += _fit_cells((N_D,), results, by_k, bootstraps, seed)
    if "c" in laws:
        frontiers, skipped = _find_frontiers(results, by_k, curves, curves_at)
        found += skipped
        for frontier in frontiers:
            found += _fit_frontier(frontier, bootstraps, seed)
    return Laws(
        results,
        made_from,
        tuple(entry for entry in found if isinstance(entry, Fit)),
        curves_at,
        tuple(frontiers),
        tuple(entry for entry in found if isinstance(entry, Skipped)),
        tuple(data_warnings(results, curves)),
    )


def describe_input(
    results: Table, curves: Table | None, bootstraps: int, seed: int, laws: Sequence[str]
) -> dict[str, Any]:
    """What a document of fits.json depends on, its "made_from". Raises SaescaleError for an unknown law."""
    for name in laws:
        if name not in LAW_NAMES:
            close = difflib.get_close_matches(name, LAW_NAMES, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise SaescaleError(f"unknown law {name}; {hint}there are {', '.join(LAW_NAMES)}")
    return {"results": fingerprint(results, curves), "bootstraps": bootstraps, "seed": seed, "laws": list(laws)}


def fit_all(
    results: Table,
    curves: Table | None = None,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    laws: Sequence[str] = DEFAULT_LAWS,
) -> dict[str, Any]:
    """`fit_laws` as the document of fits.json; raises what it raises."""
    return fit_laws(results, curves, bootstraps=bootstraps, seed=seed, laws=laws).document()


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
        named |= {f"exponent of n at k = {k}": v for k, v in entry.get("exponent_of_n_at_k", {}).items()}
        rows += [CoefficientRow(label, name, v["value"], v["low"], v["high"]) for name, v in named.items()]
    return rows


def _by_k(results: Table) -> list[tuple[dict[str, float], Table]]:
    """The cells of each k, with what they have in common."""
    if "k" not in results:
        return [({}, results)]
    return [({"k": float(k)}, results.select(results["k"] == k)) for k in np.unique(results["k"])]


def _fit_cells(
    forms: tuple[Law, ...],
    results: Table,
    groups: list[tuple[dict[str, float], Table]],
    bootstraps: int,
    seed: int,
) -> list[Fit | Skipped]:
    """All forms of a law of cells for each group; the largest n is held out."""
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
            bootstraps=bootstraps,
            seed=seed,
            at=at,
            excluded=cells.excluded,
        )
        found += _fit_forms(forms, at, fit_one, "n_latents", float(cells["n_latents"].max()), seed)
    return found


def _find_frontiers(
    results: Table,
    groups: list[tuple[dict[str, float], Table]],
    curves: Table | None,
    curves_at: Mapping[float, tuple[Curve, ...]],
) -> tuple[list[Frontier], list[Fit | Skipped]]:
    """The frontier of each group, from curves where there are any."""
    if curves is None:
        try:
            results.require(("flops",))
        except SaescaleError as error:
            return [], [Skipped("c", {}, False, f"without curves law c takes the flops of cells: {error}")]
        return [frontier_of_ends(at, cells) for at, cells in groups], []
    frontiers: list[Frontier] = []
    skipped: list[Fit | Skipped] = []
    for at, _ in groups:
        try:
            frontiers.append(find_frontier(at, curves_at[at["k"]]))
        except SaescaleError as error:
            skipped.append(Skipped("c", at, False, str(error)))
    return frontiers, skipped


def _fit_frontier(frontier: Frontier, bootstraps: int, seed: int) -> list[Fit | Skipped]:
    """Both forms of law c; the upper half of the compute is held out, an extrapolation by a factor of 2."""
    half = float(frontier.flops.max(initial=0.0)) / 2

    def fit_one(law: Law) -> Fit:
        return replace(fit_frontier(law, frontier, bootstraps, seed), warnings=tuple(frontier_warnings(frontier)))

    return _fit_forms((C, C_FLOOR), frontier.at, fit_one, "flops", half, seed)


def _fit_forms(
    forms: tuple[Law, ...],
    at: dict[str, float],
    fit_one: Callable[[Law], Fit],
    held_column: str,
    at_least: float,
    seed: int,
) -> list[Fit | Skipped]:
    """Each form fitted and checked; with both fitted, the one with the floor says when floor and exponent trade off."""
    fits: list[Fit] = []
    skipped: list[Fit | Skipped] = []
    for law in forms:
        try:
            fits.append(_checked(fit_one(law), held_column, at_least, seed))
        except SaescaleError as error:
            skipped.append(Skipped(law.name, at, law.has_floor, str(error)))
    if len(fits) == 2 and (warning := unstable_exponent(fits[1], fits[0])):
        fits[1] = replace(fits[1], warnings=(*fits[1].warnings, warning))
    return [*fits, *skipped]


def _checked(fit: Fit, held_column: str, at_least: float, seed: int) -> Fit:
    holdout = hold_out(fit, held_column, at_least, seed)
    warnings = [*fit.warnings, *fit_warnings(fit)]
    if holdout is None:
        largest = f"{SYMBOLS[held_column]} >= {number(at_least)}"
        held = "the upper half of the compute" if held_column == "flops" else largest
        warnings.append(f"too few points remain without {held}: nothing was held out")
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
    held = "".join(f" at {column} = {', '.join(f'{at[column]:g}' for at in ats)}" for column in ats[0])
    return law + held + (", with floor" if floor else "")
