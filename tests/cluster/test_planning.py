"""From a plan to the sweep that has exactly its cells: sweep files, extension of a run directory, the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.driver import run_sweep
from cluster.extend import extend, union
from cluster.planning import Request, make_plan
from cluster.spec import Grid, load_spec, parse_spec
from scaling.devices import find_device
from storage.errors import SaescaleError
from storage.rundir import RunDirectory
from tests.cluster.conftest import Recorder
from tests.cluster.test_cli import assert_one_line, saescale
from tests.cluster.test_sweep import without_times
from tests.scaling.conftest import _cells


def grid(**lists: Any) -> Grid:
    return Grid.model_validate(lists)


def test_union_is_each_cell_once() -> None:
    lists = grid(n_latents=[64, 128], k=[2, 4])
    more = grid(cells=[{"n_latents": 64, "k": 2, "seed": [0, 1]}, {"n_latents": 256, "k": 8}])
    both = union(lists, more)
    assert both.size == 4 + 2
    assert [(c.n_latents, c.k, c.seed) for c in both.cells] == [(64, 2, [1]), (256, 8, [0])]
    assert union(both, more) == both == union(both, lists)
    assert union(more, lists).combinations() == both.combinations()
    assert union(lists, lists) == lists
    assert Grid.model_validate(both.model_dump(mode="json")) == both


def test_a_grid_of_cells_has_its_mistakes_named(document: dict[str, Any]) -> None:
    for cells, said in (
        ([{"n_latents": 4, "k": 8}], "grid: k = 8 is larger than n_latents = 4"),
        ([{"n_latents": 64, "ks": 8}], "grid.cells.0.ks is not a key, did you mean k"),
        ([], "grid.cells: list should have at least 1 item"),
    ):
        with pytest.raises(SaescaleError, match=said):
            parse_spec(document | {"grid": {"cells": cells}}, "test")
    with pytest.raises(SaescaleError, match="grid: k is missing"):
        parse_spec(document | {"grid": {"n_latents": [64]}}, "test")


def test_a_plan_is_a_sweep_file(tmp_path: Path) -> None:
    request = Request(hours=2.0, device=find_device("a100"), store="stores/mine", d_model=512, ks=(8, 16, 32))
    plan = make_plan(request)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.yaml())
    spec = load_spec(str(path))
    assert spec.store == "stores/mine"
    assert spec.grid.size == int(plan.design.counts.sum())
    document = json.loads(json.dumps(plan.document(), allow_nan=False))
    assert document["hours"] == pytest.approx(sum(cell["hours"] for cell in document["cells"]))
    assert document["hours"] <= 2.0
    packed = sorted(tuple(cell) for pack in document["packs"] for cell in pack)
    assert packed == sorted((c["n_latents"], c["k"], seed) for c in document["cells"] for seed in c["seeds"])
    for cell in document["cells"]:
        assert cell["tokens"] == spec.tokens_of(cell["n_latents"])
    assert document["before"] is None
    for row, full in zip(document["expected"], document["rectangle"]["expected"], strict=True):
        assert row["low"] < row["value"] < row["high"]
        assert row["high"] - row["low"] < 1.05 * (full["high"] - full["low"])


def test_a_plan_goes_on_from_a_run(tmp_path: Path, document: dict[str, Any]) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(_cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.004))
    run.write_spec(document | {"resolved": {"precision": "fp32"}})
    plan = make_plan(Request(hours=4.0, device=find_device("a100", 1e12), source=run.url))
    assert plan.spec.train == parse_spec(document, "test").train
    assert len(plan.prior.cells["k"]) == 16
    assert plan.before is not None
    assert (plan.design.half_width < plan.before.half_width).all()
    # A cell that is there gets other seeds.
    assert all(0 not in c.seeds for c in plan.cells if c.n_latents <= 4096)
    assert max(c.n_latents for c in plan.cells) > 4096


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("n_latents,k,nmse\n64,2,0.5\n128,2,0.4\n")
    for arguments, said in (
        (["--budget", "soon"], "--budget soon is no time"),
        (["--gpu", "h10"], "did you mean h100?"),
        (["--target", "slope"], "unknown target slope; there are exponent, floor, prediction, coefficients"),
        (["--target", "prediction"], "add --at n=65536,k=64"),
        (["--gpu", "cpu", "--budget", "1min"], "do not reach for one cell"),
        ([str(few)], "2 points for 6 coefficients"),
    ):
        assert_one_line(saescale("plan", *arguments), said)


def test_a_sweep_is_extended_by_exactly_what_is_missing(
    two_nodes: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2, 4]}
    run = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10).run
    before = without_times(run.read_results().to_pylist())
    wall = {row["cell_id"]: row["wall_s"] for row in run.read_results().to_pylist()}

    more = tmp_path / "more.yaml"
    more.write_text(
        yaml.safe_dump({"grid": {"cells": [{"n_latents": 64, "k": 4, "seed": [0, 1]}, {"n_latents": 128, "k": 2}]}})
    )
    result = saescale("sweep", f"{document['out']}/sweep.yaml", "--extend", str(more), "--bootstraps", "10",
                      RAY_ADDRESS=two_nodes.address)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 cells added to 4" in result.stdout
    assert "2 of 6 cells trained now" in result.stdout
    after = run.read_results().to_pylist()
    assert {(row["n_latents"], row["k"], row["seed"]) for row in after if row["cell_id"] not in wall} == {
        (64, 4, 1),
        (128, 2, 0),
    }
    assert [row for row in without_times(after) if row["cell_id"] in wall] == before
    assert {row["cell_id"]: row["wall_s"] for row in after if row["cell_id"] in wall} == wall

    # Once more, also from the first file: nothing is missing, and nothing is lost.
    for spec in (load_spec(f"{document['out']}/sweep.yaml"), parse_spec(document, "test")):
        again, added = extend(spec, str(more))
        outcome = run_sweep(again, Recorder(), bootstraps=10)
        assert (added, outcome.trained, outcome.cells) == (0, 0, 6)


def test_cells_trained_in_another_way_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document, "test")
    RunDirectory(document["out"]).write_spec(spec.model_dump(mode="json"))
    there = (Path(document["out"]) / "sweep.yaml").read_bytes()
    more = tmp_path / "more.yaml"
    for text, said in (
        (
            yaml.safe_dump(document | {"train": document["train"] | {"ema": 0.5}}),
            "train.ema is 0.5 and the sweep's is 0.9",
        ),
        ("train: {tokens: 16384}", "has no grid to extend with"),
        ("grid: {cells: [{n_latents: 64, ks: 2}]}", "grid.cells.0.ks is not a key"),
        ("grid: [", "is not valid YAML"),
    ):
        more.write_text(text)
        with pytest.raises(SaescaleError, match=said):
            extend(spec, str(more))
    with pytest.raises(SaescaleError, match="there is no file at"):
        extend(spec, str(tmp_path / "nothing.yaml"))
    assert (Path(document["out"]) / "sweep.yaml").read_bytes() == there


def test_fit_predicts_and_takes_laws_of_ones_own(tmp_path: Path) -> None:
    from tests.scaling.test_laws import TEN_LINES

    table = tmp_path / "cells.csv"
    rows = _cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.004)
    table.write_text("n_latents,k,nmse\n" + "".join(f"{r['n_latents']},{r['k']},{r['nmse']}\n" for r in rows))
    law = tmp_path / "mine.py"
    law.write_text(TEN_LINES)
    points = ["--predict", "n=16384,k=32", "--predict", "n=8192,k=8"]
    shown = saescale("fit", str(table), "--law", "n_k", "--law-file", str(law), *points, "--bootstraps", "50", "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert [fit["law"] for fit in document["fits"]] == ["n_k", "power_of_k"]
    found = [(row["law"], row["point"]["n_latents"]) for row in document["predictions"]]
    assert found == [("n_k", 16384), ("power_of_k", 16384), ("n_k", 8192), ("power_of_k", 8192)]
    assert all(row["low"] < row["value"] < row["high"] for row in document["predictions"])
    text = saescale("fit", str(table), "--law", "n_k", "--predict", "n=16384,k=32", "--bootstraps", "50").stdout
    assert "a new cell, 95 %" in text
    assert "n is 4 times above the largest in the fit" in text
    assert_one_line(saescale("fit", str(table), "--predict", "m=3"), "m=3: 'm' is none of n, k")
    assert_one_line(saescale("fit", str(table), "--law-file", str(tmp_path / "no.py")), "there is no law file at")
    assert_one_line(saescale("reproduce", "chinchila"), "did you mean chinchilla?")
    assert "met" in saescale("reproduce", "chinchilla").stdout
