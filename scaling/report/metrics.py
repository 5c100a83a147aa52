"""What a report says of the metrics of evaluations: where they peak while nmse falls and where nmse and they disagree,
in words, and their laws and values over N and k, in tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saescale.scaling.comparison.disagree import WITHIN, Cell, Contradiction, Disagreement, Ranked
from saescale.scaling.comparison.peaks import Along, Best, Peaks
from saescale.scaling.comparison.sentences import between
from saescale.scaling.figures.views_metrics import leading
from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.notes import about, fit_notes, metric_document, with_ends
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.report.text import TextTable, scientific, typeset
from saescale.scaling.tables import number
from saescale.scaling.words import listed

_SHOWN = 3  # pairs of cells, or peaks, that a sentence names
_NAMED = 6  # metrics without a law
_SYMBOLS: Mapping[Along, str] = {"k": "k", "n_latents": "N"}


def peak_sentences(peaks: Sequence[Peaks]) -> list[str]:
    """For each metric that peaks along k or N where nmse does not: at which k or N, and what is lost beyond; or that
    it cannot be told, as the intervals of its cells allow for what seems to be lost."""
    untold = [found for found in peaks if _is_untold(found)]
    said = [text for found in peaks if not _is_untold(found) and (text := _peaking(found))]
    if len(untold) == 1:
        said.append(_peaking(untold[0]))
    elif untold:
        axes: dict[str, list[str]] = {}
        for found in untold:
            axes.setdefault(f"{found.name}{_whose(found)}", []).append(_SYMBOLS[found.along])
        each = "; ".join(f"{name} in {' and '.join(along)}" for name, along in axes.items())
        said.append(
            "Whether these peak cannot be told, since the intervals of single cells allow for the difference from an "
            f"end: {each}."
        )
    return [typeset(text) for text in said]


def peak_documents(peaks: Sequence[Peaks]) -> list[dict[str, Any]]:
    """`peaks` of fits.json, each with that sentence as its `words`, "" where it has none."""
    return [found.document() | {"words": _peaking(found)} for found in peaks]


def _peaking(found: Peaks) -> str:
    alone, where, axis = found.alone, _whose(found), _SYMBOLS[found.along]
    if _is_untold(found):
        untold = (best for best in found.everywhere if best.untold_alone)
        cases = listed((f"{_at(found, best)} {_both(found, best)}" for best in untold), "; ", _SHOWN)
        return (
            f"Whether {found.name}{where} peaks in {axis} cannot be told: the intervals of single cells allow for the "
            f"difference from an end ({cases})."
        )
    if not alone:
        return ""
    falls = f"falls with {axis} at every step" if all(best.nmse_falls for best in alone) else "is lowest elsewhere"
    cases = listed((_peak(found, best) for best in alone), "; ", _SHOWN)
    text = f"{found.name}{where} peaks in {axis} while nmse {falls}: {cases}."
    if rest := [best for best in found.found if best.place is None]:
        text += f" No peak within what was tried {listed((_no_peak(found, best) for best in rest), '; ', _SHOWN)}."
    if found.power is not None:
        text += f" The best {axis} goes as {_other(found)}^{between(found.power, 2)}."
    return text


def _is_untold(found: Peaks) -> bool:
    return not found.alone and any(best.untold_alone for best in found.everywhere)


def _whose(found: Peaks) -> str:
    return f" ({label})" if (label := kind_label(found.of)) else ""


def _peak(found: Peaks, best: Best) -> str:
    """Such as "at N = 512 at k = 8.4 [7.1, 9.9] (mcc 0.87 at k = 8, and 0.77 at k = 32, where nmse is lowest)"."""
    assert best.place is not None
    return f"{_at(found, best)} at {_SYMBOLS[found.along]} = {_interval(best)} ({_both(found, best)})"


def _both(found: Peaks, best: Best) -> str:
    """The best cells, and those of the lowest nmse."""
    axis, name = _SYMBOLS[found.along], found.name.partition(".")[2] or found.name
    first, lowest = (
        f"{_about(point.value)} at {axis} = {number(point.place)}, nmse {point.nmse:.3g}"
        for point in (best.best, best.lowest)
    )
    return f"{name} {first}; {lowest}"


def _no_peak(found: Peaks, best: Best) -> str:
    axis = _SYMBOLS[found.along]
    return f"{_at(found, best)}, where {axis} = {number(best.best.place)} is best or not told apart from it"


def _interval(best: Best) -> str:
    """The place of a peak; an end that is beyond what was tried is named as that."""
    place = best.place
    assert place is not None
    if place.low is None and place.high is None:
        return _about(place.value)
    low = f"below {number(best.first)}" if place.low is None else _about(place.low)
    high = f"above {number(best.last)}" if place.high is None else _about(place.high)
    return f"{_about(place.value)} [{low}, {high}]"


def _about(value: float) -> str:
    """To three digits, and as N and k are written elsewhere: 1060, never 1.06e+03."""
    return number(float(f"{value:.3g}"))


def _other(found: Peaks) -> str:
    return "N" if found.along == "k" else "k"


def _at(found: Peaks, best: Best) -> str:
    return f"over all {_other(found)}" if best.at is None else f"at {_other(found)} = {number(best.at)}"


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
        less = "cells scatter, or than their own intervals allow for" if _untold(found) else "cells scatter"
        return [text + (f", and the others differ by less than {less}." if others else ".")]
    said: list[str] = []
    for ranked in found.ranked:
        text = (
            f"At equal {ranked.equal} {names} order {ranked.alike} of {ranked.pairs} pairs of cells alike "
            f"({ranked.equal} within a factor of {WITHIN[ranked.equal]:g}; rank correlation {ranked.correlation:.2f})"
        )
        count = len(ranked.contradictions)
        cannot = (
            f" The intervals of single cells allow for {'one' if ranked.untold == 1 else ranked.untold} more."
            if ranked.untold
            else ""
        )
        if not count:
            said.append(f"{text}, and disagree on none by more than cells scatter.{cannot}")
            continue
        cases = listed((_pair(found, c) for c in ranked.contradictions), "; ", _SHOWN)
        pairs = "one pair" if count == 1 else f"{count} pairs"
        said.append(
            f"{text}. They disagree on {pairs} by more than cells scatter: {cases}.{_other_best(found, ranked)}{cannot}"
        )
    return said


def _untold(found: Disagreement) -> bool:
    return any(ranked.untold for ranked in found.ranked)


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
        f"{_cell(found, cell)} (nmse {cell.nmse:.3g}, {found.name.rpartition('.')[2]} {_about(cell.value)})"
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
    return [about(name, note) for name in names for note in fit_notes(metric_document(document["metrics"], name))]


def metric_tables(
    metrics: Sequence[MetricLaws], shown: Sequence[MetricLaws], peaks: Sequence[Peaks] = ()
) -> list[TextTable]:
    """The laws of all metrics in one table, where they are best along k, then the values of those that are `shown` over
    N and k."""
    some = _laws(metrics), _best(peaks)
    own = _by_kind(metrics) if any(laws.of for laws in metrics) else [_over_n_and_k(laws) for laws in shown]
    return [*(table for table in some if table.rows), *own]


def _best(peaks: Sequence[Peaks]) -> TextTable:
    several = any(found.of for found in peaks)
    rows = []
    for found in peaks:
        for best in (*found.found, *([found.overall] if found.overall else [])) if found.along == "k" else ():
            kind = [kind_label(found.of)] if several else []
            nowhere = "cannot be told" if best.untold else "at an end, or flat"
            place = nowhere if best.place is None else _interval(best)
            cells = [f"k = {number(p.place)}: {p.value:.3g}, {p.nmse:.3g}" for p in (best.best, best.lowest)]
            rows.append([found.name, *kind, "all" if best.at is None else number(best.at), place, *cells])
    header = ("metric", *(["kind"] if several else []), "N", "peak in k", "best cells: metric, nmse",
              "lowest nmse: metric, nmse")  # fmt: skip
    note = (
        "Along k at each N. A peak is a place from which a metric gets worse to both sides by more than cells scatter; "
        "it cannot be told where the 95 % intervals of single cells, over the prompts or documents that they were "
        "measured on, allow for the difference from an end. Intervals of peaks are "
        "of a bootstrap over cells, 95 %."
    )
    return TextTable("Where metrics are best in k", note, header, rows, numbers=False)


def _laws(metrics: Sequence[MetricLaws]) -> TextTable:
    rows = []
    several = any(own.of for own in metrics)
    without: dict[str, list[str]] = {}  # names of metrics without a law, by the reason
    for own in metrics:
        words = own.scale.words.replace(f"{own.name.partition('.')[0]}.", "")
        fit = next((fit for fit in own.fits if fit.law.name == "n_k"), None)
        kind = [kind_label(own.of)] if several else []
        if fit is None:
            for entry in own.skipped[:1]:
                without.setdefault(entry.reason.replace(own.name, "value"), []).append(f"{own.name}{_of(own)}")
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
    lacking = [f" No law of {listed(names, ', ', _NAMED)}: {reason}." for reason, names in without.items()]
    return TextTable("Laws of metrics", note + "".join(lacking), header, rows, numbers=False)


def _of(own: MetricLaws) -> str:
    return f" ({label})" if (label := kind_label(own.of)) else ""


def _by_kind(metrics: Sequence[MetricLaws]) -> list[TextTable]:
    """Of several kinds of cells one table for the first metric of each evaluation, in place of one for each kind."""
    tables = []
    for name in dict.fromkeys(own.name for own in leading(metrics, least=1, lawful=False)):
        kinds = [own for own in metrics if own.name == name and len(own.everywhere.cells)]
        ks = np.unique(np.concatenate([own.everywhere.cells["k"] for own in kinds]))
        rows = [[kind_label(own.of), *row] for own in kinds for row in _values(own, ks)]
        note = f"{_note(kinds[0])} Cells without it are left out."
        tables.append(TextTable(f"{name} over N and k", note, ("kind", "N", *map(_k, ks)), rows))
    return tables


def _over_n_and_k(own: MetricLaws) -> TextTable:
    ks = np.unique(own.everywhere.cells["k"])
    return TextTable(f"{own.name} over N and k", _note(own), ("N", *map(_k, ks)), _values(own, ks))


def _values(own: MetricLaws, ks: np.ndarray) -> list[list[str]]:
    """A row for each N."""
    cells, values, *_ = own.everywhere
    rows = []
    for n in np.unique(cells["n_latents"]):
        row = [number(n)]
        for k in ks:
            here = (cells["n_latents"] == n) & (cells["k"] == k)
            row.append(scientific(float(values.value[here].mean()), 4) if here.any() else "")
        rows.append(row)
    return rows


def _k(k: float) -> str:
    return f"k = {k:g}"


def _note(own: MetricLaws) -> str:
    return f"{own.metric.better.capitalize()} is better; of several seeds the mean."
