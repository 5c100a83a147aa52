"""Figures of metrics of evaluations: each against N with its law, as nmse is, against k, and against nmse; beside it
what it is read beside, such as the same of random latents."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis
from saescale.scaling.figures.bars import slug
from saescale.scaling.figures.views import Label, Layer, Level, Line, Points, View
from saescale.scaling.figures.views_cells import NMSE_LABEL, ks_of, nmse_against_n
from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.over_metrics import MetricLaws, Seen
from saescale.storage.columns import COLUMNS

SHOWN = 6  # metrics with figures, of each kind of cells
_EACH = 3  # of them of one evaluation
_LONGEST = 30  # letters of what an axis says
_FIRST, _LAST = "downstream_loss", "core"  # what an SAE is for before all else; what is mostly nmse again


def leading(metrics: Sequence[MetricLaws], least: int = 2, lawful: bool = True) -> list[MetricLaws]:
    """Those that figures and sentences are about: of each evaluation its first metric, or the first three that it says
    lead, for each kind of cells of which `least` have it (`lawful`: away from its limit); at most six metrics, that of
    the downstream loss before the others and core's behind them. Every evaluation has its first before any has a
    second."""
    there = [laws for laws in metrics if len(laws.cells if lawful else laws.everywhere.cells) >= least]
    names: dict[str, list[str]] = {}
    for laws in sorted(there, key=lambda laws: not laws.metric.leads):
        own = names.setdefault(laws.name.partition(".")[0], [])
        if laws.name not in own and len(own) < (_EACH if laws.metric.leads else 1):
            own.append(laws.name)
    evaluations = dict.fromkeys(laws.name.partition(".")[0] for laws in there)
    order = sorted(evaluations, key=lambda name: (name == _LAST) - (name == _FIRST))
    places = sorted((rank, order.index(name), own) for name in order for rank, own in enumerate(names[name]))
    chosen = [own for _, _, own in sorted(places[:SHOWN], key=lambda place: (place[1], place[0]))]
    return [laws for name in chosen for laws in there if laws.name == name]


def metric_against_n(laws: MetricLaws) -> View:
    """A metric of every cell against N, one colour per k, with its law, as that of nmse is drawn."""
    view = nmse_against_n(laws.laws, _words(laws), _words(laws))
    ks = ks_of(laws.laws)
    beside = [
        each._replace(y=distance) for each in _beside(laws.everywhere, laws.name, "n_latents", ks[len(ks) // 2])
        if (np.isfinite(distance := laws.scale.distance(each.y)) & (distance > 0)).all()
    ]  # fmt: skip
    shown = np.concatenate([[view.y.low, view.y.high], *(each.y for each in beside)])
    return replace(
        view,
        name=_named("metric_against_n", laws),
        title=_titled(f"{laws.name} against the number of latents", laws),
        caption=f"{_what(laws)} of every cell against the number of latents N.{_not_drawn([laws])}",
        key=view.key + _key(beside, f"at k = {ks[len(ks) // 2]:g}"),
        y=log_axis(_words(laws), shown) if beside else view.y,
        layers=(*_drawn(beside), *view.layers),
    )


def metric_against_k(metrics: Sequence[MetricLaws]) -> View | None:
    """One metric of every cell against k: of one kind of cells a line for each N, of several the largest N that all of
    them have, a line for each kind. None where no line has two k."""
    first = metrics[0]
    of_all = [laws.everywhere for laws in metrics]
    lines: dict[Level, tuple[Seen, float]] = {}
    if several := len(metrics) > 1:
        sizes = [set(seen.cells["n_latents"].tolist()) for seen in of_all]
        shared = set.intersection(*sizes)
        for laws, seen, there in zip(metrics, of_all, sizes, strict=True):
            lines[kind_label(laws.of)] = seen, max(shared or there)
    else:
        lines = {float(n): (of_all[0], float(n)) for n in np.unique(of_all[0].cells["n_latents"])}
    layers: list[Layer] = []
    values, ks = [], []
    for level, (seen, n) in lines.items():
        own = np.flatnonzero(seen.cells["n_latents"] == n)
        own = own[np.argsort(seen.cells["k"][own], kind="stable")]
        x, y = seen.cells["k"][own], seen.values.value[own]
        places = np.unique(x)
        means = np.array([y[x == place].mean() for place in places])
        name = str(level) if several else f"N = {n:,.0f}"
        texts = [f"{name}, k = {k:g}<br>{first.name} {v:.4g}<br>nmse {seen.nmse[row]:.4f}"
                 for k, v, row in zip(x, y, own, strict=True)]  # fmt: skip
        layers.append(Line(places, means, level, "through", name))
        layers.append(Points(x, y, level, texts, *_ends(seen, own)))
        layers.append(Label(float(places[-1]), float(means[-1]), name, level))
        values += [y, *(end for end in _ends(seen, own) if end is not None)]
        ks.append(x)
    if max(len(np.unique(x)) for x in ks) < 2:
        return None
    largest = max(lines.values(), key=lambda line: line[1])[1]
    beside = _beside(of_all[0], first.name, "k", largest)
    values += [each.y for each in beside]
    what = f"at N = {largest:,.0f}" if several else "of every cell"
    whose = f"of {kind_label(first.of)}, " if several else ""
    return View(
        f"metric_against_k-{slug(first.name)}" if several else _named("metric_against_k", first),
        f"{first.name} against k" if several else _titled(f"{first.name} against k", first),
        f"{first.name} {what} against k, the number of active latents; {first.metric.better} is better. Where it turns "
        f"while nmse falls, more active latents reconstruct more and tell less.{_not_drawn(metrics, at_limit=True)}",
        "Points: cells, with the 95 % interval of each where it has one; dotted lines join them."
        + _key(beside, f"{whose}at N = {largest:,.0f}"),
        count_axis(COLUMNS["k"].title, np.concatenate(ks)),
        linear_axis(first.name, np.concatenate(values)),
        tuple(lines), (*_drawn(beside), *layers), ramp="name" if several else "compute",
    )  # fmt: skip


class _Curve(NamedTuple):
    """What a metric is read beside, along N or k."""

    name: str
    x: np.ndarray
    y: np.ndarray


def _beside(seen: Seen, name: str, along: str, at: float) -> list[_Curve]:
    """What the metric `name` is read beside, at the value `at` of the other axis, or over all of it where that has
    none."""
    cells, own = seen.cells, name.rpartition(".")[2]
    here = cells["k" if along == "n_latents" else "n_latents"] == at
    here = here if here.any() else np.ones(len(cells), dtype=bool)
    found = []
    for other, values in seen.beside.items():
        usable = here & np.isfinite(values)
        places = np.unique(cells[along][usable])
        if len(places):
            means = np.array([values[usable & (cells[along] == place)].mean() for place in places])
            found.append(_Curve(other.removeprefix(f"{own}_"), places, means))
    return found


def _drawn(beside: Sequence[_Curve]) -> list[Layer]:
    lines = [Line(each.x, each.y, None, "reference", each.name) for each in beside]
    return [*lines, *(Label(float(each.x[-1]), float(each.y[-1]), each.name, None) for each in beside)]


def _key(beside: Sequence[_Curve], at: str) -> str:
    return f" Dashed: {', '.join(each.name for each in beside)} ({at} where that makes a difference)." if beside else ""


def _ends(seen: Seen, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """The metric's own intervals, where every one of these cells has one."""
    low, high = seen.values.low[rows], seen.values.high[rows]
    return (low, high) if np.isfinite(low).all() and np.isfinite(high).all() else (None, None)


def metric_against_nmse(laws: MetricLaws) -> View:
    """A metric of every cell against its nmse, one colour per k."""
    cells = laws.cells
    layers: list[Layer] = []
    for k in ks_of(laws.laws):
        own = cells["k"] == k
        order = np.flatnonzero(own)[np.argsort(laws.nmse[own])]
        texts = [
            f"N = {cells['n_latents'][row]:,.0f}, k = {k:g}<br>nmse {laws.nmse[row]:.4f}<br>"
            f"{laws.name} {laws.values.value[row]:.4g}"
            for row in order
        ]
        layers.append(Line(laws.nmse[order], cells["nmse"][order], k, "through"))
        layers.append(Points(laws.nmse[order], cells["nmse"][order], k, texts))
        layers.append(Label(float(laws.nmse[order][-1]), float(cells["nmse"][order][-1]), f"k = {k:g}", k))
    return View(
        _named("metric_against_nmse", laws),
        _titled(f"{laws.name} against nmse", laws),
        f"{_what(laws)} of every cell against its nmse. Where the lines of two k lie apart, cells of equal nmse are "
        f"not equally good by this metric: the lower line is the better k.{_not_drawn([laws])}",
        "Points: cells. Dotted lines join the cells of one k.",
        log_axis(NMSE_LABEL, laws.nmse),
        log_axis(_words(laws), cells["nmse"]),
        tuple(ks_of(laws.laws)),
        tuple(layers),
    )


def _not_drawn(metrics: Sequence[MetricLaws], at_limit: bool = False) -> str:
    """How many cells a figure does not have, in a sentence; nothing where it has all. `at_limit`: it has those too."""
    of = sum(laws.without + len(laws.cells) for laws in metrics)
    without = of - sum(len(laws.everywhere.cells if at_limit else laws.cells) for laws in metrics)
    name, or_one = metrics[0].name, "" if at_limit else ", or one at or beyond its limit,"
    return f" {without} of {of} cells have no {name}{or_one} and are not drawn." if without else ""


def _what(laws: MetricLaws) -> str:
    """What the axis shows, at the beginning of a sentence: lower is better on any scale."""
    return laws.name if laws.scale.how == "itself" else f"How far {laws.name} is from its limit ({laws.scale.words})"


def _words(laws: MetricLaws) -> str:
    """What laws are of, short enough for an axis and a formula: the evaluation stands in the figure's name."""
    words = laws.scale.words
    return words if len(words) <= _LONGEST else words.replace(f"{laws.name.rpartition('.')[0]}.", "")


def _named(name: str, laws: MetricLaws) -> str:
    label = kind_label(laws.of)
    return f"{name}-{slug(laws.name)}" + (f"-{slug(label)}" if label else "")


def _titled(title: str, laws: MetricLaws) -> str:
    label = kind_label(laws.of)
    return f"{label}: {title}" if label else title
