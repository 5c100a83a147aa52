"""Every figure is one view, drawn alike for paper and for the screen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects
import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from saescale.scaling.figures import paper
from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis, power_axis
from saescale.scaling.figures.figures import NAMES, Part, draw_figures, views_of
from saescale.scaling.figures.interactive import plot, theme
from saescale.scaling.figures.palette import colour
from saescale.scaling.figures.views import Label, Line, Points, View, spread
from saescale.scaling.figures.views_density import energy_by_frequency
from saescale.scaling.figures.views_laws import compute_optimal
from saescale.scaling.figures.views_profile import profile, tradeoff
from saescale.scaling.laws.fit import Laws, fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.order import KNOWN
from saescale.scaling.tables import Table
from tests.scaling.test_convergence import chinchilla_curves

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096, 8192), (8, 16, 32, 64)


_FITTED: list[tuple[Laws, Table]] = []


@pytest.fixture
def fitted(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> tuple[Laws, Table]:
    if not _FITTED:  # nothing here changes it
        rows = cells(SIZES, KS, noise=0.005)
        curves = Table.from_arrow(pa.Table.from_pylist(curves_of(rows)), "curves")
        _FITTED.append((fit_laws(Table.from_rows(rows), curves, settings=FitSettings(20)).largest, curves))
    return _FITTED[0]


def test_files_of_every_figure(fitted: tuple[Laws, Table], tmp_path: Path) -> None:
    figures = draw_figures([Part("kind", {}, views_of(*fitted))], str(tmp_path))
    names = [figure.view.name for figure in figures]
    assert names[:5] == ["nmse_against_n", "nmse_against_compute", "exponents", "holdout", "residuals"]
    assert {"isoflop", "dead_fraction", "dead_over_training"} <= set(names)
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "json": b"{"}
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in starts}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(starts[path.suffix[1:]])
    for figure in figures:
        again = json.loads((tmp_path / f"{figure.view.name}.json").read_text())
        # Plotly's own validation: an unknown attribute or a wrong type raises.
        assert len(plotly.graph_objects.Figure(again).data) == len(figure.plotly["data"])


def test_figures_of_an_earlier_analysis_go(fitted: tuple[Laws, Table], tmp_path: Path) -> None:
    views = views_of(*fitted)
    assert {view.name for view in views} <= set(NAMES)
    for name in ("isoflop.png", "dead_over_training.json", "frontier-n64.pdf", "mine.png", "isoflop.txt"):
        (tmp_path / name).write_text("old")
    draw_figures([Part("kind", {}, views[:1])], str(tmp_path))
    drawn = {f"{views[0].name}.{kind}" for kind in ("png", "pdf", "svg", "json")}
    assert {path.name for path in tmp_path.iterdir()} == drawn | {"mine.png", "isoflop.txt"}


def test_on_paper_every_point_is_drawn_with_the_mark_of_its_name() -> None:
    names = (*KNOWN, *(f"mine{i}" for i in range(16)))
    x = np.array([1.0, 2.0, 4.0])
    layers = tuple(Points(x, np.full(3, place + 1.0), name, ["", "", ""]) for place, name in enumerate(names))
    axis = count_axis("N", x)
    view = View("marks", "", "", "", axis, linear_axis("nmse", np.array([0.0, 30.0])), names, layers, ramp="name")
    drawn: list[Figure] = []

    def fill(figure: Figure) -> None:
        drawn.append(figure)
        paper._fill(figure, view)

    paper.drawn(fill)
    lines = drawn[0].axes[0].lines
    assert [line.get_xydata()[:, 1].tolist() for line in lines] == [[place + 1.0] * 3 for place in range(len(names))]
    marks = {line.get_marker() for line in lines}
    assert marks == set(paper._MARKS.values())


def test_a_figure_shows_the_points_that_its_law_was_fitted_to() -> None:
    """Iso-FLOP minima, frontier and cells: the drawn points are those of the fits, and of fits.json."""
    cells, curves = chinchilla_curves()
    laws = fit_laws(Table.from_rows(cells), Table.from_rows(curves), FitSettings(20, laws=("n", "c", "n_of_c"))).largest
    views = {view.name: view for view in views_of(laws)}
    (fitted,) = (fit for fit in laws.fits if fit.law.name == "n_of_c")
    of_fit = set(zip(fitted.columns["flops"].tolist(), fitted.nmse.tolist(), strict=True))

    def points(name: str, marker: str = "filled") -> list[Points]:
        return [layer for layer in views[name].layers if isinstance(layer, Points) and layer.marker == marker]

    drawn = {(c, n) for layer in points("compute_optimal") for c, n in zip(layer.x, layer.y, strict=True)}
    assert drawn == of_fit
    # The slices: each filled point is a minimum of the law, at its compute and nmse.
    (document,) = laws.document()["iso_flop"]
    minima = {(m["flops"], m["n_latents"], m["nmse"]) for m in document["minima"]}
    filled = {(layer.level, x, y) for layer in points("isoflop") for x, y in zip(layer.x, layer.y, strict=True)}
    assert len(filled) == 6
    assert filled <= minima
    assert {(c, n) for c, n, _ in filled} <= of_fit
    # The open ones are the frontier's envelope, of which the lowest is what law c is fitted to.
    (frontier,) = laws.frontiers
    for layer in points("isoflop", "open"):
        level = int(np.flatnonzero(frontier.grid == layer.level)[0])
        lowest = np.exp(frontier.envelope[:, level].min())
        assert layer.y.min() == lowest
        assert layer.x[np.argmin(layer.y)] == frontier.curves[frontier.winner[level]].n_latents
    (line,) = (layer for layer in views["nmse_against_compute"].layers
               if isinstance(layer, Line) and layer.stroke == "frontier")  # fmt: skip
    of_compute = next(fit for fit in laws.fits if fit.law.name == "c")
    assert (line.x.tolist(), line.y.tolist()) == (of_compute.columns["flops"].tolist(), of_compute.nmse.tolist())
    at_k = next(fit for fit in laws.fits if fit.law.name == "n")
    shown = {xy for layer in points("nmse_against_n") for xy in zip(layer.x, layer.y, strict=True)}
    assert shown == set(zip(at_k.columns["n_latents"], at_k.nmse, strict=True))


def test_of_thousands_of_curves_some_hundreds_are_drawn(
    fitted: tuple[Laws, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    def curves(view: View) -> list[Line]:
        return [layer for layer in view.layers if isinstance(layer, Line) and layer.stroke == "curve"]

    names = ("nmse_against_compute", "dead_over_training")
    for view in views_of(*fitted):
        assert "Drawn are" not in view.caption
    monkeypatch.setattr("saescale.scaling.figures.views._CURVES", 12)
    views = [view for view in views_of(*fitted) if view.name in names]
    assert len(views) == 2
    for view in views:
        assert view.caption.endswith("Drawn are 12 of 20 curves, evenly taken by k and N.")
        assert len(curves(view)) == 12
        assert {line.level for line in curves(view)} == set(KS)


def test_the_same_figure_has_the_same_bytes(fitted: tuple[Laws, Table]) -> None:
    view = views_of(*fitted)[0]
    drawn = paper.draw(view)
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.grid": True}):  # a user's matplotlibrc
        assert paper.draw(view) == drawn


def test_both_drawings_hold_every_cell(fitted: tuple[Laws, Table]) -> None:
    view = views_of(*fitted)[0]
    measured = sorted(fitted[0].results["nmse"].tolist())
    assert sorted(y for layer in view.layers if isinstance(layer, Points) for y in layer.y) == measured
    markers = [trace for trace in plot(view)["data"] if trace.get("mode") == "markers"]
    assert sorted(y for trace in markers for y in trace["y"]) == measured
    svg = paper.draw(view)["svg"].decode()
    assert svg.count("<use ") >= len(measured)


def test_a_k_has_one_colour_in_all_figures(fitted: tuple[Laws, Table]) -> None:
    for view in views_of(*fitted):
        for trace in plot(view)["data"] if view.ramp == "k" else []:
            if "meta" in trace and trace["mode"] == "markers":
                shades = {trace["marker"]["color"], trace["marker"]["line"]["color"]}
                assert colour(trace["meta"]["k"], KS) in shades


def test_every_colour_has_its_counterpart_in_the_dark(fitted: tuple[Laws, Table]) -> None:
    views = views_of(*fitted)
    dark = theme(tuple(map(float, KS)), tuple(view for view in views if view.ramp != "k"))

    def colours(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set().union(*map(colours, value.values()))
        if isinstance(value, list):
            return set().union(*map(colours, value))
        return {value} if isinstance(value, str) and value.startswith(("#", "rgba(")) else set()

    for view in views:
        assert colours(plot(view)) <= set(dark)


@pytest.mark.parametrize("dark", [False, True])
def test_lines_stand_out_from_the_page(dark: bool) -> None:
    def luminance(shade: str) -> float:
        parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page = luminance("#15181c" if dark else "#ffffff")
    for k in (8, 16, 32, 64, 128, 256, 512):
        own = luminance(colour(k, (8, 16, 32, 64, 128, 256, 512), dark))
        contrast = (max(own, page) + 0.05) / (min(own, page) + 0.05)
        assert contrast > (3.0 if dark else 2.0), k


def test_profiles_are_drawn_where_fits_have_them() -> None:
    rows = [{"floor": f, "exponent": -0.3 - f, "rms_log_residual": 0.01, "ratio": 100 * (f - 0.1) ** 2}
            for f in np.linspace(0, 0.2, 11).tolist()]  # fmt: skip
    entry = {"law": "n", "at": {"k": 8.0}, "floor": True,
             "profile_of_floor": {"low": 0.05, "high": 0.15, "limit": 0.25, "values": rows}}  # fmt: skip
    document = {"fits": [entry, {"law": "n", "at": {"k": 8.0}, "floor": False}]}
    view, traded = profile(document, (8.0,)), tradeoff(document, (8.0,))
    assert view is not None
    assert traded is not None
    for each in (view, traded):
        plotly.graph_objects.Figure(plot(each))
        assert [layer.text for layer in each.layers if isinstance(layer, Label)] == ["k = 8"]
    assert profile({"fits": [{"law": "n", "at": {}, "floor": False}]}, (8.0,)) is None


def test_ticks_read_as_in_a_paper() -> None:
    assert [text for _, text in count_axis("N", [512, 1024, 4096]).ticks] == ["512", "1,024", "4,096"]
    assert [text for _, text in power_axis("C", 1e10, 1e14).ticks][1:3] == ["10^11", "10^12"]
    assert "2×10^12" in [text for _, text in power_axis("C", 1e12, 4e12).ticks]
    for axis in (log_axis("nmse", np.array([0.13, 0.35])), log_axis("nmse", np.array([0.2, 0.204])),
                 linear_axis("x", [-2.1, 2.2], symmetric=True), linear_axis("x", [0.0, 0.0], zero=True)):  # fmt: skip
        assert 3 <= len(axis.ticks) <= 12
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)
        assert all(axis.low <= place <= axis.high for place, _ in axis.ticks)
        assert axis.value(axis.fraction(axis.high)) == pytest.approx(axis.high)


def test_ticks_of_a_logarithmic_axis_keep_apart_wherever_it_lies() -> None:
    """Also over a power of ten, below which a tenth of a decade is ten times as narrow."""
    assert [text for _, text in log_axis("nmse", np.array([0.01, 0.0115])).ticks] == [
        "0.01",
        "0.0105",
        "0.011",
        "0.0115",
    ]
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = 10 ** rng.uniform(-5, 3)
        axis = log_axis("nmse", np.array([low, low * 10 ** rng.uniform(0.005, 4)]))
        places = np.array([axis.fraction(place) for place, _ in axis.ticks])
        assert 4 <= len(places) <= 12
        assert np.diff(places).min() > 0.05
        assert len({text for _, text in axis.ticks}) == len(places)


@pytest.mark.parametrize("ratio", [1.0, 1.2, 1.5, 1.7, 3.0, 80.0, 99.0, 1e3, 1e6])
@pytest.mark.parametrize("low", [1e-3, 1.16e3, 3.2e6, 5.9e6, 2.31e15, 9.99e20])
def test_orders_of_magnitude_have_ticks_wherever_they_lie(low: float, ratio: float) -> None:
    """Between two round ticks too, as where a sweep has one iso-FLOP minimum."""
    axis = power_axis("C", low, low * ratio)
    assert 1 <= len(axis.ticks) <= 8
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    for place, text in axis.ticks:
        assert axis.low <= place <= axis.high
        mantissa, power = text.split("10^")
        assert float(mantissa.rstrip("×") or 1) * 10.0 ** int(power) == pytest.approx(place)


def test_a_compute_optimum_of_one_decade_and_less(fitted: tuple[Laws, Table]) -> None:
    view = max(fitted[0].isoflops, key=lambda view: len(view.flops))
    alike = replace(view, flops=view.flops[:1].repeat(len(view.flops)) * 3.2 / 10 ** (np.log10(view.flops[0]) % 1))
    drawn = compute_optimal(replace(fitted[0], isoflops=(alike,), fits=()))
    assert drawn is not None
    assert [text.partition("×")[0] for _, text in drawn.x.ticks] == ["3"]


def test_labels_do_not_overlap() -> None:
    places = spread([0.1, 0.11, 0.5, 0.98, 0.99, 1.4], gap=0.05)
    assert np.diff(places).min() >= 0.05 - 1e-9
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] <= 1


def test_energy_is_shown_of_the_largest_cells(fitted: tuple[Laws, Table]) -> None:
    laws, _ = fitted
    assert energy_by_frequency(laws, None) is None
    bins = [f"1e{low:g} to 1e{low + 0.5:g}" for low in np.arange(-6, 0, 0.5)]

    def rows(evaluation: str, metric: str, n: float, cell: str) -> Rows:
        shares = np.exp(-0.5 * (np.arange(12) - 6 - np.log2(n / 512)) ** 2)
        whole = zip(bins, shares / shares.sum(), strict=True)
        return [{"cell_id": cell, "evaluation": evaluation, "metric": metric, "at": at, "value": share, "low": None,
                 "high": share} for at, share in whole]  # fmt: skip

    some = [(float(n), str(cell)) for n, cell in zip(laws.results["n_latents"], laws.results["cell_id"], strict=True)]
    measured = [row for n, cell in some if n < 8192 for row in rows("density", "energy", n, cell)]
    of_latents = [row for _, cell in some for row in rows("core", "frequency", 512, cell)]
    other = {"cell_id": some[0][1], "evaluation": "density", "metric": "energy_10", "at": "", "value": 1.0}
    view = energy_by_frequency(laws, pa.Table.from_pylist([*measured, *of_latents, other]))
    assert view is not None
    lines = [layer for layer in view.layers if isinstance(layer, Line)]
    assert len([line for line in lines if line.stroke == "curve"]) == 4 * len(KS)
    thick = {line.level: line for line in lines if line.stroke == "frontier"}
    assert thick.keys() == set(KS)
    for k, line in thick.items():
        assert line.text == f"N = 4,096, k = {k:g}"
        assert line.y.sum() == pytest.approx(100)
        assert line.x[np.argmax(line.y)] == pytest.approx(10 ** (-6 + 0.25 + 0.5 * (6 + 3)))
    assert all(line.x[np.argmax(line.y)] == pytest.approx(10**-2.75) for line in lines if line.stroke == "through")
    assert paper.draw(view)["png"].startswith(b"\x89PNG")
    assert len(plotly.graph_objects.Figure(plot(view)).data) > len(lines)
    assert "energy_by_frequency" in NAMES
