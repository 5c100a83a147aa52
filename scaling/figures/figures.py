"""All figures of a run: which there are, and their files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Literal, NamedTuple

import pyarrow as pa

from saescale.scaling.comparison.compare import Comparison, SideBySide
from saescale.scaling.figures import paper
from saescale.scaling.figures.bars import slug
from saescale.scaling.figures.interactive import Spec, plot
from saescale.scaling.figures.views import Level, View
from saescale.scaling.figures.views_cells import (
    dead_fraction,
    dead_over_training,
    joint_fit,
    ks_of,
    nmse_against_n,
    one_form,
    residuals,
)
from saescale.scaling.figures.views_compare import views_of_comparison
from saescale.scaling.figures.views_density import energy_by_frequency
from saescale.scaling.figures.views_depth import views_of_depth
from saescale.scaling.figures.views_laws import compute_optimal, exponents, holdout, isoflop, nmse_against_compute
from saescale.scaling.figures.views_metrics import leading, metric_against_k, metric_against_n, metric_against_nmse
from saescale.scaling.figures.views_profile import profile, tradeoff
from saescale.scaling.kinds import Kind, kind_label
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.fit import Laws, LawsOfKinds
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.tables import Table
from saescale.storage.files import join, list_names, remove, write_atomic

# Every name that a view can have, before what it is of ("frontier-n512"): files of these names that were not drawn are
# of an earlier analysis.
NAMES = (
    "nmse_against_n", "nmse_against_compute", "exponents", "holdout", "residuals", "profile", "tradeoff", "isoflop",
    "compute_optimal", "dead_fraction", "dead_over_training", "order", "frontier", "by_n", "by_compute",
    "compute_ratio", "dead_by_architecture", "hierarchy", "depth_exponent", "depth_floor",
    "metric_against_n", "metric_against_k", "metric_against_nmse", "energy_by_frequency",
)  # fmt: skip
MOST_KINDS, MOST_COMPARISONS = 16, 4
_KINDS = ("png", "pdf", "svg", "json")


class Figure(NamedTuple):
    """A view with what was drawn of it: Plotly's JSON, and files by format (png, pdf, svg, and Plotly's as json)."""

    view: View
    plotly: Spec
    files: Mapping[str, bytes]

    def named_files(self) -> dict[str, bytes]:
        """The files by their names in the run's figures/: NAME.png ..."""
        return {f"{self.view.name}.{kind}": content for kind, content in self.files.items()}


class Part(NamedTuple):
    """Figures that belong together: of one comparison of architectures, of depth, of metrics of evaluations, or of one
    kind of cells."""

    what: Literal["comparison", "depth", "metrics", "kind"]
    of: Kind
    views: Sequence[View]


def parts_of(
    fitted: LawsOfKinds,
    sides: SideBySide,
    curves: Table | None = None,
    metrics: Sequence[MetricLaws] = (),
    evals: pa.Table | None = None,
) -> list[Part]:
    """Every figure for which there are data, in the order in which they are read: first what compares kinds of cells,
    then each kind. Where there are several, each has those of its cells and laws, up to sixteen kinds; what one kind
    has besides is drawn where it is fitted alone. Of `metrics` the leading ones have figures: L(N, k) of a metric
    stands beside that of nmse."""
    found = [
        Part(
            "comparison",
            c.arms.of,
            views_of_comparison(c, _laws_at(fitted, c), 4 if len(sides.comparisons) == 1 else 2),
        )
        for c in sides.comparisons[:MOST_COMPARISONS]
    ]
    if depth := views_of_depth(sides.depth):
        found.append(Part("depth", {}, depth))
    shown, there = leading(metrics), leading(metrics, lawful=False)
    over_n, over_nmse = ([draw(laws) for laws in shown] for draw in (metric_against_n, metric_against_nmse))
    by_name = {laws.name: [other for other in there if other.name == laws.name] for laws in there}
    over_k = [view for own in by_name.values() if (view := metric_against_k(own)) is not None]
    sizes = fitted.results["n_latents"].tolist()
    over_k = [_coloured(view, sizes) if view.ramp == "compute" else view for view in over_k]
    if len(fitted.kinds) == 1:
        first, *rest = views_of(fitted.largest, curves, evals)
        found.append(Part("kind", {}, [first, *over_n, *rest]))
        if metrics:
            found.append(Part("metrics", {}, [*over_k, *over_nmse]))
        return _apart(_alike(found, fitted))
    if metrics:
        whole = list(by_name)[: max(1, MOST_KINDS // len(fitted.kinds))]  # with as many figures as one of many kinds
        pairs = [pair for *pair, laws in zip(over_n, over_nmse, shown, strict=True) if laws.name in whole]
        found.append(Part("metrics", {}, [*over_k, *(view for pair in pairs[:MOST_KINDS] for view in pair)]))
    told = [laws for laws in fitted.kinds if laws.fits or (len(laws.results) and not found)]
    for laws in told[:MOST_KINDS]:
        label = kind_label(laws.of)
        views = [v for v in (nmse_against_n(laws), nmse_against_compute(laws), residuals(laws)) if v is not None]
        named = [replace(v, name=f"{v.name}-{slug(label)}", title=f"{label}: {v.title}") for v in views]
        found.append(Part("kind", laws.of, named))
    return _apart(_alike(found, fitted))


def _alike(parts: Sequence[Part], fitted: LawsOfKinds) -> list[Part]:
    """With the colours of every k of the run, also where a figure has cells of some alone."""
    ks = {*fitted.results["k"].tolist()}
    ks |= {k for part in parts for view in part.views if view.ramp == "k" for k in view.levels}
    return [
        part._replace(views=[_coloured(view, ks) if view.ramp == "k" else view for view in part.views])
        for part in parts
    ]


def _coloured(view: View, levels: Iterable[Level]) -> View:
    """With the colours of all these levels, which are numbers."""
    return replace(view, levels=tuple(sorted({*view.levels, *levels}, key=float)))


def _apart(parts: Sequence[Part]) -> list[Part]:
    """With a number in the names of views that would lie in one file: those of "my arch" and "my-arch"."""
    seen: set[str] = set()
    found = []
    for part in parts:
        views = []
        for view in part.views:
            names = (view.name if i < 2 else f"{view.name}_{i}" for i in count(1))
            name = next(name for name in names if name not in seen)
            seen.add(name)
            views.append(replace(view, name=name))
        found.append(part._replace(views=views))
    return found


def _laws_at(fitted: LawsOfKinds, comparison: Comparison) -> dict[tuple[str, float], Fit]:
    """L(N, k), or without it L(N), of each architecture of a comparison at each k."""
    found = {}
    for laws in fitted.kinds:
        if any(laws.of.get(name) != value for name, value in comparison.arms.of.items()):
            continue
        joint = joint_fit(laws)
        for k, fit in one_form(laws, "n").items() if joint is None else ((k, joint) for k in ks_of(laws)):
            found[str(laws.of.get("architecture", "")), k] = fit
    return found


def views_of(laws: Laws, curves: Table | None = None, evals: pa.Table | None = None) -> list[View]:
    """Every figure of one kind of cells for which there are data, in the order in which they are read.

    `laws.results` has columns n_latents and k; `curves` and `evals` are those of the run (curves.parquet,
    evals.parquet).
    """
    document, ks = laws.document(), tuple(ks_of(laws))
    found = [
        nmse_against_n(laws),
        nmse_against_compute(laws),
        exponents(laws),
        holdout(laws),
        residuals(laws),
        profile(document, ks),
        tradeoff(document, ks),
        isoflop(laws),
        compute_optimal(laws),
        dead_fraction(laws),
        dead_over_training(laws, curves),
        energy_by_frequency(laws, evals),
    ]
    return [view for view in found if view is not None]


def draw_figures(parts: Sequence[Part], folder: str) -> list[Figure]:
    """Writes each figure to `folder` (any fsspec URL) as NAME.png, .pdf, .svg and .json (Plotly's, interactive).

    What an earlier analysis drew and this one does not is removed; other files in `folder` stay. Raises SaescaleError
    when `folder` cannot be written.
    """
    drawn = []
    for view in (view for part in parts for view in part.views):
        plotly = plot(view)
        interactive = json.dumps(plotly, allow_nan=False).encode()
        figure = Figure(view, plotly, {**paper.draw(view), "json": interactive})
        for name, content in figure.named_files().items():
            write_atomic(join(folder, name), content)
        drawn.append(figure)
    names = {figure.view.name for figure in drawn}
    for file in list_names(folder):
        stem, _, kind = file.rpartition(".")
        if kind in _KINDS and stem.split("-")[0] in NAMES and stem not in names:
            remove(join(folder, file))
    return drawn
