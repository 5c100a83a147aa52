"""Evaluations on actors and at the end of a sweep: the same rows as in one process, whoever dies on the way."""

import random
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saescale.cluster.cli import app
from saescale.cluster.crew.evals import evaluate_on_actors
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleWarning
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals.run import evaluate_run
from saescale.trainers.training.train import PackJob, train_pack
from tests.cluster.command import SAESCALE, environment
from tests.cluster.conftest import Recorder, processes

SIZES = (16, 24, 32, 40)
ROWS = {"nmse": 2, "noted": 20, "core": 20}  # of a cell
FRAGILE = """
import os, pathlib, signal
from saescale.trainers.evals.evaluation import Measurement

needs = frozenset()
latents = 5

def partners(cell, cells):
    return [row["cell_id"] for row in cells if row["cell_id"] != cell]

def measure(trained, source, subject, latents, others):
    folder = pathlib.Path(os.environ["SAESCALE_PATH"])
    for often, size in ((1, 24), (9, 32)):
        if trained.cell.n_latents == size:
            died = len(list(folder.glob(f"died-{size}-*")))
            if died < often:
                (folder / f"died-{size}-{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
    yield Measurement("size", float(trained.cell.n_latents), n=os.getpid())
    yield Measurement("others", float(sum(other.cell.n_latents for other in others)), at=str(latents))
"""

NOTED = """
import os, pathlib, time
from saescale.trainers.evals.evaluation import Measurement

needs = frozenset()

def measure(trained, source, subject):
    with open(pathlib.Path(os.environ["SAESCALE_PATH"]) / "noted.txt", "a") as file:
        print(trained.cell.n_latents, file=file, flush=True)
    time.sleep(0.3)
    for i in range(20):
        yield Measurement("size", float(trained.cell.n_latents), at=str(i))
"""


@pytest.fixture
def run(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Four cells, and an evaluation `fragile` that kills its process once at one of them and always at another."""
    (tmp_path / "mine" / "evals").mkdir(parents=True)
    (tmp_path / "mine" / "evals" / "fragile.py").write_text(FRAGILE)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "mine"))
    shared = {
        "store": store.identity, "d_model": store.d_model, "tokens": 512, "batch_tokens": 128, "lr": 3e-3, "k": 2,
        "dead_after_tokens": 512, "ema": 0.9,
    }  # fmt: skip
    cells = [Cell.model_validate(shared | {"n_latents": n, "heldout_rows": 512}) for n in SIZES]
    found = RunDirectory(str(tmp_path / "run"))
    done = train_pack(PackJob(cells=cells, store=store.url, run=found.url, sweep="evals", eval=EvalSpec(tokens=512)))
    found.write_spec({"name": "evals", "store": store.url, "resolved": {}})
    found.write_results(done.results)
    return found


def rows(run: RunDirectory, evaluation: str) -> list[dict[str, Any]]:
    found = [row for row in run.read_evals().to_pylist() if row["evaluation"] == evaluation]
    return sorted(found, key=lambda row: (row["cell_id"], row["metric"], row["at"]))


def test_actors_measure_what_one_process_measures(three_nodes: Any, run: RunDirectory, tmp_path: Path) -> None:
    seen = Recorder()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SaescaleWarning)
        done = evaluate_on_actors(run.url, ["core", {"fragile": {"latents": 7}}], (), 2, None, seen)
    assert (done.measured, done.there, done.failed) == (7, 0, 1)
    (why,) = done.why
    assert why.startswith("fragile of n32-")
    assert "the process that measured it died 3 times" in why
    fragile = rows(run, "fragile")
    assert sorted(row["value"] for row in fragile if row["metric"] == "size") == [16, 24, 40]
    compared = [row for row in fragile if row["metric"] == "others"]
    assert {(sum(SIZES) - row["value"], row["at"], row["latents"]) for row in compared} == {
        (size, "7", 7) for size in (16, 24, 40)
    }
    assert all(len(row["others"].split()) == 3 for row in fragile)
    assert sum("an actor died at fragile of n24-" in str(warning.message) for warning in told) == 1
    assert len(list((tmp_path / "mine").glob("died-*"))) == 1 + 3
    assert seen.evaluated[0] == (0, 8, None)
    assert [done for done, _, _ in seen.evaluated] == list(range(9))
    on_actors = rows(run, "core")
    assert len({row["cell_id"] for row in on_actors}) == len(SIZES)
    (Path(run.url) / "evals.parquet").unlink()
    evaluate_run(run.url, ["core"])
    for there, here in zip(on_actors, rows(run, "core"), strict=True):
        measured = {"value": 0, "low": 0, "high": 0, "seconds": 0, "shared_seconds": 0}
        assert there | measured == here | measured
        assert there["value"] == pytest.approx(here["value"], rel=1e-5, abs=1e-7)


def test_a_sweep_ends_with_its_evaluations(
    three_nodes: Any, document: dict[str, Any], sweep_file: Callable[[dict[str, Any]], str]
) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    del document["eval"]["evaluations"]  # core, where nobody says otherwise
    spec, first = parse_spec(document, "here"), Recorder()
    outcome = run_sweep(spec, first, settings=FitSettings(0))
    assert "evaluating: core" in first.stages
    assert first.evaluated[-1][:2] == (2, 2)
    results = {row["cell_id"]: row for row in outcome.run.read_results().to_pylist()}
    nmse = {row["cell_id"]: row["value"] for row in rows(outcome.run, "core") if row["metric"] == "nmse"}
    assert nmse.keys() == results.keys()
    for cell, value in nmse.items():
        assert value == pytest.approx(results[cell]["nmse"], rel=1e-5)
    again = Recorder()
    run_sweep(spec, again, settings=FitSettings(0))
    assert again.evaluated == []
    # Others may be named later, here on a cluster: it stays the same sweep. What cannot be measured ends nothing.
    document["eval"]["evaluations"] = ["core", "downstream_loss", {"nmse": {"where": {"n_latents": 64}}}]
    with pytest.warns(SaescaleWarning, match="downstream_loss of 2 cells: unknown subject 'synthetic'"):
        run_sweep(parse_spec(document, "here"), again, three_nodes.address, FitSettings(0))
    assert again.evaluated[-1][:2] == (3, 3)
    assert {row["evaluation"] for row in outcome.run.read_evals().to_pylist()} == {"core", "nmse"}
    assert [results[row["cell_id"]]["n_latents"] for row in rows(outcome.run, "nmse")] == [64, 64]  # nmse and l0


@pytest.mark.slow
@pytest.mark.parametrize("actors", [False, True], ids=["one process", "actors"])
def test_killed_again_and_again_it_goes_on(three_nodes: Any, run: RunDirectory, tmp_path: Path, actors: bool) -> None:
    """SIGKILL while it starts, and at some moment after each of its first measurements."""
    (tmp_path / "mine" / "evals" / "noted.py").write_text(NOTED)
    noted, draw, there = tmp_path / "mine" / "noted.txt", random.Random(0), set[tuple[str, str]]()
    noted.touch()
    command = [*SAESCALE, "eval", run.url, "--evals", "nmse,noted,core"]
    command += ["--actors", "2", "--address", three_nodes.address] if actors else []
    sizes = {row["cell_id"]: str(row["n_latents"]) for row in run.read_results().to_pylist()}
    for more in (0, 1, 1, 2):
        before = noted.read_text().split()
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as child:
            began = time.monotonic()
            while child.poll() is None and len(noted.read_text().split()) < len(before) + more:
                assert time.monotonic() - began < 120
                time.sleep(0.05)
            time.sleep(draw.uniform(0.0, 0.6))
            child.kill()
        table = run.read_evals()
        pairs = Counter(zip(table["cell_id"].to_pylist(), table["evaluation"].to_pylist(), strict=True))
        assert there <= pairs.keys()
        assert {name: {pairs[pair] for pair in pairs if pair[1] == name} for _, name in pairs} == {
            name: {ROWS[name]} for _, name in pairs
        }  # whole, or not there
        again = noted.read_text().split()[len(before) :]
        assert not {sizes[cell] for cell, name in there if name == "noted"} & set(again)
        there = set(pairs)
        left_s = time.monotonic() + 120
        while processes("EvalActor"):  # what the driver left behind ends
            assert time.monotonic() < left_s
            time.sleep(0.05)
    done = evaluate_run(run.url, ["nmse", "noted", "core"])
    assert (done.measured, done.there, done.failed) == (12 - len(there), len(there), 0)
    assert 0 < len(there) < 12
    table = run.read_evals()
    assert len(table) == len(SIZES) * sum(ROWS.values())


def test_a_number_of_actors_is_one(run: RunDirectory) -> None:
    result = CliRunner().invoke(app, ["eval", run.url, "--evals", "nmse", "--actors", "none"])
    assert "eval: --actors must be a number of at least 1, or auto, not 'none'" in str(result.exception)
