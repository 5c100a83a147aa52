"""A comparison in sentences: what stands on top of a report and below the table of `saescale fit`."""

from collections.abc import Iterable, Sequence

import numpy as np

from saescale.scaling.comparison.compare import Comparison
from saescale.scaling.comparison.hierarchy import ONE_TRAINING
from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.kinds import kind_label
from saescale.scaling.order import BASELINES
from saescale.scaling.tables import number
from saescale.scaling.words import listed


def outcome(comparison: Comparison) -> list[str]:
    """Who leads, in which order the others follow, and which do not beat a baseline: plain text, a sentence each."""
    where = kind_label(comparison.arms.of)
    said = [*_leader(comparison), *_ordered(comparison), *_baselines(comparison)]
    return [f"{where}: {sentence}" if where else sentence for sentence in said]


def limits(comparisons: Iterable[Comparison]) -> list[str]:
    """What limits comparisons: cells that are in none, scatter that is not known. What holds for several sources is
    said once."""
    said: dict[str, list[str]] = {}
    for comparison in comparisons:
        for text in _limits(comparison):
            said.setdefault(text, []).append(kind_label(comparison.arms.of))
    return [(f"{listed(names, ', ')}: " if any(names) else "") + text for text, names in said.items()]


def _limits(comparison: Comparison) -> list[str]:
    said = []
    if comparison.places.left_out:
        said.append(
            "not compared at equal L0, since their own is more than 5 % beyond what was measured: "
            + listed(comparison.places.left_out)
        )
    if not comparison.scatter.sd:
        said.append(f"differences between architectures have no intervals: {comparison.scatter.how}; repeat seeds")
    elif comparison.scatter.of_surface:
        said.append("differences between architectures have rough intervals: " + comparison.scatter.how)
    return said + _budgets(comparison)


def _budgets(comparison: Comparison) -> list[str]:
    """Where architectures are compared that were trained on other numbers of tokens."""
    arms = comparison.arms
    if "tokens" not in arms.table:
        return []
    tokens = np.array([arms.table["tokens"][rows].mean() for rows in arms.rows])
    differing: dict[str, None] = {}
    for n, k in zip(arms.n_latents.tolist(), arms.k.tolist(), strict=True):
        own = np.flatnonzero((arms.n_latents == n) & (arms.k == k) & np.isfinite(tokens))
        # Rounded to batches, some are a little off.
        if len(own) > 1 and tokens[own].max() > 1.01 * tokens[own].min():
            least, most = own[np.argmin(tokens[own])], own[np.argmax(tokens[own])]
            cases = (f"{arms.architecture[i]} on {number(tokens[i])}" for i in (least, most))
            differing[f"N = {number(n)}, k = {number(k)}: {' and '.join(cases)}"] = None
    if not differing:
        return []
    return [
        f"architectures were not trained on equally many tokens, which is in their differences ({listed(differing)})"
    ]


def _leader(comparison: Comparison) -> list[str]:
    """At the largest N and the middle of its L0."""
    found = comparison.leaders()
    if not found:
        return []
    largest = max(entry["n_latents"] for entry in found)
    own = [entry for entry in found if entry["n_latents"] == largest]
    entry = own[len(own) // 2]
    leader, near = entry["leader"], entry["not_told_apart"]
    sentence = (
        f"At N = {largest:,.0f} and L0 = {entry['k']:g} {leader} leads of {len(entry['nmse'])} architectures, with "
        f"nmse {between(entry['nmse'][leader], 4)}"
    )
    if near:
        sentence += f"; {_all(near)} {'is' if len(near) == 1 else 'are'} not told apart from it"
    leads = [e["leader"] for e in found]
    if len(found) > 1:
        sentence += f". It leads at {leads.count(leader)} of the {len(found)} pairs of N and L0"
    return [sentence + "."]


def _ordered(comparison: Comparison) -> list[str]:
    words = comparison.order.words
    if not words:
        return []
    signs = ["~ where two neighbours are not told apart"] * (" ~ " in words)
    signs += ["> where those N and L0 that both have say the contrary of all others"] * (" > " in words)
    signs += ["by their values alone, without intervals"] * ("," in words)
    meaning = f" ({'; '.join(signs)})" if signs else ""
    return [f"In order of nmse at equal N and L0, the lowest first{meaning}: {words}."]


def _baselines(comparison: Comparison) -> list[str]:
    shared = [own for own in comparison.places.by_point.values() if any(name not in BASELINES for name in own)]
    there = [name for name in BASELINES if any(name in own for own in shared)]
    if not there:
        return []
    if not comparison.unbeaten:
        baselines = _all(name for name in comparison.arms.architectures if name in there)
        met = {name for own in shared if not own.keys().isdisjoint(there) for name in own}
        alone = [name for name in comparison.arms.architectures if name not in {*BASELINES, *met}]
        but = f" {_all(alone)} shared none." if alone else ""
        return [f"Every trained architecture beats {baselines} at every N and L0 that they share.{but}"]
    said = []
    for words, joined, unbeaten in (
        ("Worse than a baseline", "than", [u for u in comparison.unbeaten if u.difference.value >= 0]),
        ("Not told apart from a baseline", "from", [u for u in comparison.unbeaten if u.difference.value < 0]),
    ):
        cases: dict[tuple[str, str], list[str]] = {}
        for u in unbeaten:
            place = f"N = {number(u.n_latents)}, L0 = {u.k:g} ({100 * u.difference.less_one.value:+.1f} %)"
            cases.setdefault((u.architecture, u.baseline), []).append(place)
        if cases:
            each = (f"{name} {joined} {one} at {listed(places, ', ', 3)}" for (name, one), places in cases.items())
            said.append(f"{words}: {listed(each)}.")
    return said


def ratios(comparison: Comparison) -> list[str]:
    """Compute for equal nmse, for each architecture that gets there at some k, at the k in the middle."""
    ks = sorted({r.k for r in comparison.ratios})
    if not ks:
        return []
    k = ks[len(ks) // 2]
    own = [r for r in comparison.ratios if r.k == k and r.median is not None and r.architecture not in BASELINES]
    if not own:
        return []
    cases = (f"{r.architecture} {between(r.median, 2)}" for r in own if r.median is not None)
    return [
        f"For equal nmse at k = {k:g}, as multiples of the compute of {comparison.reference}: "
        f"{listed(cases, ', ', 12)}."
    ]


def hierarchy(comparison: Comparison) -> list[str]:
    """How far the levels of one training lie above cells trained for each k."""
    gaps = comparison.gaps
    if gaps is None:
        return []
    worst = max(gaps.gaps, key=lambda gap: gap.gap.value)
    text = (
        f"The levels of {ONE_TRAINING} lie up to {100 * worst.gap.value:.1f} % above topk cells of the same N and k "
        f"(N = {number(worst.n_latents)}, k = {worst.k:g})"
    )
    if gaps.at_mid is not None and gaps.slope is not None:
        text += (
            f"; by a power of k {between(gaps.at_mid.scaled(100), 1)} % at k = {gaps.k_mid:.3g}, with exponent "
            f"{between(gaps.slope, 3)}"
        )
    return [text + "."]


def between(found: Interval, digits: int) -> str:
    """ "0.30 [0.29, 0.31]", without brackets where there is no interval."""
    text = f"{found.value:.{digits}f}"
    if found.low is None and found.high is None:
        return text
    low, high = ("open" if end is None else f"{end:.{digits}f}" for end in (found.low, found.high))
    return f"{text} [{low}, {high}]"


def _all(names: Sequence[str] | Iterable[str]) -> str:
    """ "a, b and c"."""
    everything = list(names)
    return " and ".join(filter(None, [", ".join(everything[:-1]), everything[-1]]))
