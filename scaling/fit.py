"""The laws of a sweep: everything that its cells and curves can carry, as the document fits.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from scaling.checks import data_warnings, fit_warnings, unstable_exponent
from scaling.estimate import Fit, fit_law, hold_out
from scaling.frontier import Curve, Frontier, find_frontier, fit_frontier, read_curves
from scaling.laws import C_FLOOR, N_D, N_FLOOR, N_K, SYMBOLS, C, Law, N, find_law
from scaling.tables import Table, comparable, number
from storage.errors import SaescaleError

FORMAT = 1
DEFAULT_LAWS = ("n_k", "n", "c")
LAW_NAMES = ("n_k", "n", "c", "n_d")


class Skipped(NamedTuple):
    """A law that the data cannot carry, and why."""

    law: str
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

    source: str
    results: Table
    fits: tuple[Fit, ...]
    curves: dict[float, tuple[Curve, ...]]
    frontiers: tuple[Frontier, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """fits.json (format 1)."""
        return {
            "format": FORMAT,
            "source": self.source,
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
    bootstraps: int = 1000,
    seed: int = 0,
    laws: tuple[str, ...] = DEFAULT_LAWS,
) -> Laws:
    """Fits the named laws: n_k to all cells, n and n_d at each k, c to the frontier at each k.

    n and c are fitted with and without an irreducible term. What the data cannot carry is listed in `skipped`
    with the reason. Deterministic in `seed`. Raises SaescaleError for an unknown law or a column that the laws
    asked for lack.
    """
    for name in laws:
        if name not in LAW_NAMES:
            raise SaescaleError(f"unknown law {name}; there are {', '.join(LAW_NAMES)}")
    results = comparable(results)
    results.require(("n_latents", "k", "nmse", *(("tokens",) if "n_d" in laws else ())))
    ks = [float(k) for k in np.unique(results["k"])]
    fits: list[Fit] = []
    frontiers: list[Frontier] = []
    skipped: list[Skipped] = []

    def attempt(forms: tuple[Law, ...], fit_one: Callable[[Law], Fit], held_column: str, at_least: float) -> None:
        done = []
        for law in forms:
            try:
                done.append(_checked(fit_one(law), held_column, at_least, seed))
            except SaescaleError as error:
                skipped.append(Skipped(law.name, str(error)))
        fits.extend(_compared(done))

    def attempt_cells(forms: tuple[Law, ...], cells: Table, at: dict[str, float]) -> None:
        def fit_one(law: Law) -> Fit:
            return fit_law(
                law, cells.columns, cells["nmse"], bootstraps=bootstraps, seed=seed, at=at, excluded=cells.excluded
            )

        attempt(forms, fit_one, "n_latents", float(cells["n_latents"].max()))

    if "n_k" in laws:
        attempt_cells((N_K,), results, {})
    for name, forms in (("n", (N, N_FLOOR)), ("n_d", (N_D,))):
        if name in laws:
            for k in ks:
                attempt_cells(forms, results.select(results["k"] == k), {"k": k})
    curves_at = {} if curves is None else {k: read_curves(results, curves, k) for k in ks}
    if "c" in laws and curves is None:
        skipped.append(Skipped("c", "no curves: the compute frontier takes a run directory with curves.parquet"))
    for k in curves_at if "c" in laws else ():
        try:
            frontier = find_frontier(k, curves_at[k])
        except SaescaleError as error:
            skipped.append(Skipped("c", str(error)))
            continue
        frontiers.append(frontier)
        # The upper half of the compute is held out: an extrapolation by a factor of 2.
        half = float(frontier.flops.max(initial=0.0)) / 2
        attempt((C, C_FLOOR), partial(_fit_to, frontier, bootstraps, seed), "flops", half)
    warnings = data_warnings(results, curves)
    return Laws(results.source, results, tuple(fits), curves_at, tuple(frontiers), tuple(skipped), tuple(warnings))


def fit_all(
    results: Table,
    curves: Table | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
    laws: tuple[str, ...] = DEFAULT_LAWS,
) -> dict[str, Any]:
    """`fit_laws` as the document of fits.json."""
    return fit_laws(results, curves, bootstraps=bootstraps, seed=seed, laws=laws).document()


def predict(entry: Mapping[str, Any], **columns: float | np.ndarray) -> np.ndarray:
    """nmse by one entry of fits.json's "fits" at n_latents=..., k=..., flops=... or tokens=... ([points]).

    Raises SaescaleError when a column that the law needs is missing or not positive.
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
    """A short name of one entry of "fits", such as "n at k = 32, with floor"."""
    label = str(entry["law"]) + "".join(f" at {c} = {v:g}" for c, v in entry["at"].items())
    return label + (", with floor" if "E" in entry["coefficients"] else "")


def coefficient_rows(document: Mapping[str, Any]) -> list[CoefficientRow]:
    """The coefficient table of a fits.json document, exponents of n at each k included."""
    rows = []
    for entry in document["fits"]:
        label = law_label(entry)
        named = dict(entry["coefficients"])
        named |= {f"exponent of n at k = {k}": v for k, v in entry.get("exponent_of_n_at_k", {}).items()}
        rows += [CoefficientRow(label, name, v["value"], v["low"], v["high"]) for name, v in named.items()]
    return rows


def _checked(fit: Fit, held_column: str, at_least: float, seed: int) -> Fit:
    holdout = hold_out(fit, held_column, at_least, seed)
    warnings = [*fit.warnings, *fit_warnings(fit)]
    if holdout is None:
        warnings.append(
            f"too few points remain without {SYMBOLS[held_column]} >= {number(at_least)}: nothing was held out"
        )
    return replace(fit, holdout=holdout, warnings=tuple(warnings))


def _fit_to(frontier: Frontier, bootstraps: int, seed: int, law: Law) -> Fit:
    return replace(fit_frontier(law, frontier, bootstraps, seed), warnings=tuple(_frontier_warnings(frontier)))


def _compared(fits: list[Fit]) -> list[Fit]:
    """With both forms of a law fitted, the one with the floor says when floor and exponent trade off."""
    if len(fits) == 2 and (warning := unstable_exponent(fits[1], fits[0])):
        fits[1] = replace(fits[1], warnings=(*fits[1].warnings, warning))
    return fits


def _frontier_warnings(frontier: Frontier) -> list[str]:
    winners = frontier.winner[frontier.kept]
    largest = max(c.n_latents for c in frontier.curves)
    share = np.mean([frontier.curves[i].n_latents == largest for i in winners])
    if share > 0.5:
        return [
            f"{share:.0%} of the frontier's points belong to the largest N = {number(largest)}: larger cells might do "
            "better there, so the frontier is an upper bound"
        ]
    return []
