"""Figures of metrics of evaluations: each against N with its law, as nmse is, and against nmse."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from saescale.scaling.figures.axes import log_axis
from saescale.scaling.figures.bars import slug
from saescale.scaling.figures.views import Label, Layer, Line, Points, View
from saescale.scaling.figures.views_cells import NMSE_LABEL, ks_of, nmse_against_n
from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.over_metrics import MetricLaws

SHOWN = 6  # metrics with figures, of each kind of cells
_FIRST = "downstream_loss"  # what an SAE is for before all else


def leading(metrics: Sequence[MetricLaws]) -> list[MetricLaws]:
    """Those that figures and sentences are about: of each evaluation its first metric, for each kind of cells; at most
    six metrics, that of the downstream loss before the others."""
    there = [laws for laws in metrics if len(laws.cells) > 1]
    names: dict[str, str] = {}
    for laws in there:
        names.setdefault(laws.name.partition(".")[0], laws.name)
    chosen = [names[evaluation] for evaluation in sorted(names, key=lambda name: name != _FIRST)][:SHOWN]
    return [laws for name in chosen for laws in there if laws.name == name]


def metric_against_n(laws: MetricLaws) -> View:
    """A metric of every cell against N, one colour per k, with its law, as that of nmse is drawn."""
    view = nmse_against_n(laws.laws, laws.scale.words, laws.scale.words)
    return replace(
        view,
        name=_named("metric_against_n", laws),
        title=_titled(f"{laws.name} against the number of latents", laws),
        caption=f"{_what(laws)} of every cell against the number of latents N, with the fitted law.",
    )


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
        "not equally good by this metric: the lower line is the better k.",
        "Points: cells. Dotted lines join the cells of one k.",
        log_axis(NMSE_LABEL, laws.nmse),
        log_axis(laws.scale.words, cells["nmse"]),
        tuple(ks_of(laws.laws)),
        tuple(layers),
    )


def _what(laws: MetricLaws) -> str:
    """What the axis shows, at the beginning of a sentence: lower is better on any scale."""
    return laws.name if laws.scale.how == "itself" else f"How far {laws.name} is from its limit ({laws.scale.words})"


def _named(name: str, laws: MetricLaws) -> str:
    label = kind_label(laws.of)
    return f"{name}-{slug(laws.name)}" + (f"-{slug(label)}" if label else "")


def _titled(title: str, laws: MetricLaws) -> str:
    label = kind_label(laws.of)
    return f"{label}: {title}" if label else title
