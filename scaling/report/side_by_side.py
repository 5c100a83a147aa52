"""What a report says of kinds of cells side by side: tables of architectures at equal L0 and nmse, and of depth."""

from collections.abc import Iterable

import numpy as np

from saescale.scaling.comparison.compare import Comparison, SideBySide
from saescale.scaling.comparison.depth import AtDepth
from saescale.scaling.comparison.equal_nmse import Ratio, Ratios, Reached
from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.comparison.sentences import between, hierarchy, outcome, ratios
from saescale.scaling.figures.figures import MOST_COMPARISONS
from saescale.scaling.figures.views import shortened
from saescale.scaling.kinds import kind_label
from saescale.scaling.report.text import TextTable, typeset
from saescale.scaling.tables import number

_MOST_POINTS = 12  # of N and L0 in one table


def summary(sides: SideBySide) -> list[str]:
    """What stands on top of a report, of the first comparisons."""
    first = sides.comparisons[:MOST_COMPARISONS]
    sentences = [sentence for comparison in first for sentence in outcome(comparison)]
    if left := len(sides.comparisons) - len(first):
        sentences.append(f"{left} more sources on which architectures compare are in fits.json.")
    return [typeset(sentence) for sentence in sentences]


def said(comparison: Comparison) -> list[str]:
    """What stands below the heading of a comparison, besides what is on top."""
    return [typeset(sentence) for sentence in (*ratios(comparison), *hierarchy(comparison))]


def comparison_tables(comparison: Comparison) -> list[TextTable]:
    """All of them: one row for each architecture, in the order of what they reach."""
    found = [overall_table(comparison), _at_each(comparison), *_equal_nmse(comparison), _levels(comparison)]
    return [table for table in found if table is not None and table.rows]


def depth_table(depth: Iterable[AtDepth]) -> TextTable | None:
    """Exponent and floor of each layer at each k."""
    found = list(depth)
    floors = {_place(entry): entry.value for entry in found if entry.quantity == "floor"}
    rows = [
        [entry.subject, entry.architecture, f"{entry.layer:g}", f"{entry.k:g}", *_cells(entry.value, 3),
         *_cells(floors[_place(entry)], 4)]
        for entry in found if entry.quantity == "exponent"
    ]  # fmt: skip
    if not rows:
        return None
    header = ("subject", "architecture", "layer", "k", "exponent of n", "95 % interval", "floor", "95 % interval")
    kept = [i for i, name in enumerate(header) if i > 1 or any(row[i] for row in rows)]
    note = "Of the reducible part of nmse, and what remains of it, in the law of each layer."
    return TextTable("Laws over depth", note, [header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def heading(comparison: Comparison) -> str:
    """Of its part of a report."""
    where = kind_label(comparison.arms.of)
    return "Architectures side by side" + (f": {where}" if where else "")


def overall_table(comparison: Comparison, one_k: bool = False) -> TextTable:
    """Each architecture in a row: how far above the best, for how much compute, with how many dead latents. `one_k`: of
    the ratios of compute those at the k in the middle alone."""
    arms, order = comparison.arms, comparison.order
    names = [*order.architectures, *(name for name in arms.architectures if name not in order.architectures)]
    ks = sorted({r.k for r in comparison.ratios})
    ks = ks[len(ks) // 2 :][:1] if one_k else ks
    leads = [entry["leader"] for entry in comparison.leaders()]
    medians = {(r.architecture, r.k): r for r in comparison.ratios}
    rows = []
    for name in names:
        pair = order.pairs.get((names[0], name))
        above = pair[0].negative.less_one.scaled(100) if pair else None
        own = arms.dead[arms.at(name)]
        off = 100 * (arms.l0 / arms.k - 1)[arms.at(name)]
        row = [name, "" if above is None else _signed(above.value), "" if above is None else _interval(above, 1)]
        row += [f"{leads.count(name)}"]
        for k in ks:
            one = medians.get((name, k))
            row.append("1" if name == comparison.reference else "" if one is None else _ratio_text(one))
        row.append(f"{100 * own[np.isfinite(own)].max():.1f} %" if np.isfinite(own).any() else "")
        row.append(f"{_signed(off[np.argmax(np.abs(off))])} %")
        rows.append([typeset(text) for text in row])
    best = names[0]
    compute = [f"compute, k = {k:g}" for k in ks]
    note = (
        f"nmse above that of {best} in per cent, on average over every N and L0 that both have; how often an "
        f"architecture leads; compute for equal nmse as multiples of that of {comparison.reference}; the largest share "
        "of dead latents; and how far the measured L0 is off k at most."
    )
    header = ("architecture", f"% above {shortened(best)}", "95 % interval", "leads", *compute, "dead", "L0")
    return TextTable("Architectures at equal N and L0", note, header, rows)


def _at_each(comparison: Comparison) -> TextTable | None:
    """nmse at each N and L0; of many those of the largest N."""
    points = list(comparison.places.by_point)[-_MOST_POINTS:]
    if not points:
        return None
    own = comparison.places.by_point
    rows = []
    for name in comparison.order.architectures:
        row = [name]
        for point in points:
            place = own[point].get(name)
            row.append("" if place is None else between(comparison.places.nmse(place), 4))
        rows.append(row)
    left = len(own) - len(points)
    note = "nmse where the measured L0 is k, interpolated between cells of one N where it is not."
    note += f" {left} more pairs of N and L0 are in fits.json." if left else ""
    header = ("architecture", *(f"N = {number(n)}, L0 = {k:g}" for n, k in points))
    return TextTable("nmse at each N and L0", note, header, rows)


def _equal_nmse(comparison: Comparison) -> list[TextTable]:
    """The ratios of compute at each level of nmse, a table for each k."""
    found = []
    for k in sorted({r.k for r in comparison.ratios}):
        own = [r for r in comparison.ratios if r.k == k]
        if all(r.median is None for r in own):
            continue
        header = ("architecture", "median", *(f"nmse {level.nmse:.3f}" for level in own[0].levels))
        rows = [[r.architecture, _ratio_text(r), *(_level_text(level) for level in r.levels)] for r in own]
        note = f"Training compute as multiples of what {comparison.reference} takes for the same nmse. "
        note += "Cells whose L0 is more than 10 % off k have no part."
        found.append(TextTable(f"Compute for equal nmse at k = {k:g}", note, header, rows))
    return found


def _levels(comparison: Comparison) -> TextTable | None:
    if comparison.gaps is None:
        return None
    rows = [
        [number(gap.n_latents), f"{gap.k:g}", f"{gap.trained:g}", *_cells(gap.gap.scaled(100), 1)]
        for gap in comparison.gaps.gaps
    ]
    note = "nmse of a level of one hierarchical training above that of topk cells of the same N trained with that k."
    header = ("N", "level k", "trained with k", "gap in %", "95 % interval")
    return TextTable("One training for all k", note, header, rows)


def _place(entry: AtDepth) -> tuple[str, str, float, float]:
    return entry.subject, entry.architecture, entry.layer, entry.k


def _cells(found: Interval, digits: int) -> tuple[str, str]:
    return typeset(f"{found.value:.{digits}f}"), typeset(_interval(found, digits))


def _interval(found: Interval, digits: int) -> str:
    if found.low is None and found.high is None:
        return ""
    low, high = ("open" if end is None else f"{end:.{digits}f}" for end in (found.low, found.high))
    return f"{low} to {high}"


def _ratio_text(found: Ratios) -> str:
    return _or_why(found.median, found.reached)


def _level_text(level: Ratio) -> str:
    return _or_why(level.ratio, level.reached)


def _or_why(ratio: Interval | None, reached: Reached) -> str:
    if ratio is not None:
        return between(ratio, 2)
    return "not reached" if reached == "never" else "before its curves begin"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"
