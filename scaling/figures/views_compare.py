"""Figures of architectures side by side: colours and marks are the architectures', in one order everywhere."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from saescale.scaling.comparison.compare import Comparison
from saescale.scaling.comparison.equal_nmse import Ratios
from saescale.scaling.comparison.scatter import Interval, interval
from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis, power_axis
from saescale.scaling.figures.views import Axis, Label, Layer, Line, Points, Rule, View
from saescale.scaling.figures.views_cells import DEAD_LABEL, N_LABEL, NMSE_LABEL
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.levels import measured_k
from saescale.scaling.order import BASELINES
from saescale.scaling.tables import number
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS

C_LABEL, L0_LABEL = COLUMNS["flops"].title, COLUMNS["l0"].title
_MOST = 4  # figures of one kind: of more N or k the ends and what lies evenly between


def views_of_comparison(comparison: Comparison, fits: Mapping[tuple[str, float], Fit]) -> list[View]:
    """Every figure for which there are data, in the order in which they are read; a figure for each N, or each k, of up
    to four. `fits` are L(N) or L(N, k) of architectures, by (architecture, k)."""
    arms = comparison.arms
    sizes, ks = (
        some(v for v in np.unique(values) if len(np.unique(arms.architecture[values == v])) > 1)
        for values in (arms.n_latents, arms.k)
    )
    found = [order(comparison)]
    found += [frontier(comparison, n) for n in sizes]
    found += [against_n(comparison, k, fits) for k in ks]
    found += [against_compute(comparison, k) for k in ks]
    found += [compute_ratios(comparison), hierarchy(comparison), dead(comparison)]
    return [view for view in found if view is not None]


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
    widest = 3 * float(np.median(means))
    widest = max(mean for mean in means if mean <= widest)
    for name in ordered.architectures[1:]:
        pair = ordered.pairs.get((best, name))
        if pair is None:
            continue
        found, points = pair
        # The pair is the best less this one; shown is this one above the best.
        above = found.negative.less_one.scaled(100.0)
        text = f"{name}<br>{above.value:+.1f} % above {best}{_ends(above, '.1f')}<br>over {points} pairs of N and L0"
        if above.value > widest:
            layers.append(Label(widest, rows[name], f"{above.value:+.0f} % \u2192", name, beside=True))
            continue
        layers.append(_bar(above, rows[name], name, text))
        seen += [above.value, *(end for end in (above.low, above.high) if end is not None)]
    layers.append(Points(np.zeros(1), np.array([rows[best]]), best, [f"{best}<br>the lowest"]))
    return View(
        _name("order", comparison), "Order at equal N and equal L0",
        f"nmse of each architecture above that of {best}, on average over every N and L0 that both have. "
        "What lies within an interval of 0 is not told apart from it.",
        _interval_key(comparison), linear_axis(f"nmse above {best} (%)", seen), axis,
        comparison.arms.architectures, tuple(layers), ramp="name",
    )  # fmt: skip


def frontier(comparison: Comparison, n: float) -> View:
    """nmse against the measured L0 at one N."""
    arms = comparison.arms
    layers: list[Layer] = []
    at = arms.n_latents == n
    near, beyond = _near(comparison, at)
    for name in near:
        own = arms.at(name, n)
        own = own[np.argsort(arms.l0[own])]
        x, y = arms.l0[own], np.exp(arms.log_nmse[own])
        if len(own) > 1:
            layers.append(Line(x, y, name, "through", name))
        texts = [f"{name}<br>N = {n:,.0f}, k = {arms.k[g]:g}<br>L0 {arms.l0[g]:.2f}<br>nmse {value:.4f}"
                 for g, value in zip(own, y, strict=True)]  # fmt: skip
        layers.append(_measured(comparison, own, x, name, texts))
        layers.append(Label(float(x[-1]), float(y[-1]), name, name))
    at &= np.isin(arms.architecture, near)
    return View(
        _name(f"frontier-n{number(n)}", comparison), f"nmse against L0 at N = {n:,.0f}",
        f"What each architecture reaches with so many active latents a token, all with N = {n:,.0f}: lower is better, "
        "and further left is sparser. L0 is measured on the held-out rows.",
        f"Points: cells, seeds averaged; dotted lines join those of one architecture. "
        f"{_interval_key(comparison)}{beyond}",
        log_axis(L0_LABEL, arms.l0[at]), log_axis(NMSE_LABEL, np.exp(arms.log_nmse[at])),
        arms.architectures, tuple(layers), ramp="name",
    )  # fmt: skip


def against_n(comparison: Comparison, k: float, fits: Mapping[tuple[str, float], Fit]) -> View:
    """nmse against N at one k, with the laws of each architecture."""
    arms = comparison.arms
    layers: list[Layer] = []
    at = arms.k == k
    near, beyond = _near(comparison, at)
    lawful, measured = False, measured_k(arms.table)
    for name in near:
        own = arms.at(name, k=k)
        own = own[np.argsort(arms.n_latents[own])]
        x, y = arms.n_latents[own], np.exp(arms.log_nmse[own])
        fit = fits.get((name, k))
        if fit is not None and len(own) > 1:
            n = np.geomspace(x[0], x[-1], 40)
            there = [measured[arms.rows[group]].mean() for group in own]
            columns = {"n_latents": n, "k": np.interp(np.log(n), np.log(x), there)}
            line = fit.law.log_value(fit.raw, {c: columns[c] for c in fit.law.columns})
            layers.append(Line(n, np.exp(line), name, "law", f"law of {name}"))
            lawful = True
        elif len(own) > 1:
            layers.append(Line(x, y, name, "through", name))
        texts = [f"{name}<br>N = {arms.n_latents[g]:,.0f}, k = {k:g}<br>L0 {arms.l0[g]:.2f}<br>nmse {value:.4f}"
                 for g, value in zip(own, y, strict=True)]  # fmt: skip
        layers.append(_measured(comparison, own, x, name, texts))
        layers.append(Label(float(x[-1]), float(y[-1]), name, name))
    at &= np.isin(arms.architecture, near)
    lines = "Lines: the law of each architecture." if lawful else "Dotted lines join the cells of one architecture."
    return View(
        _name(f"by_n-k{number(k)}", comparison), f"nmse against N at k = {k:g}",
        f"Held-out nmse of each architecture against the number of latents N, with k = {k:g}; its L0 may be off k "
        "where k is a target (the figures at equal L0 say by how much).",
        f"Points: cells, seeds averaged. {lines} {_interval_key(comparison)}{beyond}",
        count_axis(N_LABEL, arms.n_latents[at]), log_axis(NMSE_LABEL, np.exp(arms.log_nmse[at])),
        arms.architectures, tuple(layers), ramp="name",
    )  # fmt: skip


def against_compute(comparison: Comparison, k: float) -> View | None:
    """The lowest nmse that any N of an architecture reaches with so much compute, at one k."""
    lines = {name: envelope.line for name, envelope in comparison.envelopes.get(k, {}).items()}
    lines = {name: line for name, line in lines.items() if len(line[0]) > 1}
    if len(lines) < 2:
        return None
    layers: list[Layer] = []
    near, beyond = _near(comparison, comparison.arms.k == k)
    lines = {name: line for name, line in lines.items() if name in near}
    for name, (flops, nmse) in lines.items():
        layers.append(Line(flops, nmse, name, "law", name))
        layers.append(Points(flops[-1:], nmse[-1:], name, [f"{name}<br>ends at {nmse[-1]:.4f}"]))
        layers.append(Label(float(flops[-1]), float(nmse[-1]), name, name))
    flops = np.concatenate([line[0] for line in lines.values()])
    nmse = np.concatenate([line[1] for line in lines.values()])
    ends = [line[1][-1] for line in lines.values()]
    return View(
        _name(f"by_compute-k{number(k)}", comparison), f"nmse against compute at k = {k:g}",
        "The lowest held-out nmse that an architecture has reached with so much training compute, with whichever of "
        "its N is the best there: the further left a line lies, the less compute it takes.",
        f"Lines: lower envelopes of the courses of all cells with k = {k:g}; marks at their ends.{beyond}",
        power_axis(C_LABEL, float(flops.min()), float(flops.max())),
        log_axis(NMSE_LABEL, nmse if max(ends) > 0.9 else np.minimum(nmse, 1.0)),
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
        both = sum(level.reached == "both" for level in ratios.levels)
        text = (f"{ratios.architecture}, k = {ratios.k:g}<br>{found.value:.2f} times the compute of {ratios.reference}"
                f"{_ends(found, '.2f')}<br>median over {both} of {len(ratios.levels)} levels of nmse")  # fmt: skip
        layers.append(_bar(found, y, ratios.k, text))
        ends = [end for end in (found.low, found.high) if end is not None]
        seen += [found.value, *(min(max(end, found.value / 3), found.value * 3) for end in ends)]
    right = max(max(seen) * 1.1, 2.0)
    for name in names:
        if missing := [r for r in comparison.ratios if r.architecture == name and r.median is None]:
            every = len(missing) == len(ks)
            text = _why(missing) + ("" if every else f" at k = {listed((f'{r.k:g}' for r in missing), ', ')}")
            layers.append(Label(1.0 if every else right, rows[name], text, None, beside=True))
    low, high = min(min(seen), 0.5), right
    return View(
        _name("compute_ratio", comparison), f"Compute for equal nmse, against {comparison.reference}",
        f"How many times the training compute of {comparison.reference} each architecture takes to reach the same "
        "nmse: the median over five levels, from what the smallest N of the reference ends with to the lowest that it "
        "reaches, as far as both reach them. Left of 1 an architecture is cheaper.",
        f"Points: one for each k. {_interval_key(comparison)}",
        log_axis(f"Compute over that of {comparison.reference}", np.array([low, high * (high / low) ** 0.25])), axis,
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
        _name("dead_by_architecture", comparison), "Dead latents by architecture",
        "Share of latents that are dead at the end of training. Above about 10 % an architecture works with fewer "
        "latents than it is compared with.",
        "Points: cells, seeds averaged; one for each N and k.",
        linear_axis(f"{DEAD_LABEL} (%)", shown, zero=True), axis, tuple(ks), tuple(layers), ramp="k",
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
                f"{found.value:+.1f} %{_ends(found, '.1f')}")  # fmt: skip
        x = gap.k * 1.03 ** (sizes.index(gap.n_latents) - (len(sizes) - 1) / 2)
        layers.append(_bar(found, x, name, text, across=False))
        seen += [found.value, *(end for end in (found.low, found.high) if end is not None)]
    ks = sorted({gap.k for gap in gaps.gaps})
    trend = ""
    if gaps.at_mid is not None and gaps.slope is not None:
        grid = np.geomspace(ks[0], ks[-1], 30)
        line = np.log1p(gaps.at_mid.value) + gaps.slope.value * np.log(grid / gaps.k_mid)
        layers.append(Line(grid, 100 * np.expm1(line), name, "law", "trend in k"))
        trend = " Line: a power of k through all of them."
    return View(
        _name("hierarchy", comparison), "One training for all k against one for each",
        "nmse of each level of a hierarchical TopK cell above that of a TopK cell of the same N trained with that k.",
        f"Points: levels of cells; those of one k stand side by side by N.{trend} {_interval_key(comparison)}",
        count_axis(COLUMNS["k"].title, ks, room=1.25), linear_axis("nmse above TopK's (%)", seen),
        (name,), tuple(layers), ramp="name",
    )  # fmt: skip


def some(values: Iterable[float]) -> list[float]:
    """Up to four: the first, the last, and what lies evenly between."""
    everything = [float(value) for value in values]
    if len(everything) <= _MOST:
        return everything
    return [everything[int(i)] for i in np.linspace(0, len(everything) - 1, _MOST).round()]


def _near(comparison: Comparison, at: np.ndarray) -> tuple[list[str], str]:
    """The architectures of the groups `at` [groups] that are drawn, and a sentence about baselines that are not: they
    would squeeze the others together."""
    arms = comparison.arms
    there = [name for name in arms.architectures if (at & (arms.architecture == name)).any()]
    trained = at & ~np.isin(arms.architecture, BASELINES)
    if not trained.any():
        return there, ""
    most = arms.log_nmse[trained].max()
    far = [name for name in there if name in BASELINES and arms.log_nmse[at & (arms.architecture == name)].max() > most]
    said = f" Above the axes: {listed(far, ', ')}." if far else ""
    return [name for name in there if name not in far], said


def _measured(comparison: Comparison, own: np.ndarray, x: np.ndarray, name: str, texts: Sequence[str]) -> Points:
    """The groups `own` at `x`, with the interval of their means."""
    draws, log_nmse = comparison.places.draws, comparison.arms.log_nmse
    found = [interval(float(log_nmse[group]), draws[:, group]) for group in own]
    low, high = (np.array([np.nan if end is None else np.exp(end) for end in ends])
                 for ends in ([f.low for f in found], [f.high for f in found]))  # fmt: skip
    there = len(draws) > 0
    return Points(x, np.exp(log_nmse[own]), name, texts, low if there else None, high if there else None)


def _bar(found: Interval, y: float, level: float | str, text: str, across: bool = True) -> Points:
    """One value with its interval, in a row at `y`; not `across`: above `y` on the other axis."""
    value, place = np.array([found.value]), np.array([y])
    low, high = (np.array([np.nan if end is None else end]) for end in (found.low, found.high))
    # Without an interval there is no bar; with one that is open at one end, a bar that leaves the axes there.
    ends = (low, high) if found.low is not None or found.high is not None else (None, None)
    x, y_ = (value, place) if across else (place, value)
    return Points(x, y_, level, [text.replace("-", "−")], *ends, across=across)


def _rows(names: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """An axis with a row for each name, the first on top, and where each is."""
    places = {name: float(len(names) - 1 - i) for i, name in enumerate(names)}
    ticks = tuple((place, name) for name, place in reversed(places.items()))
    return Axis("", "linear", -0.6, len(names) - 0.4, ticks), places


def _aside(i: int, of: int) -> float:
    """Where the i-th of several points of one row stands, from its middle: the first on top."""
    return 0.0 if of < 2 else 0.24 - 0.48 * i / (of - 1)


def _why(missing: Sequence[Ratios]) -> str:
    """Why there is no ratio at all."""
    reached = {level.reached for ratios in missing for level in ratios.levels}
    if reached == {"never"}:
        return "does not get there"
    return "is there before its curves begin" if reached == {"sooner"} else "not told"


def _ends(found: Interval, form: str) -> str:
    """ " [low, high]", or nothing where there is no interval."""
    if found.low is None and found.high is None:
        return ""
    low, high = ("open" if end is None else format(end, form) for end in (found.low, found.high))
    return f" [{low}, {high}]"


def _interval_key(comparison: Comparison) -> str:
    """What bars mean, or why there are none."""
    how = comparison.scatter.how
    return f"Bars: 95 % intervals ({how})." if comparison.scatter.sd else f"No intervals: {how}."


def _name(name: str, comparison: Comparison) -> str:
    """Of a file: where several sources are compared, with what tells them apart."""
    return "-".join([name, *(slug(value) for value in comparison.arms.of.values())])


def slug(value: object) -> str:
    """A value as a part of the name of a file."""
    return re.sub(r"[^\w.]+", "_", f"{value:g}" if isinstance(value, float) else str(value))
