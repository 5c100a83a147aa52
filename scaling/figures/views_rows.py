"""Figures with a row for each architecture: the order, compute for equal nmse, dead latents; and the levels of one
training."""

from collections.abc import Sequence

import numpy as np

from saescale.scaling.comparison.compare import Comparison
from saescale.scaling.comparison.equal_nmse import Ratios
from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis
from saescale.scaling.figures.bars import bar, ends_text, file_name, interval_key
from saescale.scaling.figures.views import Axis, Label, Layer, Line, Points, Rule, View, shortened
from saescale.scaling.figures.views_cells import DEAD_LABEL
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS


def order(comparison: Comparison) -> View | None:
    """By how much each architecture's nmse lies above that of the best, on average over what they share."""
    ordered = comparison.order
    if len(ordered.architectures) < 2:
        return None
    best = ordered.architectures[0]
    axis, rows = _rows(ordered.architectures)
    layers: list[Layer] = [Rule(None, 0.0)]
    seen = [0.0]
    # What is much worse than the middle of the field would squeeze the rest together.
    means = [ordered.pairs[pair][0].negative.less_one.value * 100 for pair in ordered.pairs if pair[0] == best]
    limit = 3 * abs(float(np.median(means)))
    widest = max([mean for mean in means if mean <= limit] or means)
    for name in ordered.architectures[1:]:
        pair = ordered.pairs.get((best, name))
        if pair is None:
            continue
        found, points = pair
        # The pair is the best less this one; shown is this one above the best.
        above = found.negative.less_one.scaled(100.0)
        text = (
            f"{name}<br>{above.value:+.1f} % above {best}{ends_text(above, '.1f')}<br>over {points} pairs of N and L0"
        )
        if above.value > widest:
            # Well inside of the axes: a narrow page would cut it off at their end.
            layers.append(Label(0.6 * widest, rows[name], f"{above.value:+.0f} % \u2192", name, where="row"))
            continue
        layers.append(bar(above, rows[name], name, text))
        seen += [above.value, *(end for end in (above.low, above.high) if end is not None)]
    layers.append(Points(np.zeros(1), np.array([rows[best]]), best, [f"{best}<br>the lowest"]))
    return View(
        file_name("order", comparison), "Order at equal N and equal L0",
        f"nmse of each architecture above that of {best}, on average over every N and L0 that both have. "
        "What lies within an interval of 0 is not told apart from it.",
        interval_key(comparison), linear_axis(f"nmse above {best} (%)", seen), axis,
        comparison.arms.architectures, tuple(layers), ramp="name",
    )  # fmt: skip


def compute_ratios(comparison: Comparison) -> View | None:
    """Compute for equal nmse, over that of the reference: a row for each architecture, a point for each k."""
    if not comparison.ratios:
        return None
    names = [name for name in comparison.arms.architectures if any(r.architecture == name for r in comparison.ratios)]
    ks = sorted({ratios.k for ratios in comparison.ratios})
    axis, rows = _rows(names)
    layers: list[Layer] = [Rule(None, 1.0)]
    seen = [1.0]
    for ratios in comparison.ratios:
        if (found := ratios.median) is None:
            continue
        y = rows[ratios.architecture] + _aside(ks.index(ratios.k), len(ks))
        text = (f"{ratios.architecture}, k = {ratios.k:g}<br>{found.value:.2f} times the compute of {ratios.reference}"
                f"{ends_text(found, '.2f')}<br>median over {len(ratios.levels)} levels of nmse")  # fmt: skip
        layers.append(bar(found, y, ratios.k, text))
        ends = [end for end in (found.low, found.high) if end is not None]
        seen += [found.value, *(min(max(end, found.value / 3), found.value * 3) for end in ends)]
    right = max(max(seen) * 1.1, 2.0)
    for name in names:
        if missing := [r for r in comparison.ratios if r.architecture == name and r.median is None]:
            every = len(missing) == len(ks)
            text = _why(missing) + ("" if every else f" at k = {listed((f'{r.k:g}' for r in missing), ', ')}")
            layers.append(Label(1.0 if every else right, rows[name], text, None, where="row"))
    low, high = min(min(seen), 0.5), right
    across = f"Compute over that of {comparison.reference}{_from_the_top(ks)}"
    return View(
        file_name("compute_ratio", comparison), f"Compute for equal nmse, against {comparison.reference}",
        f"How many times the training compute of {comparison.reference} each architecture takes to reach the same "
        "nmse: the median over five levels, from what the smallest N of the reference ends with to the lowest that it "
        "reaches; one that is never reached counts as more than any ratio. Left of 1 an architecture is cheaper.",
        f"Points: one for each k. {interval_key(comparison)}",
        log_axis(across, np.array([low, high * (high / low) ** 0.25])), axis,
        tuple(ks), tuple(layers), ramp="k",
    )  # fmt: skip


def dead(comparison: Comparison) -> View | None:
    """Dead latents of every architecture: a row for each, a point for each N and k."""
    arms = comparison.arms
    if not np.isfinite(arms.dead).any():
        return None
    ks = np.unique(arms.k).tolist()
    axis, rows = _rows(arms.architectures)
    layers: list[Layer] = []
    for i, k in enumerate(ks):
        own = np.flatnonzero((arms.k == k) & np.isfinite(arms.dead))
        y = np.array([rows[arms.architecture[g]] + _aside(i, len(ks)) for g in own])
        texts = [f"{arms.architecture[g]}<br>N = {arms.n_latents[g]:,.0f}, k = {k:g}<br>dead {arms.dead[g]:.2%}"
                 for g in own]  # fmt: skip
        layers.append(Points(100 * arms.dead[own], y, k, texts))
    shown = [*(100 * arms.dead[np.isfinite(arms.dead)]), 1.0]
    return View(
        file_name("dead_by_architecture", comparison), "Dead latents by architecture",
        "Share of latents that are dead at the end of training. Above about 10 % an architecture works with fewer "
        "latents than it is compared with.",
        "Points: cells, seeds averaged; one for each N and k.",
        linear_axis(f"{DEAD_LABEL} (%){_from_the_top(ks)}", shown, zero=True), axis, tuple(ks), tuple(layers), ramp="k",
    )  # fmt: skip


def hierarchy(comparison: Comparison) -> View | None:
    """The levels of one hierarchical training against TopK cells trained at each k."""
    gaps = comparison.gaps
    if gaps is None:
        return None
    layers: list[Layer] = [Rule(0.0)]
    name = "hierarchical_topk"
    seen = [0.0]
    sizes = sorted({gap.n_latents for gap in gaps.gaps})
    for gap in gaps.gaps:
        found = gap.gap.scaled(100.0)
        text = (f"N = {gap.n_latents:,.0f}, level k = {gap.k:g}<br>trained with k = {gap.trained:g}<br>"
                f"{found.value:+.1f} %{ends_text(found, '.1f')}")  # fmt: skip
        x = gap.k * 1.03 ** (sizes.index(gap.n_latents) - (len(sizes) - 1) / 2)
        layers.append(bar(found, x, name, text, across=False))
        seen += [found.value, *(end for end in (found.low, found.high) if end is not None)]
    ks = sorted({gap.k for gap in gaps.gaps})
    trend = ""
    if gaps.at_mid is not None and gaps.slope is not None:
        grid = np.geomspace(ks[0], ks[-1], 30)
        line = np.log1p(gaps.at_mid.value) + gaps.slope.value * np.log(grid / gaps.k_mid)
        layers.append(Line(grid, 100 * np.expm1(line), name, "law", "trend in k"))
        trend = " Line: a power of k through all of them."
    return View(
        file_name("hierarchy", comparison), "One training for all k against one for each",
        "nmse of each level of a hierarchical TopK cell above that of a TopK cell of the same N trained with that k.",
        f"Points: levels of cells; those of one k stand side by side by N.{trend} {interval_key(comparison)}",
        count_axis(COLUMNS["k"].title, ks, room=1.25), linear_axis("nmse above TopK's (%)", seen),
        (name,), tuple(layers), ramp="name",
    )  # fmt: skip


def _rows(names: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """An axis with a row for each name, the first on top, and where each is."""
    places = {name: float(len(names) - 1 - i) for i, name in enumerate(names)}
    ticks = tuple((place, shortened(name)) for name, place in reversed(places.items()))
    return Axis("", "linear", -0.6, len(names) - 0.4, ticks), places


def _aside(i: int, of: int) -> float:
    """Where the i-th of several points of one row stands, from its middle: the first on top."""
    return 0.0 if of < 2 else 0.24 - 0.48 * i / (of - 1)


def _from_the_top(ks: Sequence[float]) -> str:
    """Which k the points of a row are of, in a file without the page around it too."""
    if len(ks) < 2:
        return ""
    named = listed([f"{k:g}" for k in ks], ", ") if len(ks) <= 5 else f"{ks[0]:g} to {ks[-1]:g}"
    return f"; k = {named} from the top"


def _why(missing: Sequence[Ratios]) -> str:
    """Why there is no ratio at all."""
    reached = {ratios.reached for ratios in missing}
    if reached == {"never"}:
        return "does not get there"
    return "is there before its curves begin" if reached == {"sooner"} else "not told"
