"""The laws of a sweep: everything that its cells and curves can carry, as the document fits.json."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saescale.scaling.kinds import (
    Kind,
    diverged_rows,
    kinds_in,
    said_of_kinds,
    unlike,
    with_kinds,
    without_diverged,
)
from saescale.scaling.laws.attempt import Skipped
from saescale.scaling.laws.best import CHOICES, Best, find_best
from saescale.scaling.laws.checks import data_warnings
from saescale.scaling.laws.convergence import Convergence, find_convergence
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.frontier import Curve, Frontier, read_curves
from saescale.scaling.laws.isoflop import IsoFlop, find_isoflop
from saescale.scaling.laws.law import Law, forms_of
from saescale.scaling.laws.over_cells import by_k, fit_cells
from saescale.scaling.laws.over_compute import find_frontiers, fit_compute, fit_optimum
from saescale.scaling.laws.rates import Rates, find_rates
from saescale.scaling.laws.settings import DEFAULT_LAWS, LEAST_BOOTSTRAPS, FitSettings
from saescale.scaling.levels import with_levels
from saescale.scaling.tables import Table, check_cells, fingerprint
from saescale.scaling.words import listed

FORMAT = 1
METHOD = 5  # of fits and intervals: results of another method are fitted again
_SETTINGS = FitSettings()


@dataclass(frozen=True)
class Laws:
    """All laws of the cells of one kind: of one subject, site and architecture. `of` tells it from the other kinds of
    its table ({} where there is no other), `curves` are the held-out curves by k.

    `cells` are all of them that did not diverge, `results` those that laws in N and k see: of cells that differ in
    choices of training alone the best (best.py), and levels that were trained with a larger k (levels.py).
    """

    cells: Table
    results: Table
    fits: tuple[Fit, ...]
    curves: Mapping[float, tuple[Curve, ...]]
    frontiers: tuple[Frontier, ...]
    skipped: tuple[Skipped, ...]
    convergence: Convergence | None = None
    isoflops: tuple[IsoFlop, ...] = ()
    best: Best | None = None
    rates: Rates | None = None
    of: Kind = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The part of fits.json that is about this kind alone."""
        kind = {"of": dict(self.of)} if self.of else {}
        return {
            "fits": [fit.document() for fit in self.fits],
            "skipped": [entry.document() for entry in self.skipped],
            "tokens_to_convergence": {**kind, **self.convergence.document()} if self.convergence else None,
            "iso_flop": [{**kind, **view.document()} for view in self.isoflops if view.enough],
            "best_over": [{**kind, **axis.document()} for axis in self.best.axes] if self.best else [],
            "rates": [{**kind, **self.rates.document()}] if self.rates else [],
        }


@dataclass(frozen=True)
class LawsOfKinds:
    """The laws of each kind of cells in one table, in the order of their names, with what was left out of all of them.

    `results` are all cells that did not diverge, `best` those of them whose choices of training laws in N and k see.
    `over_subjects` are laws that see cells of several subjects at once, which is none of `kinds`.
    """

    results: Table
    made_from: dict[str, Any]
    kinds: tuple[Laws, ...]
    over_subjects: tuple[Fit | Skipped, ...]
    warnings: tuple[str, ...]
    best: Table

    @property
    def largest(self) -> Laws:
        """Those of the kind with the most cells, of equally many the first."""
        return max(self.kinds, key=lambda laws: len(laws.results))

    @property
    def fits(self) -> tuple[Fit, ...]:
        """All fits: by law, then by kind."""
        found = [fit for laws in self.kinds for fit in laws.fits]
        found += [entry for entry in self.over_subjects if isinstance(entry, Fit)]
        return tuple(sorted(found, key=lambda fit: self._place(fit.law.name)))

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What no kind's cells could carry: by law, then by kind."""
        found = [entry for laws in self.kinds for entry in laws.skipped]
        found += [entry for entry in self.over_subjects if isinstance(entry, Skipped)]
        return tuple(sorted(found, key=lambda entry: self._place(entry.law)))

    def _place(self, law: str) -> int:
        return _in_order(self.made_from["laws"]).index(law)

    def document(self) -> dict[str, Any]:
        """fits.json (format 1)."""
        each = [laws.document() for laws in self.kinds]
        converged = [part["tokens_to_convergence"] for part in each]
        return {
            "format": FORMAT,
            "source": self.results.source,
            "made_from": self.made_from,
            "cells": len(self.results),
            "compute": "sparse training FLOPs",
            "fits": [fit.document() for fit in self.fits],
            "skipped": [entry.document() for entry in self.skipped],
            "excluded": list(self.results.excluded),
            "warnings": list(self.warnings),
            "tokens_to_convergence": converged[0] if len(each) == 1 else [found for found in converged if found],
            "iso_flop": [view for part in each for view in part["iso_flop"]],
            "best_over": [axis for part in each for axis in part["best_over"]],
            "rates": [rates for part in each for rates in part["rates"]],
        }


def fit_laws(
    results: Table,
    curves: Table | None = None,
    settings: FitSettings = _SETTINGS,
) -> LawsOfKinds:
    """Fits the named laws, each to what it is over (law.py): cells, at each k where k is not among its columns; the
    compute frontier at each k; the compute-optimal points on it. Cells of several kinds (kinds.py) have laws of their
    own; but for one in d_model, which sees all subjects of an architecture.

    Each law takes its own columns of `results`: n_k n_latents and k, n n_latents, n_d n_latents and tokens, c the
    curves or, without them, flops; all of them nmse. Cells without a column k are taken for cells of one k. All forms
    of a law are fitted: n and c with and without an irreducible term. What the data cannot carry is listed in
    `skipped` with the reason: a law that was asked for and is in no fit is there. Cells whose nmse is above 1 have
    diverged and stay out unless `settings` keeps them. Deterministic.

    Raises SaescaleError for an unknown law and for values of nmse, n_latents or k that are not positive numbers.
    """
    made_from = describe_input(results, curves, settings)
    check_cells(results)
    asked = {law: forms_of(law) for law in _in_order(settings.laws)}
    named = kinds_in(results)
    everything = with_kinds(results, named)
    lost = diverged_rows(everything, settings.keep_diverged)
    results = without_diverged(everything, settings.keep_diverged)
    diverged = results.excluded[len(everything.excluded) :]
    if curves is not None and not (len(curves) and {"cell_id", "n_latents", "k"} <= set(results.columns)):
        curves = None
    of_one = {name: forms for name, forms in asked.items() if "d_model" not in forms[0].columns}
    kinds = [_of_kind(of, everything.select(mask), lost[mask], curves, of_one, settings) for of, mask in named]
    over_subjects: list[Fit | Skipped] = []
    for name in (name for name in asked if name not in of_one):
        for of, mask in kinds_in(everything, ("architecture",)):
            own, _ = _best(everything.select(mask), lost[mask], asked[name][0].columns)
            over_subjects += _named(fit_cells(asked[name], own, settings), of)
    convergences = [laws.convergence for laws in kinds if laws.convergence]
    all_forms = [form for forms in asked.values() for form in forms]
    tables = [laws.results for laws in kinds if len(laws.results)]
    said = [
        *said_of_kinds(tables, lambda cells: cells.notes[len(results.notes) :]),
        *diverged,
        *data_warnings(results, tables, convergences, all_forms),
        *_no_intervals(settings),
    ]
    chosen = np.zeros(len(everything), dtype=bool)
    for (_, mask), laws in zip(named, kinds, strict=True):
        chosen[mask] = laws.best is None or laws.best.rows
    best = everything.select(chosen & ~lost)
    return LawsOfKinds(results, made_from, tuple(kinds), tuple(over_subjects), (*results.notes, *said), best)


def _of_kind(
    of: Kind,
    everything: Table,
    lost: np.ndarray,
    curves: Table | None,
    asked: Mapping[str, tuple[Law, ...]],
    settings: FitSettings,
) -> Laws:
    """The laws of cells of one kind, of which `lost` (bool [cells]) have diverged."""
    cells = everything.select(~lost)
    if not len(cells):
        skipped = (Skipped(name, {}, False, "all its cells diverged", of) for name in asked)
        return Laws(cells, cells, (), {}, (), tuple(skipped), of=of)
    results, best = _best(everything, lost, ())
    curves_at = None if curves is None else {at["k"]: read_curves(own, curves) for at, own in by_k(cells)}
    found: list[Fit | Skipped] = []
    over = {forms[0].over for forms in asked.values()}
    frontiers, no_frontier = find_frontiers(cells, curves_at) if over - {"cells"} else ([], [])
    isoflops = tuple(view for frontier in frontiers if (view := find_isoflop(frontier, cells)))
    for name, forms in asked.items():
        if forms[0].over == "cells":
            table = results if not set(forms[0].columns) & CHOICES else _best(everything, lost, forms[0].columns)[0]
            found += fit_cells(forms, table, settings)
            continue
        found += [entry._replace(law=name) for entry in no_frontier]
        for frontier in frontiers if forms[0].over == "frontier" else ():
            found += fit_compute(forms, frontier, settings)
        if forms[0].over == "optimum":
            found += fit_optimum(forms, frontiers, isoflops, settings)
    found = _named(found, of)
    return Laws(
        cells,
        results,
        tuple(entry for entry in found if isinstance(entry, Fit)),
        curves_at or {},
        tuple(frontiers),
        tuple(entry for entry in found if isinstance(entry, Skipped)),
        None if curves is None else find_convergence(results, curves, settings),
        isoflops,
        best,
        find_rates(everything, lost),
        of,
    )


def _best(everything: Table, lost: np.ndarray, named: Collection[str]) -> tuple[Table, Best]:
    """The cells that a law sees which names those columns, with their levels, and over what they are the best."""
    best = find_best(everything, lost, named)
    kept = with_levels(everything.select(best.rows & ~lost))
    others = int((~best.rows & ~lost).sum())
    axes = listed((axis.name for axis in best.axes), ", ")
    one = [f"{others} cells: others of the same N and k have a lower nmse by their {axes}"] if others else []
    one += [f"{lost.sum()} cells that diverged"] if lost.any() else []
    notes = (*kept.notes, *best.notes(), *unlike(best.apart(kept)))
    return replace(kept, excluded=(*kept.excluded, *one), notes=notes), best


def _named(found: Sequence[Fit | Skipped], of: Kind) -> list[Fit | Skipped]:
    """With the kind of cells that they are of."""
    return [replace(entry, of=of) if isinstance(entry, Fit) else entry._replace(of=of) for entry in found]


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


def _no_intervals(settings: FitSettings) -> list[str]:
    few = 0 < settings.bootstraps < LEAST_BOOTSTRAPS
    text = f"{settings.bootstraps} bootstrap fits give no 95 % interval, and none is shown: it takes {LEAST_BOOTSTRAPS}"
    return [text + ", better 1000"] if few else []


def _in_order(laws: Sequence[str]) -> list[str]:
    """Those that are fitted by default first, since the others are read beside them."""
    return [*(law for law in DEFAULT_LAWS if law in laws), *(law for law in laws if law not in DEFAULT_LAWS)]
