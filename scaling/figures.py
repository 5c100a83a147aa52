"""Three figures for a paper: nmse against N, nmse against compute, dead latents. PNG through matplotlib's Agg."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling.estimate import Fit
from scaling.fit import Laws
from scaling.laws import C_FLOOR, N_FLOOR, N_K
from storage.files import join, write_atomic

Colour = tuple[float, float, float, float]

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.direction": "out",
    "savefig.dpi": 200,
    "mathtext.fontset": "dejavusans",
}
_BAND = 1.5
_SYMBOLS = {
    "alpha": r"\alpha", "beta_k": r"\beta_k", "beta_n": r"\beta_n", "gamma": r"\gamma",
    "zeta": r"\zeta", "eta": r"\eta",
}  # fmt: skip
_N_K_FORMULA = (
    r"$\mathrm{nmse} = \exp(\alpha + \beta_k\,\ln k + \beta_n\,\ln n + \gamma\,\ln k\,\ln n)"
    r" + \exp(\zeta + \eta\,\ln k)$"
)


def draw_figures(laws: Laws, folder: str) -> dict[str, bytes]:
    """Writes the figures to `folder` (any fsspec URL) and returns their PNG bytes by file name.

    `laws.results` has columns n_latents and k. A figure without data (no curves, no dead fraction) is left out.
    Raises SaescaleError when `folder` cannot be written.
    """
    figures = {"nmse_against_n.png": draw_nmse_against_n}
    if any(laws.curves.values()):
        figures["nmse_against_compute.png"] = draw_nmse_against_compute
    if "dead_fraction" in laws.results and np.isfinite(laws.results["dead_fraction"]).all():
        figures["dead_fraction.png"] = draw_dead_fraction
    drawn = {}
    for name, draw in figures.items():
        png = _png(draw, laws)
        write_atomic(join(folder, name), png)
        drawn[name] = png
    return drawn


def draw_nmse_against_n(laws: Laws) -> Figure:
    """Held-out nmse of every cell against N, one colour per k, with L(N, k) or, without it, L(N) at each k."""
    figure, axes = _axes("Latents N", "Held-out normalised MSE (nmse)")
    results, colours = laws.results, _colours(laws.results["k"])
    n_k = next((fit for fit in laws.fits if fit.law is N_K), None)
    at_k = _one_form(laws, "n")
    labels = []
    shown = [results["nmse"]]
    n = np.geomspace(results["n_latents"].min(), results["n_latents"].max(), 100)
    for k, colour in colours.items():
        own = results["k"] == k
        axes.plot(results["n_latents"][own], results["nmse"][own], "o", ms=5.5, color=colour, mec="white", mew=0.7,
                  zorder=3)  # fmt: skip
        fit = n_k or at_k.get(k)
        end = results["nmse"][own][np.argmax(results["n_latents"][own])]
        label = f"k = {k:g}"
        if fit is not None:
            columns = {"n_latents": n, "k": np.full_like(n, k)}
            line = fit.predict({c: columns[c] for c in fit.law.columns})
            axes.plot(n, line.value, "-", lw=1.5, color=colour)
            if np.isfinite(line.low).all():
                axes.fill_between(n, line.low, line.high, color=colour, alpha=0.18, lw=0)
                shown += [line.low, line.high]
            if fit is not n_k:
                label += f" (a = {fit.law.to_reported(fit.raw)[1]:.3f})"
        else:
            order = np.argsort(results["n_latents"][own])
            axes.plot(results["n_latents"][own][order], results["nmse"][own][order], ":", lw=1, color=colour)
        labels.append((float(end), label, colour))
    # Bands may be as wide as they like, but must not squeeze the cells together.
    least, most = results["nmse"].min() / _BAND, results["nmse"].max() * _BAND
    _log_axis(axes, np.clip(np.concatenate(shown), least, most))
    _count_axis(axes, results["n_latents"])
    if n_k:
        _caption(figure, [_N_K_FORMULA, *_coefficients(n_k)])
    elif at_k:
        floor = r" + E" if N_FLOOR in [fit.law for fit in at_k.values()] else ""
        _caption(figure, [rf"$\mathrm{{nmse}} = A\,n^{{-a}}{floor}$ at each $k$. Shaded: 95 % bootstrap interval."])
    else:
        _caption(figure, ["No law fitted (the report says why). Dotted lines join the cells of one k."])
    _label_ends(figure, axes, float(results["n_latents"].max()), labels)
    return figure


def draw_nmse_against_compute(laws: Laws) -> Figure:
    """Every cell's held-out curve (thin) and, at each k, the frontier (thick) with its law (dashed)."""
    figure, axes = _axes("Training compute (FLOPs, sparse)", "Held-out normalised MSE (nmse)", labels=0.26)
    colours = _colours(laws.results["k"])
    frontiers = {f.at["k"]: f for f in laws.frontiers}
    of_compute = _one_form(laws, "c")
    seen, labels, ends_at = [], [], []
    right = 0.0
    for k, curves in laws.curves.items():
        ends = []
        for curve in curves:
            axes.plot(curve.flops, np.exp(curve.log_nmse), "-", lw=0.7, alpha=0.45, color=colours[k], zorder=2)
            # The first evaluations would stretch the axis over what the laws do not describe.
            seen.append(np.exp(curve.log_nmse[curve.flops >= 0.05 * curve.flops[-1]]))
            right = max(right, float(curve.flops[-1]))
            ends.append((float(curve.flops[-1]), float(np.exp(curve.log_nmse[-1]))))
        if not ends:
            continue
        ends_at += [nmse for _, nmse in ends]
        label = f"k = {k:g}"
        if k in frontiers:
            frontier = frontiers[k]
            axes.plot(frontier.flops, frontier.nmse, "-", lw=2.6, color=colours[k], zorder=3)
            fit = of_compute.get(k)
            if fit is not None:
                c = np.geomspace(frontier.flops[0], frontier.flops[-1], 60)
                axes.plot(c, fit.predict({"flops": c}).value, "--", lw=1.1, color="black", zorder=4)
                label += f" (a = {fit.law.to_reported(fit.raw)[1]:.2f})"
        labels.append((max(ends)[1], label, colours[k]))
    values = np.concatenate(seen)
    # nmse = 1 is what the mean reconstructs: what lies above is the start of training.
    _log_axis(axes, values if max(ends_at) > 0.9 else np.minimum(values, 1.0))
    low = min(float(c.flops[0]) for curves in laws.curves.values() for c in curves)
    axes.set_xscale("log")
    axes.set_xlim(low * 0.9, right * 1.1)
    if right / low < 100:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _scientific(v)))
    axes.xaxis.set_minor_locator(LogLocator(subs=tuple(range(1, 10)), numticks=99))
    axes.xaxis.set_minor_formatter(NullFormatter())
    note = "Thin: held-out curves of all cells."
    if laws.frontiers:
        note += " Thick: compute frontier at each k."
    if of_compute:
        form = r"A\,C^{-a} + E" if C_FLOOR in [fit.law for fit in of_compute.values()] else r"A\,C^{-a}"
        note += rf" Dashed: its law $\mathrm{{nmse}} = {form}$."
    _caption(figure, [note])
    _label_ends(figure, axes, right, labels)
    return figure


def draw_dead_fraction(laws: Laws) -> Figure:
    """Dead latents of every cell in per cent against N, one colour per k."""
    figure, axes = _axes("Latents N", "Dead latents (%)")
    results = laws.results
    labels = []
    for k, colour in _colours(results["k"]).items():
        own = results["k"] == k
        sizes = np.unique(results["n_latents"][own])
        per_size = [100 * results["dead_fraction"][own & (results["n_latents"] == n)] for n in sizes]
        axes.plot(sizes, [d.mean() for d in per_size], "-", lw=1.3, color=colour)
        axes.plot(results["n_latents"][own], 100 * results["dead_fraction"][own], "o", ms=5, color=colour,
                  mec="white", mew=0.7, clip_on=False, zorder=3)  # fmt: skip
        labels.append((float(per_size[-1].mean()), f"k = {k:g}", colour))
    axes.set_ylim(0, max(1.0, 105 * float(results["dead_fraction"].max())))
    _count_axis(axes, results["n_latents"])
    _label_ends(figure, axes, float(results["n_latents"].max()), labels)
    return figure


def _axes(x: str, y: str, labels: float = 0.15) -> tuple[Figure, Axes]:
    """A figure whose right `labels` (a fraction of its width) is left for the labels of the lines."""
    figure = Figure(figsize=(6.6, 4.4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.115, 0.13, 0.885 - labels, 0.84))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _png(draw: Callable[[Laws], Figure], laws: Laws) -> bytes:
    buffer = BytesIO()
    with matplotlib.rc_context(_STYLE):
        # Without fixed metadata the bytes would differ between matplotlib's versions of the same picture.
        draw(laws).savefig(buffer, format="png", metadata={"Software": "saescale"})
    return buffer.getvalue()


def _colours(ks: np.ndarray) -> dict[float, Colour]:
    """A colour per k, dark to light with k; viridis without its palest end, told apart by the colour-blind."""
    values = np.unique(ks)
    places = np.linspace(0.0, 0.82, len(values)) if len(values) > 1 else np.array([0.3])
    return {float(k): matplotlib.colormaps["viridis"](p) for k, p in zip(values, places, strict=True)}


def _one_form(laws: Laws, name: str) -> dict[float, Fit]:
    """The fits of law `name` by k, all of one form so that their exponents compare: with the floor where its
    held-out error is the smaller on average, else without."""
    by_form: dict[str, dict[float, Fit]] = {}
    for fit in laws.fits:
        if fit.law.name == name:
            by_form.setdefault(fit.law.formula, {})[fit.at["k"]] = fit
    forms = list(by_form.values())
    complete = [form for form in forms if len(form) == max(map(len, forms))]
    return min(complete, key=_held_out_error) if complete else {}


def _held_out_error(form: dict[float, Fit]) -> float:
    errors = [float(str(fit.holdout["rms_log_error"])) if fit.holdout else np.inf for fit in form.values()]
    return float(np.mean(errors))


def _count_axis(axes: Axes, counts: np.ndarray) -> None:
    """A log2 axis with the counts that occur as integer tick labels, thinned where there are many."""
    values = np.unique(counts)
    axes.set_xscale("log", base=2)
    axes.set_xlim(values[0] / 1.12, values[-1] * 1.12)
    step = -(-len(values) // 8)
    axes.xaxis.set_major_locator(FixedLocator(values[::step].tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    """A log y axis with round ticks in plain numbers, also over much less than a decade, and finer ones between."""
    low, high = float(values.min()) * 0.96, float(values.max()) * 1.04
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    choices = ([1], [1, 2, 5], [1, 2, 3, 5, 7], range(1, 10), np.arange(1, 10, 0.5), np.arange(1, 10, 0.2),
               np.arange(1, 10, 0.1), np.arange(1, 10, 0.02))  # fmt: skip
    ticks = [np.outer(decades, mantissas).ravel() for mantissas in choices]
    ticks = [values[(values >= low) & (values <= high)] for values in ticks]
    enough = next((i for i, values in enumerate(ticks) if len(values) >= 4), len(ticks) - 1)
    major = ticks[enough]
    axes.yaxis.set_major_locator(FixedLocator(major.tolist()))
    divided = (
        v
        for v in ticks[enough + 1 :]
        if len(v) > 1.5 * len(major) and np.isclose(v[:, None], major).sum() == len(major)
    )
    axes.yaxis.set_minor_locator(FixedLocator(next(divided, major).tolist()))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))


def _scientific(value: float) -> str:
    power = int(np.floor(np.log10(value) + 1e-9))
    return rf"${value / 10.0**power:.0f}\times10^{{{power}}}$"


def _label_ends(figure: Figure, axes: Axes, x: float, labels: list[tuple[float, str, Colour]]) -> None:
    """Labels right of the lines' ends at (x, y), moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = np.array([to_axes.transform((x, y))[1] for y, _, _ in labels])
    order = np.argsort(wanted)
    height = axes.get_window_extent().height / figure.dpi
    places = _spread(np.clip(wanted[order], 0.0, 1.0), gap=9.5 * 1.25 / 72 / height)
    for place, i in zip(places, order, strict=True):
        _, text, colour = labels[i]
        axes.annotate(
            text,
            xy=(x, labels[i][0]), xycoords="data",
            xytext=(1.03, place), textcoords="axes fraction",
            color=tuple(0.8 * c for c in colour[:3]), va="center", ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(places: np.ndarray, gap: float) -> np.ndarray:
    """Sorted places within 0 to 1, moved as little as needed to be `gap` apart: neighbours that would overlap
    share their centre."""
    groups: list[tuple[float, int]] = []
    for place in places:
        centre, count = float(place), 1
        while groups and centre - (count - 1) * gap / 2 < groups[-1][0] + (groups[-1][1] + 1) * gap / 2:
            before, members = groups.pop()
            centre = (before * members + centre * count) / (members + count)
            count += members
            half = (count - 1) * gap / 2
            centre = min(max(centre, half), 1 - half)
        groups.append((centre, count))
    return np.concatenate([c + gap * (np.arange(m) - (m - 1) / 2) for c, m in groups])


def _coefficients(fit: Fit) -> list[str]:
    """The coefficients with intervals, three to a line."""
    entry = fit.document()["coefficients"]
    assert isinstance(entry, dict)
    texts = []
    for name, value in entry.items():
        text = rf"${_SYMBOLS.get(name, name)} = {value['value']:.3f}$"
        if value["low"] is not None:
            text += rf" $[{value['low']:.3f},\ {value['high']:.3f}]$"
        texts.append(text)
    return ["    ".join(texts[i : i + 3]) for i in range(0, len(texts), 3)]


def _caption(figure: Figure, lines: list[str]) -> None:
    """Lines of text below the axes, which make room for them."""
    axes, space = figure.axes[0], 0.047 * len(lines) + 0.012
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom + space, width, height - space))
    for i, line in enumerate(reversed(lines)):
        figure.text(0.5, 0.028 + 0.047 * i, line, ha="center", va="center", fontsize=8.5, color="#333333")
