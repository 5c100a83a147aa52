"""Which metrics have figures, and what these show."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from saescale.scaling.comparison.compare import side_by_side
from saescale.scaling.figures import paper
from saescale.scaling.figures.figures import parts_of
from saescale.scaling.figures.interactive import plot
from saescale.scaling.figures.palette import colour
from saescale.scaling.figures.views import Line, Points
from saescale.scaling.figures.views_metrics import leading, metric_against_k, metric_against_n, metric_against_nmse
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.over_metrics import MetricLaws, fit_metrics
from saescale.scaling.laws.scales import scale_of
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import Metric, Values, document
from saescale.scaling.report.metrics import metric_tables
from saescale.scaling.sources import load_sources
from saescale.scaling.tables import Table
from tests.scaling.test_over_metrics import write_run

FALLS, FEW = Metric("lower"), FitSettings(0, laws=("n_k",))


def test_of_each_evaluation_the_first_metric_and_the_downstream_loss_first(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for row in run.read_results().to_pylist():
        for name in ("downstream_loss", "absorption"):
            own = [{"metric": metric, "value": row["nmse"] * 2} for metric in ("kl", "ce")]
            run.write_evals(row["cell_id"], name, own, document(name, {"kl": Metric("lower"), "ce": Metric("lower")}))
    results, _ = load_sources([run.url])
    few = FitSettings(0, laws=("n_k",))
    names = ["absorption.kl", "absorption.ce", "downstream_loss.kl", "sim.falling", "sim.share"]
    metrics = fit_metrics(fit_laws(results, None, few), run.read_evals(), names, few)
    shown = leading(metrics)
    assert [laws.name for laws in shown] == ["downstream_loss.kl", "absorption.kl", "sim.falling"]

    share = metrics[-1]
    of_n, of_nmse = metric_against_n(share), metric_against_nmse(share)
    assert (of_n.name, of_nmse.name) == ("metric_against_n-sim.share", "metric_against_nmse-sim.share")
    assert of_n.y.label == of_nmse.y.label == "(1 - sim.share) / sim.share"
    nmse = dict(zip(results["cell_id"].tolist(), results["nmse"].tolist(), strict=True))
    points = [layer for layer in of_nmse.layers if isinstance(layer, Points)]
    assert [layer.level for layer in points] == [8, 16, 32, 64]
    np.testing.assert_allclose(points[1].x, sorted(nmse[cell] for cell in nmse if cell.endswith("x16")))
    assert points[0].texts[0].startswith("N = 16,384, k = 8<br>nmse 0.")
    assert "sim.share 0." in points[0].texts[0]
    for view in (of_n, of_nmse):
        assert paper.draw(view)["png"][:4] == b"\x89PNG"
        assert plot(view)["data"]


def test_the_tasks_of_an_evaluation_have_a_figure_each_and_a_few_of_them() -> None:
    nothing = np.zeros(2)

    def laws(name: str, leads: bool = False, cells: int = 2) -> MetricLaws:
        table = Table.from_rows([{"cell_id": str(i), "n_latents": 64.0, "k": 4.0, "nmse": 0.5} for i in range(cells)])
        metric = Metric("lower", leads=leads)
        return MetricLaws(name, metric, scale_of(name, metric), table, Values(*[nothing] * 3), nothing)

    def shown(*metrics: MetricLaws) -> list[str]:
        return [own.name for own in leading(metrics)]

    tasks = [laws("circuit.a_rest"), *(laws(f"circuit.{task}", leads=True) for task in "abcd")]
    assert shown(*tasks, laws("core.nmse")) == ["circuit.a", "circuit.b", "circuit.c", "core.nmse"]
    # One that no law can follow leaves its place to another.
    assert shown(*tasks[:2], laws("circuit.b", leads=True, cells=1)) == ["circuit.a"]
    assert shown(tasks[0], laws("circuit.b", leads=True, cells=1)) == ["circuit.a_rest"]
    others = [laws(f"{name}.m") for name in ("one", "two", "three")]
    assert shown(*tasks, *others, laws("core.nmse")) == [
        "circuit.a",
        "circuit.b",
        "one.m",
        "two.m",
        "three.m",
        "core.nmse",
    ]
    kinds = [replace(laws("circuit.a", leads=True), of={"site": site}) for site in ("one", "two")]
    assert shown(*kinds, tasks[2]) == ["circuit.a", "circuit.a", "circuit.b"]


def test_a_k_whose_cells_have_no_value_changes_no_colour_and_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lost = {8: np.inf, 64: np.nan}  # a half of the cells
    for row in run.read_results().to_pylist():
        kl = lost.get(row["k"], 1 / (1 + row["nmse"]))
        run.write_evals(row["cell_id"], "loss", [{"metric": "kl", "value": kl}], document("loss", {"kl": FALLS}))
        some = np.inf if row["n_latents"] == 512 else kl
        run.write_evals(row["cell_id"], "other", [{"metric": "m", "value": some}], document("other", {"m": FALLS}))
    results, _ = load_sources([run.url])
    fitted = fit_laws(results, None, FEW)
    metrics = fit_metrics(fitted, run.read_evals(), ["sim.share", "loss.kl", "other.m"], FEW)
    views = {
        view.name: view for part in parts_of(fitted, side_by_side(fitted, None), None, metrics) for view in part.views
    }
    for level, ramp, names in (
        (16.0, "k", [name for name, view in views.items() if view.ramp == "k"]),
        (8192.0, "compute", [name for name in views if name.startswith("metric_against_k")]),
    ):
        assert {f"metric_against_{'n' if ramp == 'k' else 'k'}-{name}" for name in ("loss.kl", "other.m")} < set(names)
        shades = {name: colour(level, views[name].levels, ramp=views[name].ramp) for name in names}
        assert len(set(shades.values())) == 1, shades
        assert all(shade in json.dumps(plot(views[name])) for name, shade in shades.items())
    for place in ("n", "k", "nmse"):
        said = {name: views[f"metric_against_{place}-{name}"].caption for name in ("sim.share", "loss.kl", "other.m")}
        assert "not drawn" not in said["sim.share"]
        limit = "" if place == "k" else ", or one at or beyond its limit,"  # a figure over k shows those
        assert said["loss.kl"].endswith(f"12 of 24 cells have no loss.kl{limit} and are not drawn.")
        assert "14 of 24 cells have no other.m" in said["other.m"]


def beside(tmp_path: Path, architectures: tuple[str, ...] = ("topk",)) -> list[MetricLaws]:
    """A share with its interval, the same of random latents, which goes with N, and of something that does not."""
    run = write_run(tmp_path)
    rows = run.read_results().to_pylist()
    run.write_results([
        row | {"architecture": name, "cell_id": f"{row['cell_id']}-{name}"} for name in architectures for row in rows
    ])  # fmt: skip
    said = document("sim", {"told": Metric("higher", bounded=True, beside=("told_random", "always", "missing"))})
    for row in run.read_results().to_pylist():
        told = 1 / (1 + 2 * row["nmse"])
        own = [
            {"metric": "told", "value": told, "low": told - 0.05, "high": told + 0.05},
            {"metric": "told_random", "value": 0.1 * np.log2(row["n_latents"]) / 20},
            {"metric": "always", "value": 0.25},
        ]
        run.write_evals(row["cell_id"], "sim", own, said)
    results, _ = load_sources([run.url])
    few = FitSettings(0, laws=("n_k",))
    return list(fit_metrics(fit_laws(results, None, few), run.read_evals(), ["sim.told"], few))


def test_a_metric_stands_beside_what_it_is_read_beside(tmp_path: Path) -> None:
    (laws,) = beside(tmp_path)
    assert set(laws.beside) == {"told_random", "always"}
    over_k, over_n = metric_against_k([laws]), metric_against_n(laws)
    assert over_k is not None
    assert (over_k.name, over_k.ramp, over_k.levels) == (
        "metric_against_k-sim.told",
        "compute",
        (512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0),
    )
    lines = {layer.text: layer for layer in over_k.layers if isinstance(layer, Line)}
    np.testing.assert_allclose(lines["always"].y, 0.25)
    np.testing.assert_allclose(lines["random"].y, 0.1 * 14 / 20)  # at the largest N
    points = {layer.level: layer for layer in over_k.layers if isinstance(layer, Points)}
    by_cell = {(n, k): v for n, k, v in zip(laws.cells["n_latents"], laws.cells["k"], laws.values.value, strict=True)}
    np.testing.assert_allclose(points[4096.0].y, [by_cell[4096.0, k] for k in points[4096.0].x])
    np.testing.assert_allclose(points[4096.0].high, points[4096.0].y + 0.05)
    odds = {layer.text: layer for layer in over_n.layers if isinstance(layer, Line)}
    np.testing.assert_allclose(odds["always"].y, 3.0)  # of failure: what the axis shows
    assert (over_n.y.low, over_n.y.high) > (0, 3.0)
    for view in (over_k, over_n):
        assert "Dashed: random, always" in view.key
        assert paper.draw(view)["png"][:4] == b"\x89PNG"
        assert plot(view)["data"]


def test_of_several_kinds_there_is_a_line_for_each(tmp_path: Path) -> None:
    laws = beside(tmp_path, ("topk", "gated"))
    view = metric_against_k(laws)
    assert view is not None
    assert (view.ramp, set(view.levels)) == ("name", {"topk", "gated"})
    points = [layer for layer in view.layers if isinstance(layer, Points)]
    assert [len(layer.x) for layer in points] == [4, 4]  # of the largest N
    assert "N = 16,384" in view.caption


def test_one_k_is_no_figure_over_k(tmp_path: Path) -> None:
    (laws,) = beside(tmp_path)
    one = laws.cells["k"] == 8
    values = Values(*(column[one] for column in laws.values))
    few = replace(laws, cells=laws.cells.select(one), values=values, nmse=laws.nmse[one], beside={}, seen=None)
    assert metric_against_k([few]) is None


def test_cells_at_the_limit_of_a_metric_are_shown_where_no_law_is_drawn(tmp_path: Path) -> None:
    """A share of 1 in every cell of one kind, and of 0 in some of the other: no law, and what a report is for."""
    run = write_run(tmp_path)
    rows = run.read_results().to_pylist()
    run.write_results([row | {"site": site, "cell_id": f"{row['cell_id']}-{site}"} for site in "ab" for row in rows])
    said = document("maze", {"found": Metric("higher", bounded=True)})
    for row in run.read_results().to_pylist():
        found = 1.0 if row["site"] == "a" else 0.0 if row["k"] > 8 else 0.5
        run.write_evals(row["cell_id"], "maze", [{"metric": "found", "value": found}], said)
    results, _ = load_sources([run.url])
    few = FitSettings(0, laws=("n_k",))
    metrics = fit_metrics(fit_laws(results, None, few), run.read_evals(), ["maze.found"], few)
    assert [len(laws.cells) for laws in metrics] == [0, 6]
    assert [laws.of["site"] for laws in leading(metrics)] == ["b"]
    assert len(leading(metrics, lawful=False)) == 2
    view = metric_against_k(metrics)
    assert view is not None
    drawn = {layer.level: layer.y.tolist() for layer in view.layers if isinstance(layer, Points)}
    assert drawn == {"a": [1.0] * 4, "b": [0.5, 0.0, 0.0, 0.0]}
    (table,) = (table for table in metric_tables(metrics, []) if table.title == "maze.found over N and k")
    assert table.rows[0] == ["a", "512", "1", "1", "1", "1"]
    assert table.rows[-1] == ["b", "16384", "0.5", "0", "0", "0"]
