"""Laws of the metrics of evaluations, of the same cells as those of nmse and by the same forms and fits.

What is fitted is how far a metric is from what an SAE that loses nothing would have (scales.py). Of cells that differ
in choices of training alone a law of a metric sees those that have the lowest nmse, as that of nmse does: both say what
the same SAEs are worth, and a metric is not chosen for being low by chance.

A metric's own intervals do not weigh cells: evaluations measure all cells of a run on the same documents, so that much
of what an interval allows for moves all of them together. That shifts a law and bends nothing.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from saescale.scaling.kinds import Kind
from saescale.scaling.laws.attempt import Skipped
from saescale.scaling.laws.checks import rises
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.fit import Laws, LawsOfKinds
from saescale.scaling.laws.law import Law, forms_of
from saescale.scaling.laws.over_cells import fit_cells
from saescale.scaling.laws.over_compute import find_frontiers, fit_compute
from saescale.scaling.laws.scales import Scale, scale_of
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import (
    PART,
    Better,
    Measured,
    Metric,
    Values,
    declared,
    measured,
    parts_of,
    sibling,
    values_of,
)
from saescale.scaling.tables import Table, size_of
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS
from saescale.storage.errors import SaescaleError

DEFAULT = ("n_k",)
_ENDS = (".low", ".high")
_EXPLAINS = 0.5  # the least share of the variance of ln distance that a law must explain
_UNLIKELY = 0.05
_FEW = 4  # cells
_SAME, _SAME_SHARE = 1e-3, 2e-3  # of ln distance, and of how far it varies: training evaluates in 16 bits


class Seen(NamedTuple):
    """Cells that have a metric: their `nmse` [cells] and its `values` [cells], and of what it is read `beside` [cells]
    by name; NaN where a cell has none."""

    cells: Table
    values: Values
    nmse: np.ndarray
    beside: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MetricLaws:
    """The laws of one metric of the cells of one kind (`of`). `cells` are those that have it and that a power law could
    follow, their column nmse is the metric's distance on `scale`; for the others see Seen. `seen`: all that have it,
    those at its limit too (None: there are no others). `without`: how many cells of the kind are not among `cells`."""

    name: str
    metric: Metric
    scale: Scale
    cells: Table
    values: Values
    nmse: np.ndarray
    fits: tuple[Fit, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    of: Kind = field(default_factory=dict)
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    without: int = 0
    seen: Seen | None = None

    @property
    def everywhere(self) -> Seen:
        """All cells that have it."""
        return self.seen or Seen(self.cells, self.values, self.nmse, self.beside)

    @property
    def laws(self) -> Laws:
        """As if the distance were nmse, for whatever draws or reads laws."""
        return Laws(self.cells, self.cells, self.fits, {}, (), self.skipped, of=self.of)

    def document(self) -> dict[str, Any]:
        """An entry of `metrics` of fits.json."""
        kind = {"of": dict(self.of)} if self.of else {}
        return {
            "metric": self.name, **kind, "better": self.metric.better, "fitted": self.scale.words,
            "cells": len(self.cells),
            "fits": [self._entry(fit) for fit in self.fits],
            "skipped": [entry.document() for entry in self.skipped],
            "warnings": list(self.warnings),
        }  # fmt: skip

    def _entry(self, fit: Fit) -> dict[str, Any]:
        """The fit with what was held out in values of the metric."""
        entry = fit.document() | {"metric": self.name, "scale": self.scale._asdict()}
        for key in ("holdout", "holdout_compute"):
            if held := entry.get(key):
                rows = [self._in_values(row) for row in held["predictions"]]
                entry[key] = {**held, "predictions": rows}
        return entry

    def _in_values(self, row: Mapping[str, float]) -> dict[str, float]:
        found = dict(row)
        for name in ("measured", "predicted"):
            found[name] = float(self.scale.value(np.array(row[name])))
        for low, high in (("low", "high"), ("law_low", "law_high")):
            if low in row:
                found[low], found[high] = map(float, self.scale.interval(np.array(row[low]), np.array(row[high])))
        return found


def metrics_in(cells: Table, of: Measured) -> dict[str, Values]:
    """Every metric of these cells: those that evaluations measured, and columns of a table of one's own that saescale
    has no meaning for."""
    ids = cells["cell_id"].tolist() if "cell_id" in cells else [""] * len(cells)
    found = values_of(of, ids)
    for name, column in cells.columns.items():
        if column.dtype.kind != "f" or name in COLUMNS or name in found or name.endswith(_ENDS):
            continue
        ends = [cells[name + end] if name + end in cells else np.full(len(cells), np.nan) for end in _ENDS]
        found[name] = Values(column, *ends)
    return found


def require_metrics(names: Sequence[str], cells: Table, evals: pa.Table) -> None:
    """Raises SaescaleError, with the nearest name, where cells have no metric of one of these names."""
    there = list(metrics_in(cells, measured(evals, names)))
    for name in names:
        if name not in there:
            raise SaescaleError(f"{cells.source} has no metric {name}{_instead(name, there, evals)}")


def _instead(name: str, there: Sequence[str], evals: pa.Table) -> str:
    """What to ask for in place of a metric that is not there."""
    whole, asked, _ = name.partition(PART)
    parts = parts_of(whole, evals)
    if not there and not parts:
        return ": nothing was measured on its cells; run saescale eval"
    if parts and not asked:
        return f" of whole cells: it was measured of parts of them, {listed(parts, ', ', most=40)}; name one"
    names = parts or [other for other in there if PART not in other]
    # Most people leave out the evaluation, or write its name alone.
    own = [other for other in names if name in other.split(".")]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {(own or close)[0]}?" if own or close else ""
    return f"{hint} (there are {listed(names, ', ', most=40)})"


def distinct_metrics(fitted: LawsOfKinds, evals: pa.Table) -> list[str]:
    """The metrics that an analysis of a run fits: those that their evaluations declare, in their order, but for what is
    nmse or one of them again in every kind of cells, on another scale."""
    of = measured(evals)
    of_kinds = [(laws.results["nmse"], metrics_in(laws.results, of)) for laws in fitted.kinds if len(laws.results)]
    kept: list[list[np.ndarray]] = [[np.log(nmse) for nmse, _ in of_kinds]]
    names = []
    for name, metric in declared(evals).items():
        if not any(name in values for _, values in of_kinds):
            continue
        logs = []
        for nmse, values in of_kinds:
            there = values.get(name, Values(*np.full((3, len(nmse)), np.nan)))
            with np.errstate(divide="ignore", invalid="ignore"):
                logs.append(np.log(_scale(name, metric, values).distance(there.value)))
        if not any(_is_again(logs, others) for others in kept):
            kept.append(logs)
            names.append(name)
    return names


def _is_again(logs: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    """Whether logarithms of two distances differ by a constant in each kind of cells, so that one law is the other."""
    return all(
        np.isfinite(first - second).all() and np.ptp(first - second) < max(_SAME, _SAME_SHARE * np.ptp(second))
        for first, second in zip(logs, others, strict=True)
    )


def nmse_scatter(fitted: LawsOfKinds) -> float | None:
    """The least standard deviation of ln nmse of a cell about L(N, k) of its kind; None where there is no such law."""
    return min((fit.noise for fit in fitted.fits if fit.law.name == "n_k"), default=None)


def fit_metrics(
    fitted: LawsOfKinds, evals: pa.Table, names: Sequence[str], settings: FitSettings
) -> tuple[MetricLaws, ...]:
    """The laws `settings.laws` of the named metrics for each kind of cells that `fitted` has laws of nmse of. One that
    does not explain half of what a metric varies by is skipped, with the reason.

    `evals` is evals.parquet. Raises SaescaleError for a metric that no cell has.
    """
    require_metrics(names, fitted.results, evals)
    known, of = declared(evals), measured(evals, names)
    everything = metrics_in(fitted.results, of)
    kinds = [(laws, metrics_in(laws.results, of)) for laws in fitted.kinds if len(laws.results)]
    found = []
    for name in names:
        said: list[str] = []
        if (metric := known.get(name.partition(PART)[0])) is None:
            metric, said = _read_off(name, everything[name], fitted.results)
        for laws, own in kinds:
            of_kind = _of_kind(laws, own, metric, _scale(name, metric, own), settings)
            found.append(replace(of_kind, warnings=(*said, *of_kind.warnings)))
    return tuple(found)


def _scale(name: str, metric: Metric, values: Mapping[str, Values]) -> Scale:
    """Where its limit is another metric of the evaluation, that is a number of the subject, alike for all its cells."""
    other = values.get(sibling(name, str(metric.limit)))
    there = np.empty(0) if other is None else other.value[np.isfinite(other.value)]
    return scale_of(name, metric, float(there.mean()) if len(there) else None)


def _of_kind(
    laws: Laws, of_cells: Mapping[str, Values], metric: Metric, scale: Scale, settings: FitSettings
) -> MetricLaws:
    cells = laws.results
    values = of_cells.get(scale.name, Values(*np.full((3, len(cells)), np.nan)))
    distance = scale.distance(values.value)
    usable = np.isfinite(distance) & (distance > 0)
    at_limit = np.isfinite(values.value) & ~usable
    warnings = []
    missing = int((~np.isfinite(values.value)).sum())
    if missing:
        warnings.append(f"{missing} of {len(cells)} cells have no {scale.name}: its laws are of the others")
    if at_limit.any():
        cases = listed(f"{size_of(cells, int(r))}: {values.value[r]:.4g}" for r in np.flatnonzero(at_limit))
        warnings.append(
            f"{at_limit.sum()} cells have a {scale.name} at or beyond its limit and are left out, since no power law "
            f"reaches it ({cases})"
        )
    others = {name: of_cells.get(sibling(scale.name, name)) for name in metric.beside}

    def those(rows: np.ndarray) -> Seen:
        beside = {name: other.value[rows] for name, other in others.items() if other is not None}
        return Seen(cells.select(rows), Values(*(column[rows] for column in values)), cells["nmse"][rows], beside)

    own, kept, nmse, beside = those(usable)
    own = replace(own, columns=own.columns | {"nmse": distance[usable]})
    seen = those(usable | at_limit)
    found = MetricLaws(scale.name, metric, scale, own, kept, nmse, (), (), tuple(warnings), laws.of, beside,
                       int((~usable).sum()), seen)  # fmt: skip
    names = settings.laws
    if len(own) < _FEW or usable.sum() < 0.5 * np.isfinite(values.value).sum():
        few = f"{len(own)} of {len(cells)} cells have a {scale.name} that a power law could follow"
        return replace(found, skipped=tuple(Skipped(name, {}, False, few, laws.of) for name in names))
    fits: list[Fit] = []
    skipped: list[Skipped] = []
    for name in names:
        for entry in _fitted(tuple(_of_metric(form, scale) for form in forms_of(name)), own, settings):
            if isinstance(entry, Skipped):
                skipped.append(entry._replace(of=laws.of))
            elif reason := _explains_nothing(entry):
                skipped.append(Skipped(name, entry.at, entry.law.has_floor, reason, laws.of))
            else:
                fits.append(replace(entry, of=laws.of))
    if fits and (steps := rises(own)):
        warnings.append(f"{scale.name} does not get better with N in these steps: {listed(steps)}")
    warnings += _measured_to(scale, kept, distance[usable], fits)
    return replace(found, fits=tuple(fits), skipped=tuple(skipped), warnings=tuple(warnings))


def _fitted(forms: tuple[Law, ...], cells: Table, settings: FitSettings) -> list[Fit | Skipped]:
    """Those over compute from the ends of cells, since nobody measures a metric along a curve."""
    name, over = forms[0].name, forms[0].over
    if over == "cells":
        return fit_cells(forms, cells, settings)
    if over == "optimum":
        return [Skipped(name, {}, False, "it takes curves, and metrics are measured at the ends of cells alone")]
    frontiers, skipped = find_frontiers(cells, None)
    found = [entry for frontier in frontiers for entry in fit_compute(forms, frontier, settings)]
    return [*(entry._replace(law=name) for entry in skipped), *found]


def _of_metric(law: Law, scale: Scale) -> Law:
    return replace(law, target=scale.words, formula=law.formula.replace("nmse", scale.words))


def _explains_nothing(fit: Fit) -> str | None:
    """Why a fit is no law: it leaves over about as much as there was."""
    there = float(np.log(fit.nmse).std(ddof=1))
    if fit.noise**2 <= (1 - _EXPLAINS) * there**2:
        return None
    return (
        f"no law fits: cells scatter about it by {fit.noise:.1%}, and by {there:.1%} without any, so that it explains "
        "less than half of how they differ"
    )


def _read_off(name: str, values: Values, cells: Table) -> tuple[Metric, list[str]]:
    """What is better of a metric that nobody declared: what goes with a lower nmse."""
    there = np.isfinite(values.value)
    if there.sum() < _FEW or np.ptp(values.value[there]) == 0:
        return Metric("lower"), []
    rank = spearmanr(values.value[there], cells["nmse"][there])
    better: Better = "lower" if rank.statistic >= 0 else "higher"
    told = "" if rank.pvalue < _UNLIKELY else ", though it hardly goes with nmse at all"
    return Metric(better), [f"{name} was not declared: {better} is taken for better, as it goes with nmse{told}"]


def _measured_to(scale: Scale, values: Values, distance: np.ndarray, fits: Sequence[Fit]) -> list[str]:
    """What the metric's own intervals say beside the scatter of cells about the law; nothing where its distance is from
    another metric, whose errors it shares."""
    if scale.how == "limit" and scale.said != f"{scale.limit:g}":
        return []
    ends = np.stack([scale.distance(values.low), scale.distance(values.high)])
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.abs(np.log(ends[1]) - np.log(ends[0])) / 2
    half = half[np.isfinite(half)]
    if not len(half) or not fits:
        return []
    typical, scatter = float(np.median(half)), float(np.median([fit.noise for fit in fits]))
    if typical < 2 * scatter:
        return []
    return [
        f"the samples behind {scale.name} leave it uncertain by ± {typical:.1%} (of {scale.words}), more than cells "
        f"scatter about the law ({scatter:.1%}): they share their samples, so the whole law may lie that far off, and "
        "its exponents do not"
    ]
