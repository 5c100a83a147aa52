"""From a plan to the sweep that has exactly its cells: sweep files, extension of a run directory, the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import yaml

from saescale.cluster.front import laws as laws_commands
from saescale.cluster.front import plan as plan_command
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.extend import extend, union
from saescale.cluster.sweep.grid import Grid
from saescale.cluster.sweep.ledger import open_ledger
from saescale.cluster.sweep.propose import Request, make_proposal
from saescale.cluster.sweep.spec import NO_STORE, SweepSpec, load_spec, parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.planning.devices import find_device
from saescale.scaling.tables import load_results
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from tests.cluster.command import assert_one_line, saescale, saescale_here
from tests.cluster.conftest import Recorder
from tests.scaling.conftest import _cells
from tests.survival import without_times
from tests.trainers.synthetic import sparse_rows, write_store


def of_grid(**lists: Any) -> SweepSpec:
    return parse_spec({"name": "a", "store": "s", "out": "o", "grid": lists, "train": {"tokens": 131_072}}, "test")


def test_union_is_each_cell_once() -> None:
    lists = of_grid(n_latents=[64, 128], k=[2, 4])
    more = of_grid(cells=[{"n_latents": 64, "k": 2, "seed": [0, 1]}, {"n_latents": 256, "k": 8}])
    both = union(lists, more)
    together = lists.model_copy(update={"grid": both})
    assert len(both.combinations()) == 4 + 2
    assert [(c.n_latents, c.k, c.seed) for c in both.cells] == [(64, 2, [1]), (256, 8, [0])]
    assert union(together, more) == both == union(together, lists)
    assert union(more, lists).combinations() == both.combinations()
    assert union(lists, lists) == lists.grid
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
    proposal = make_proposal(request)
    path = tmp_path / "plan.yaml"
    path.write_text(proposal.yaml())
    spec = load_spec(str(path))
    assert spec.store == "stores/mine"
    assert spec.size == int(proposal.design.counts.sum())
    document = json.loads(json.dumps(proposal.document(), allow_nan=False))
    assert document["hours"] == pytest.approx(sum(cell["hours"] for cell in document["cells"]))
    assert document["hours"] <= 2.0
    packed = sorted(tuple(cell) for pack in document["packs"] for cell in pack)
    assert packed == sorted((c["n_latents"], c["k"], seed) for c in document["cells"] for seed in c["seeds"])
    for cell in document["cells"]:
        assert {cell["tokens"]} == {each.tokens for each in spec.planned() if each.n_latents == cell["n_latents"]}
    assert document["before"] is None
    for row, full in zip(document["expected"], document["rectangle"]["expected"], strict=True):
        assert row["low"] < row["value"] < row["high"]
        assert row["high"] - row["low"] < 1.05 * (full["high"] - full["low"])


def test_a_plan_goes_on_from_a_run(tmp_path: Path, document: dict[str, Any]) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(_cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.004))
    run.write_spec(document | {"resolved": {"precision": "fp32"}})
    proposal = make_proposal(Request(hours=4.0, device=find_device("a100", 1e12), source=run.url))
    assert proposal.spec.train == parse_spec(document, "test").train
    assert len(proposal.prior.cells["k"]) == 16
    assert proposal.before is not None
    assert (proposal.design.half_width < proposal.before.half_width).all()
    # A cell that is there gets other seeds.
    assert all(0 not in c.seeds for c in proposal.cells if c.n_latents <= 4096)
    assert max(c.n_latents for c in proposal.cells) > 4096


def test_a_plan_for_a_run_over_several_stores_counts_the_cells_of_all(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(_cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.004))
    found = []
    for stores in (["a"], ["a", "b", "c"]):
        run.write_spec(document | {"store": stores, "resolved": {"precision": "fp32"}})
        found.append(make_proposal(Request(hours=4.0, device=find_device("a100", 1e12), source=run.url)))
    each = [{(c.n_latents, c.k): c.hours / len(c.seeds) for c in plan.cells} for plan in found]
    both = each[0].keys() & each[1].keys()
    assert both
    assert {cell: each[1][cell] for cell in both} == pytest.approx({cell: 3 * each[0][cell] for cell in both})
    assert found[1].design.hours <= 4.0
    plan_command.plan(source=run.url, gpu="a100", flops_per_s=1e12, budget="4h")
    cells = sum(len(cell.seeds) for cell in found[1].cells)
    assert f"{3 * cells} cells over 3 stores in" in capsys.readouterr().out


def test_a_plan_goes_by_the_speed_and_the_scatter_of_its_run(tmp_path: Path, capsys: Any) -> None:
    """Measured on that kind of device, else assumed, unless a user says it; and no seeds against a lack of fit."""
    rng = np.random.default_rng(0)
    rows = [
        row | {"cell_id": f"{row['cell_id']}-{seed}", "seed": seed, "device": "NVIDIA A100-SXM4-80GB", "wall_s": 50.0,
               "nmse": nmse * np.exp(0.001 * rng.standard_normal())}
        for row in _cells((512, 1024, 2048, 4096), (8, 16, 32, 64))
        for nmse in [row["nmse"] * np.exp(0.01 * rng.standard_normal())]
        for seed in (0, 1)
    ]  # fmt: skip
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(rows)
    speed = sum(row["flops"] for row in rows) / (50.0 * len(rows))
    for gpu, given, expected_speed, said in (
        ("a100", None, speed, f"measured by 32 cells of {tmp_path}/run/results.parquet"),
        ("h100", None, None, "assumed"),
        ("a100", 1e12, 1e12, "as given"),
    ):
        proposal = make_proposal(
            Request(hours=0.5, device=find_device(gpu, given), source=run.url, n_range=(512, 8192))
        )
        found = proposal.document()["device"]["flops_per_s"]
        if expected_speed is None:  # the smaller the cells, the more of their time are launches
            large = make_proposal(Request(hours=1e4, device=find_device(gpu), n_range=(2**15, 2**17), d_model=4096))
            assert 0 < 10 * found < large.document()["device"]["flops_per_s"] < find_device(gpu).peak
        else:
            assert found == pytest.approx(expected_speed)
        assert said in proposal.yaml()
        assert proposal.design.hours <= 0.5
    plan_command.plan(source=run.url, gpu="a100", budget="30min")
    shown = " ".join(capsys.readouterr().out.split())
    assert "sparse training FLOP/s, measured by 32 cells of" in shown
    assert "(lack of fit): new n and k tell more" in shown
    assert proposal.prior.shared > 0.9


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("n_latents,k,nmse\n64,2,0.5\n128,2,0.4\n")
    assert_one_line(saescale("plan", "--budget", "soon"), "--budget soon is no time")
    for arguments, said in (
        (["--gpu", "h10"], "did you mean h100?"),
        (["--target", "slope"], "unknown target slope; there are exponent, floor, prediction, coefficients"),
        (["--target", "prediction"], "add --at n=65536,k=64"),
        (["--gpu", "cpu", "--budget", "1min"], "do not reach for one cell"),
        (["--k", "32"], "a law takes 3 values of k; there are 1 (32) in cells of k <= n: add --k"),
        ([str(few)], "2 points for 6 coefficients"),
    ):
        assert_one_line(saescale_here("plan", *arguments), said)


def test_what_cannot_be_planned_at_any_budget() -> None:
    def request(**changed: Any) -> Request:
        return Request(**{"hours": 1e9, "device": find_device("h100")} | changed)

    for asked, said in (
        (
            request(n_range=(512, 1024)),
            r"a law takes 3 values of n; there are 2 \(512, 1024\) in cells of k <= n: lower",
        ),
        (request(ks=(8, 16, 4096), n_range=(512, 2048)), r"3 values of k; there are 2 \(8, 16\)"),
        (request(ks=(4096, 8192), n_range=(512, 2048)), "no cell to add has k <= n: k is 4096 or more, n at most 2048"),
        (request(ks=(512, 1024, 2048), n_range=(512, 2048), seeds=1), "there are at most 6: raise --seeds"),
        (
            request(device=find_device("cpu")._replace(memory=5.52e9)),
            r"there are 2 \(8, 16\) in cells of k <= n that fit into the memory of cpu: lower --n-min, add",
        ),
        (request(noise=0.0), "--noise 0 is no scatter; give a number above 0"),
        (request(noise=-0.1), "--noise -0.1 is no scatter"),
        (request(at={"n_latents": 512.0}), "--at n: --target exponent does not depend on it"),
    ):
        with pytest.raises(SaescaleError, match=said):
            make_proposal(asked)


def test_n_doubles_from_the_smallest_asked_for() -> None:
    proposal = make_proposal(Request(hours=0.5, device=find_device("h100"), n_range=(500, 9_000), ks=(8, 16, 32)))
    assert {c.n_latents for c in proposal.cells} <= {500, 1000, 2000, 4000, 8000}
    assert min(c.n_latents for c in proposal.cells) == 500


def test_proposed_seeds_are_those_of_no_other_cell(tmp_path: Path, document: dict[str, Any]) -> None:
    rows = []
    for n, seeds in ((512, [1]), (1024, [0, 2]), (2048, [0]), (4096, [0])):
        for seed in seeds:
            rows += [
                {**row, "seed": seed, "cell_id": f"{row['cell_id']}-{seed}"}
                for row in _cells((n,), (8, 16, 32, 64), noise=0.004, seed=seed)
            ]
    failed = [{**row, "seed": 1, "status": "failed", "nmse": None} for row in rows if row["n_latents"] == 2048]
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results([*rows, *({**row, "cell_id": row["cell_id"] + "-failed"} for row in failed)])
    pending = [{"n_latents": 4096, "k": k, "seed": [0, 1]} for k in (8, 16, 32, 64)]  # seed 1 is still to be trained
    run.write_spec(document | {"grid": {"cells": pending}, "resolved": {"precision": "fp32"}})
    request = Request(hours=9.0, device=find_device("a100", 1e13), source=run.url, n_range=(512, 4096))
    table = tmp_path / "rows.csv"
    pa.csv.write_csv(run.read_results().select(["n_latents", "k", "seed", "nmse", "status"]), table)
    for source, at_4096 in ((run.url, (2, 3, 4)), (str(table), (1, 2, 3))):
        found = {c.n_latents: c.seeds for c in make_proposal(replace(request, source=source)).cells}
        assert found == {512: (0, 2, 3), 1024: (1, 3, 4), 2048: (2, 3, 4), 4096: at_4096}


@pytest.mark.slow
def test_a_sweep_is_extended_by_exactly_what_is_missing(
    three_nodes: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2, 4]}
    run = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10)).run
    before = without_times(run.read_results().to_pylist())
    wall = {row["cell_id"]: row["wall_s"] for row in run.read_results().to_pylist()}

    more = tmp_path / "more.yaml"
    more.write_text(
        yaml.safe_dump({"grid": {"cells": [{"n_latents": 64, "k": 4, "seed": [0, 1]}, {"n_latents": 128, "k": 2}]}})
    )
    result = saescale_here("sweep", f"{document['out']}/sweep.yaml", "--extend", str(more), "--bootstraps", "10")
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
        outcome = run_sweep(again, Recorder(), settings=FitSettings(10), extending=True)
        assert (added, outcome.trained, outcome.cells) == (0, 0, 6)


def test_an_extension_that_cannot_be_trained_leaves_the_run_as_it_was(
    document: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    """Whatever is found before the plan stands: here a store that is gone, and one of other rows."""
    spec, run = parse_spec(document, "test"), RunDirectory(document["out"])
    open_ledger(run, run.read_spec(), spec, [store], "fp32").begin()
    there = (Path(run.url) / "sweep.yaml").read_bytes()
    more = tmp_path / "more.yaml"
    more.write_text("grid: {cells: [{n_latents: 256, k: 2}]}")
    larger, added = extend(spec, str(more))
    assert added == 1
    with pytest.raises(SaescaleError):
        run_sweep(larger.model_copy(update={"store": str(tmp_path / "gone")}), Recorder(), extending=True)
    other = str(tmp_path / "other")
    write_store(other, sparse_rows(16_384, seed=2), sparse_rows(2_048, seed=3))
    with pytest.raises(SaescaleError, match="holds another sweep \\(store_fingerprint is"):
        run_sweep(larger.model_copy(update={"store": other}), Recorder(), extending=True)
    ledger = open_ledger(run, run.read_spec(), larger, [store], "fp32", extending=True)
    assert (Path(run.url) / "sweep.yaml").read_bytes() == there
    open_ledger(run, run.read_spec(), spec, [store], "fp32")  # which is still the sweep of its file

    before = yaml.safe_load(there)
    ledger.begin()
    after = run.read_spec() or {}
    assert parse_spec(after, "after").size == spec.size + 1
    assert {**after, "grid": 0} == {**before, "grid": 0}
    assert extend(spec, str(more)).added == 0


def test_a_grid_is_its_cells_however_it_is_written(
    document: dict[str, Any], store: ActivationStore, tmp_path: Path
) -> None:
    spec, run = parse_spec(document, "test"), RunDirectory(document["out"])
    open_ledger(run, run.read_spec(), spec, [store], "fp32").begin()
    there = run.read_spec()
    cells = [{"n_latents": n, "k": k} for n in (128, 32, 64) for k in (8, 4, 2)]
    for grid_ in ({"n_latents": [128, 64, 32, 32], "k": [8, 2, 4]}, {"cells": cells}):
        same = parse_spec(document | {"grid": grid_}, "test")
        open_ledger(run, run.read_spec(), same, [store], "fp32").begin()
        assert run.read_spec() == there

    # A file that has gained cells itself: they count as added, and without --extend it says what to do.
    gained = parse_spec(document | {"grid": {"n_latents": [32, 64, 128], "k": [2, 4, 8], "seed": [0, 1]}}, "test")
    with pytest.raises(SaescaleError, match=r"grid: 9 cells are only here .* or add the cells: .* --extend"):
        open_ledger(run, run.read_spec(), gained, [store], "fp32")
    more = tmp_path / "more.yaml"
    more.write_text("grid: {cells: [{n_latents: 128, k: 2}]}")
    larger, added = extend(gained, str(more))
    assert added == 9
    open_ledger(run, run.read_spec(), larger, [store], "fp32", extending=True).begin()
    # And the file as it was is a part of the run now.
    with pytest.raises(SaescaleError, match=f"or use {run.url}/sweep.yaml"):
        open_ledger(run, run.read_spec(), spec, [store], "fp32")
    with pytest.raises(SaescaleError, match="9 cells are only there"):
        open_ledger(run, run.read_spec(), spec, [store], "fp32", extending=True)


def test_cells_trained_in_another_way_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document, "test")
    RunDirectory(document["out"]).write_spec(spec.model_dump(mode="json") | {"resolved": {}})
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
        ("grid: {cells: [{n_latents: 64, k: 2}]}\ntrian: {tokens: 1}", "trian is not a key, did you mean train"),
        ("grid: {cells: [{n_latents: 64, k: 2}]}\nstore: stores/other", "store is stores/other and the sweep's is"),
    ):
        more.write_text(text)
        with pytest.raises(SaescaleError, match=said):
            extend(spec, str(more))
    with pytest.raises(SaescaleError, match="there is no file at"):
        extend(spec, str(tmp_path / "nothing.yaml"))
    # The same store in other words, or one that is still to be named, is no other.
    for name in (f"{document['store']}/", f"file://{document['store']}", NO_STORE):
        more.write_text(yaml.safe_dump({"grid": {"cells": [{"n_latents": 64, "k": 2, "seed": [5]}]}, "store": name}))
        assert extend(spec, str(more)).spec.store == document["store"]
    assert (Path(document["out"]) / "sweep.yaml").read_bytes() == there


def test_fit_predicts_and_takes_laws_of_ones_own(tmp_path: Path) -> None:
    from tests.scaling.test_law import TEN_LINES

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
    text = saescale_here("fit", str(table), "--law", "n_k", "--predict", "n=16384,k=32", "--bootstraps", "50").stdout
    assert "a new cell, 95 %" in text
    assert "n is 4 times above the largest in the fit" in text
    assert_one_line(saescale_here("fit", str(table), "--predict", "m=3"), "m=3: 'm' is none of ", "n=65536,k=64")
    assert_one_line(saescale_here("fit", str(table), "--law-file", str(tmp_path / "no.py")), "there is no law file at")
    assert_one_line(saescale_here("reproduce", "chinchila"), "did you mean chinchilla?")
    assert "met" in saescale("reproduce", "chinchilla").stdout


def test_the_next_command_is_one_that_runs(
    tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_of(command: Callable[..., None], **arguments: Any) -> str:
        command(**arguments)
        return capsys.readouterr().out.split("Next: ")[1].strip()

    def planned(source: str, **arguments: Any) -> str:
        return next_of(plan_command.plan, source=source, gpu="a100", budget="1h", **arguments)

    run, bare = RunDirectory(str(tmp_path / "run")), RunDirectory(str(tmp_path / "bare"))
    rows = _cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.004)
    run.write_spec(document | {"resolved": {}})
    for directory in (run, bare):
        directory.write_results(rows)
    file = str(tmp_path / "more.yaml")
    edit = f"(edit its store first: {NO_STORE})"
    assert planned(run.url, write=file) == f"saescale sweep {run.url}/sweep.yaml --extend {file}"
    assert planned(run.url).endswith(f"saescale sweep {run.url}/sweep.yaml --extend plan.yaml")
    assert planned(bare.url, write=file) == f"saescale sweep {file} {edit}"
    assert planned(bare.url).endswith(f"saescale sweep plan.yaml {edit}")
    assert planned(bare.url, write=file, store="stores/mine") == f"saescale sweep {file}"

    monkeypatch.setattr(laws_commands, "_read_wandb", lambda path: (load_results(bare), None))
    fit = {"law": ["n_k"], "predict": ["n=512,k=8"], "bootstraps": 0}
    assert next_of(laws_commands.fit, sources=["wandb:me/project"], **fit) == "saescale fit wandb:me/project --json"
    both = next_of(laws_commands.fit, sources=["wandb:me/project", run.url], **fit)
    assert both.startswith(f"saescale plan {run.url} --budget")
