"""Figures of architectures side by side: what is drawn is what was compared, in one order and one colour."""

import json

import numpy as np
import plotly.graph_objects
import pytest

from saescale.scaling.comparison.compare import Comparison, compare, side_by_side
from saescale.scaling.comparison.depth import AtDepth
from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.figures import paper
from saescale.scaling.figures.figures import parts_of
from saescale.scaling.figures.interactive import plot
from saescale.scaling.figures.palette import colour
from saescale.scaling.figures.views import Label, Points, View
from saescale.scaling.figures.views_compare import some, views_of_comparison
from saescale.scaling.figures.views_depth import views_of_depth
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.order import in_order
from saescale.scaling.tables import Table
from tests.scaling.known_arms import ALL, KS, SIZES, Known, known_arms, known_curves

_FOUND: list[Comparison] = []


@pytest.fixture
def comparison() -> Comparison:
    if not _FOUND:  # nothing here changes it
        rows = known_arms()
        _FOUND.extend(compare(Table.from_rows(rows), Table.from_rows(known_curves(rows))))
    return _FOUND[0]


@pytest.fixture
def views(comparison: Comparison) -> dict[str, View]:
    return {view.name: view for view in views_of_comparison(comparison, {})}


def points(view: View) -> list[Points]:
    return [layer for layer in view.layers if isinstance(layer, Points)]


def test_there_is_one_for_each_n_and_each_k(views: dict[str, View]) -> None:
    assert list(views) == [
        "order", *(f"frontier-n{n}" for n in SIZES), *(f"by_n-k{k}" for k in KS), *(f"by_compute-k{k}" for k in KS),
        "compute_ratio", "hierarchy", "dead_by_architecture",
    ]  # fmt: skip
    assert some(range(10), 4) == [0, 3, 6, 9]
    assert some(range(10), 2) == [0, 9]


def test_colours_are_the_architectures_own_and_labels_do_not_overlap(views: dict[str, View]) -> None:
    for view in views.values():
        spec = plot(view)
        assert len(plotly.graph_objects.Figure(json.loads(json.dumps(spec, allow_nan=False))).data) == len(spec["data"])
        if view.ramp != "name":
            continue
        assert list(view.levels) == list(in_order(str(level) for level in view.levels))
        for trace in spec["data"]:
            if name := (trace.get("meta") or {}).get("name"):
                shades = (trace.get("line", {}).get("color"), trace.get("marker", {}).get("color"),
                          trace.get("textfont", {}).get("color"))  # fmt: skip
                assert colour(name, ()) in shades
        texts = [t for t in spec["data"] if t.get("textposition") == "middle right"]
        height = spec["layout"]["height"] - spec["layout"]["margin"]["t"] - spec["layout"]["margin"]["b"]
        places = sorted(view.y.fraction(t["y"][0]) * height for t in texts)
        assert len(texts) <= len(ALL)
        assert (np.diff(places) > 15).all()


def test_what_is_drawn_is_what_was_measured(views: dict[str, View], comparison: Comparison) -> None:
    arms = comparison.arms
    drawn = {
        (layer.level, x, y) for layer in points(views["frontier-n1024"]) for x, y in zip(layer.x, layer.y, strict=True)
    }
    near = {name for name, _, _ in drawn}
    expected = {(str(arms.architecture[g]), arms.l0[g], np.exp(arms.log_nmse[g]))
                for g in range(len(arms)) if arms.n_latents[g] == 1024 and arms.architecture[g] in near}  # fmt: skip
    assert drawn == expected
    # Baselines far above all others are named instead of squeezing them.
    assert near == set(ALL) - {"pca", "frozen_encoder", "frozen_decoder"}
    assert "Above the axes: frozen_decoder, frozen_encoder, pca." in views["frontier-n1024"].key
    # A label in place of a point stands in the row of what it names.
    place = {name: y for y, name in views["order"].y.ticks}
    for trace in plot(views["order"])["data"]:
        if trace.get("mode") == "text":
            assert trace["textposition"] == "middle right"
            assert trace["y"][0] in place.values()
    rows = [name for _, name in views["order"].y.ticks][::-1]
    assert rows == list(comparison.order.architectures)
    ratios = {(layer.level, layer.x[0]) for layer in points(views["compute_ratio"])}
    assert ratios == {(r.k, r.median.value) for r in comparison.ratios if r.median is not None}
    unreached = [layer.text for layer in views["compute_ratio"].layers if isinstance(layer, Label)]
    assert unreached.count("does not get there") == sum(
        all(r.median is None for r in comparison.ratios if r.architecture == name) for name in ALL if name != "topk"
    )


def test_they_are_drawn_for_paper_too(views: dict[str, View]) -> None:
    for name in ("order", "compute_ratio"):
        files = paper.draw(views[name])
        assert files["png"].startswith(b"\x89PNG")
        assert b"batchtopk" in files["svg"] or len(files["svg"]) > 10_000


def test_depth_has_a_line_for_each_k_or_each_name() -> None:
    def at(layer: int, k: float, name: str = "topk") -> list[AtDepth]:
        value = Interval(0.1 + layer / 100, 0.1, None)
        return [AtDepth(q, "gpt", name, layer, k, "n_k", value) for q in ("exponent", "floor")]  # type: ignore[arg-type]

    one = [entry for layer in (2, 6, 11) for k in (8.0, 32.0) for entry in at(layer, k)]
    exponent, floor = views_of_depth(one)
    assert (exponent.name, floor.name, exponent.ramp) == ("depth_exponent", "depth_floor", "k")
    assert {layer.level for layer in points(exponent)} == {8.0, 32.0}
    assert [text for _, text in exponent.x.ticks] == ["2", "6", "11"]
    both = one + [entry for layer in (2, 6) for entry in at(layer, 32.0, "relu")]
    named, _ = views_of_depth(both)
    assert {layer.level for layer in points(named)} == {"topk", "relu"}
    assert named.title.endswith("at k = 32")
    json.dumps(plot(named), allow_nan=False)
    assert views_of_depth([]) == []


def test_names_of_users_have_files_of_their_own_and_leave_room() -> None:
    """Names that differ in what no file's name has, and such as are longer than a figure is wide."""
    names = ("my arch", "my-arch", "a" * 200 + "1", "a" * 200 + "2")
    fitted = fit_laws(Table.from_rows(known_arms({n: Known() for n in names}, seeds=(0,))), None, FitSettings(0))
    views = [view for part in parts_of(fitted, side_by_side(fitted)) for view in part.views]
    files = [view.name for view in views]
    assert len(set(files)) == len(files)
    assert max(map(len, files)) < 200
    assert sum(name.startswith("residuals-my_arch") for name in files) == 2
    for view in views:
        if view.ramp == "name":
            assert all(
                len(text) < 40 for text in (*(label.text for label in view.labels), *(t for _, t in view.y.ticks))
            )
