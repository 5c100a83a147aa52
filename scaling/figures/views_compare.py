"""Figures of architectures side by side: colours and marks are the architectures', in one order everywhere."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from saescale.scaling.comparison.compare import Comparison
from saescale.scaling.comparison.scatter import interval
from saescale.scaling.figures.axes import count_axis, log_axis, power_axis
from saescale.scaling.figures.bars import file_name, interval_key
from saescale.scaling.figures.views import Label, Layer, Line, Points, View
from saescale.scaling.figures.views_cells import N_LABEL, NMSE_LABEL
from saescale.scaling.figures.views_rows import compute_ratios, dead, hierarchy, order
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.levels import measured_k
from saescale.scaling.order import BASELINES
from saescale.scaling.tables import number
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS

C_LABEL, L0_LABEL = COLUMNS["flops"].title, COLUMNS["l0"].title


def views_of_comparison(comparison: Comparison, fits: Mapping[tuple[str, float], Fit], most: int = 4) -> list[View]:
    """Every figure for which there are data, in the order in which they are read; a figure for each N, or each k, of up
    to `most`: the ends and what lies evenly between. `fits` are L(N) or L(N, k), by (architecture, k)."""
    arms = comparison.arms
    sizes, ks = (
        some((v for v in np.unique(values) if len(np.unique(arms.architecture[values == v])) > 1), most)
        for values in (arms.n_latents, arms.k)
    )
    found = [order(comparison)]
    found += [frontier(comparison, n) for n in sizes]
    found += [against_n(comparison, k, fits) for k in ks]
    found += [against_compute(comparison, k) for k in ks]
    found += [compute_ratios(comparison), hierarchy(comparison), dead(comparison)]
    return [view for view in found if view is not None]


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
        file_name(f"frontier-n{number(n)}", comparison), f"nmse against L0 at N = {n:,.0f}",
        f"What each architecture reaches with so many active latents a token, all with N = {n:,.0f}: lower is better, "
        "and further left is sparser. L0 is measured on the held-out rows.",
        f"Points: cells, seeds averaged; dotted lines join those of one architecture. "
        f"{interval_key(comparison)}{beyond}",
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
        file_name(f"by_n-k{number(k)}", comparison), f"nmse against N at k = {k:g}",
        f"Held-out nmse of each architecture against the number of latents N, with k = {k:g}; its L0 may be off k "
        "where k is a target (the figures at equal L0 say by how much).",
        f"Points: cells, seeds averaged. {lines} {interval_key(comparison)}{beyond}",
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
    drawn = {name: line for name, line in lines.items() if name in near}
    lines, beyond = (drawn, beyond) if len(drawn) > 1 else (lines, "")
    for name, (flops, nmse) in lines.items():
        layers.append(Line(flops, nmse, name, "law", name))
        layers.append(Points(flops[-1:], nmse[-1:], name, [f"{name}<br>ends at {nmse[-1]:.4f}"]))
        layers.append(Label(float(flops[-1]), float(nmse[-1]), name, name))
    flops = np.concatenate([line[0] for line in lines.values()])
    nmse = np.concatenate([line[1] for line in lines.values()])
    ends = [line[1][-1] for line in lines.values()]
    return View(
        file_name(f"by_compute-k{number(k)}", comparison), f"nmse against compute at k = {k:g}",
        "The lowest held-out nmse that an architecture has reached with so much training compute, with whichever of "
        "its N is the best there: the further left a line lies, the less compute it takes.",
        f"Lines: lower envelopes of the courses of all cells with k = {k:g}; marks at their ends.{beyond}",
        power_axis(C_LABEL, float(flops.min()), float(flops.max())),
        log_axis(NMSE_LABEL, nmse if max(ends) > 0.9 else np.minimum(nmse, 1.0)),
        comparison.arms.architectures, tuple(layers), ramp="name",
    )  # fmt: skip


def some(values: Iterable[float], most: int) -> list[float]:
    """Up to `most`: the first, the last, and what lies evenly between."""
    everything = [float(value) for value in values]
    if len(everything) <= most:
        return everything
    return [everything[int(i)] for i in np.linspace(0, len(everything) - 1, most).round()]


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
