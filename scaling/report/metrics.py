"""What a report says of the metrics of evaluations: where nmse and they disagree, in words, and their laws and values
over N and k, in tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saescale.scaling.comparison.disagree import WITHIN, Cell, Contradiction, Disagreement, Ranked
from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.notes import fit_notes, metric_document, with_ends
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.report.text import TextTable, scientific, typeset
from saescale.scaling.tables import number
from saescale.scaling.words import listed

_SHOWN = 3  # pairs of cells that a sentence names


def metric_sentences(disagreements: Sequence[Disagreement]) -> list[str]:
    """For each metric whether nmse and it agree about the best (N, k), at equal compute and at equal L0."""
    return [typeset(text) for found in disagreements for text in _said(found)]


def _said(found: Disagreement) -> list[str]:
    where = f" ({label})" if (label := kind_label(found.of)) else ""
    names = f"nmse and {found.name}{where}"
    if not any(ranked.contradictions for ranked in found.ranked):
        each = [
            f"{r.alike} of {r.pairs} pairs of cells of equal {r.equal} (within a factor of {WITHIN[r.equal]:g}; rank "
            f"correlation {r.correlation:.2f})"
            for r in found.ranked
        ]
        others = any(r.alike < r.pairs for r in found.ranked)
        text = f"{names} agree about the best (N, k): they order {' and '.join(each)} alike"
        return [text + (", and the others differ by less than cells scatter." if others else ".")]
    said: list[str] = []
    for ranked in found.ranked:
        text = (
            f"At equal {ranked.equal} {names} order {ranked.alike} of {ranked.pairs} pairs of cells alike "
            f"({ranked.equal} within a factor of {WITHIN[ranked.equal]:g}; rank correlation {ranked.correlation:.2f})"
        )
        count = len(ranked.contradictions)
        if not count:
            said.append(f"{text}, and disagree on none by more than cells scatter.")
            continue
        cases = listed((_pair(found, c) for c in ranked.contradictions), "; ", _SHOWN)
        pairs = "one pair" if count == 1 else f"{count} pairs"
        said.append(
            f"{text}. They disagree on {pairs} by more than cells scatter: {cases}.{_other_best(found, ranked)}"
        )
    return said


def _other_best(found: Disagreement, ranked: Ranked) -> str:
    groups = len(ranked.best)
    if not ranked.other_best:
        which = "the group" if groups == 1 else f"each of the {groups} groups"
        return f" The best cells of {which} of equal {ranked.equal} are the same, or not told apart."
    cases = [
        f"up to {ranked.equal} = {scientific(at, 3)} {_cell(found, a)} by nmse and {_cell(found, b)} by {found.name}"
        for at, a, b in ranked.other_best
    ]
    return f" The best cell is another: {listed(cases, '; ', _SHOWN)}."


def _pair(found: Disagreement, pair: Contradiction) -> str:
    """Such as "nmse prefers N = 512, k = 32 (nmse 0.21, kl 0.41) to N = 1024, k = 8 (nmse 0.23, kl 0.33)"."""
    ends = [
        f"{_cell(found, cell)} (nmse {cell.nmse:.3g}, {found.name.rpartition('.')[2]} {cell.value:.3g})"
        for cell in pair
    ]
    return f"nmse prefers {ends[0]} to {ends[1]}"


def _cell(found: Disagreement, cell: Cell) -> str:
    cells = found.cells
    several = "architecture" in cells and len(np.unique(cells["architecture"])) > 1
    name = f"{cells['architecture'][cell.row]}, " if several else ""
    return f"{name}N = {number(cells['n_latents'][cell.row])}, k = {number(cells['k'][cell.row])}"


def metric_notes(document: Mapping[str, Any], shown: Sequence[MetricLaws]) -> list[str]:
    """What must be said of the laws of the metrics that are `shown`, each after its name."""
    names = dict.fromkeys(own.name for own in shown)
    return [f"{name}: {note}" for name in names for note in fit_notes(metric_document(document["metrics"], name))]


def metric_tables(metrics: Sequence[MetricLaws], shown: Sequence[MetricLaws]) -> list[TextTable]:
    """The laws of all metrics in one table, then the values of those that are `shown` over N and k."""
    laws = _laws(metrics)
    return [*([laws] if laws.rows else []), *(_over_n_and_k(own) for own in shown)]


def _laws(metrics: Sequence[MetricLaws]) -> TextTable:
    rows = []
    several = any(own.of for own in metrics)
    for own in metrics:
        words = own.scale.words.replace(f"{own.name.partition('.')[0]}.", "")
        fit = next((fit for fit in own.fits if fit.law.name == "n_k"), None)
        kind = [kind_label(own.of)] if several else []
        if fit is None:
            reason = own.skipped[0].reason if own.skipped else ""
            rows.append([own.name, *kind, words, f"no law: {reason}" if reason else "", "", "", ""])
            continue
        ks = fit.levels("k")
        exponents = [with_ends(fit.exponent("n_latents", {"k": float(k)})) for k in (ks[0], ks[-1])]
        held = fit.holdout
        error = f"{held['rms_log_error']:.2%}" if held else ""
        rows.append([own.name, *kind, words, *map(typeset, exponents), f"{fit.rms_log_residual:.2%}", error])
    header = ("metric", *(["kind"] if several else []), "law of", "n^ at smallest k", "at largest k", "residual",
              "held out")  # fmt: skip
    note = (
        "L(N, k) of each metric that is not nmse or another one again, of how far it is from what an SAE that loses "
        "nothing would have: exponents of n, and the rms of what is left over of its logarithm, in the fit and of the "
        "largest N when that is held out. Coefficients are in fits.json."
    )
    return TextTable("Laws of metrics", note, header, rows, numbers=False)


def _over_n_and_k(own: MetricLaws) -> TextTable:
    cells = own.cells
    sizes, ks = np.unique(cells["n_latents"]), np.unique(cells["k"])
    rows = []
    for n in sizes:
        row = [number(n)]
        for k in ks:
            here = (cells["n_latents"] == n) & (cells["k"] == k)
            row.append(scientific(float(own.values.value[here].mean()), 4) if here.any() else "")
        rows.append(row)
    kind = f"{label}: " if (label := kind_label(own.of)) else ""
    best = "lower" if own.metric.better == "lower" else "higher"
    note = f"{best.capitalize()} is better; of several seeds the mean."
    return TextTable(f"{kind}{own.name} over N and k", note, ("N", *(f"k = {k:g}" for k in ks)), rows)
