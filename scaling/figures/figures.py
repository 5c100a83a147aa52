"""All figures of a run: which there are, and their files."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from saescale.scaling.figures import paper
from saescale.scaling.figures.interactive import Spec, plot
from saescale.scaling.figures.views import View
from saescale.scaling.figures.views_cells import dead_fraction, dead_over_training, ks_of, nmse_against_n, residuals
from saescale.scaling.figures.views_laws import compute_optimal, exponents, holdout, isoflop, nmse_against_compute
from saescale.scaling.figures.views_profile import profile, tradeoff
from saescale.scaling.laws.fit import Laws
from saescale.scaling.tables import Table
from saescale.storage.files import join, list_names, remove, write_atomic

# Every name that a view can have: files of these names that were not drawn are of an earlier analysis.
NAMES = (
    "nmse_against_n", "nmse_against_compute", "exponents", "holdout", "residuals", "profile", "tradeoff", "isoflop",
    "compute_optimal", "dead_fraction", "dead_over_training",
)  # fmt: skip
_KINDS = ("png", "pdf", "svg", "json")


class Figure(NamedTuple):
    """A view with what was drawn of it: Plotly's JSON, and files by format (png, pdf, svg, and Plotly's as json)."""

    view: View
    plotly: Spec
    files: Mapping[str, bytes]

    def named_files(self) -> dict[str, bytes]:
        """The files by their names in the run's figures/: NAME.png ..."""
        return {f"{self.view.name}.{kind}": content for kind, content in self.files.items()}


def views_of(laws: Laws, curves: Table | None = None) -> list[View]:
    """Every figure for which there are data, in the order in which they are read.

    `laws.results` has columns n_latents and k; `curves` are those of the run (curves.parquet).
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
    ]
    return [view for view in found if view is not None]


def draw_figures(laws: Laws, folder: str, curves: Table | None = None) -> list[Figure]:
    """Writes each figure to `folder` (any fsspec URL) as NAME.png, .pdf, .svg and .json (Plotly's, interactive).

    A figure without data (no curves, no dead fraction) is left out, and what an earlier analysis drew of it is removed;
    other files in `folder` stay. Raises SaescaleError when `folder` cannot be written.
    """
    drawn = []
    for view in views_of(laws, curves):
        plotly = plot(view)
        interactive = json.dumps(plotly, allow_nan=False).encode()
        figure = Figure(view, plotly, {**paper.draw(view), "json": interactive})
        for name, content in figure.named_files().items():
            write_atomic(join(folder, name), content)
        drawn.append(figure)
    stale = set(NAMES) - {figure.view.name for figure in drawn}
    for file in {f"{name}.{kind}" for name in stale for kind in _KINDS} & set(list_names(folder)):
        remove(join(folder, file))
    return drawn
