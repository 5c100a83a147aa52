"""Evaluations of a run: each measured once, whatever fails or dies on the way; the commands eval, export and import."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from saescale.cluster.cli import app
from saescale.scaling.metrics import measured as measured_of
from saescale.scaling.report.evaluations import evaluation_tables
from saescale.scaling.tables import Table
from saescale.storage.columns import EVALS
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals import bench as module
from saescale.trainers.evals.run import evaluate_run
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.training.train import PackJob, train_pack
from tests.test_doors import example, same_sae

COUNTED = """
import os, pathlib, time
from saescale.trainers.evals.evaluation import Measurement
from saescale.storage.errors import SaescaleError

needs = frozenset()

def measure(trained, source, subject):
    assert subject is None
    with open("measured.txt", "a") as file:
        print(trained.cell.n_latents, os.getpid(), file=file, flush=True)
    if trained.cell.n_latents == int(os.environ.get("SLOW", 0)):
        time.sleep(60)
    if trained.cell.n_latents == int(os.environ.get("FAIL", 0)):
        raise SaescaleError("too large for this")
    if trained.cell.n_latents == int(os.environ.get("BREAK", 0)):
        return 1 / 0
    yield Measurement("size", float(trained.cell.n_latents), low=1.0, high=2.0, at="all", n=3, seed=4)
"""


SOME = """
from saescale.trainers.evals.evaluation import LeftOut, Measurement

needs = frozenset()

def measure(trained, source, subject):
    yield Measurement("size", float(trained.cell.n_latents))
    if trained.cell.n_latents < 30:
        yield LeftOut("words", "no word is one token")
    else:
        yield Measurement("words", 3.0)
"""

SHARED = """
from saescale.trainers.evals.evaluation import Measurement
from saescale.storage.errors import SaescaleError

needs = frozenset()

def prepare(source, subject):
    with open("prepared.txt", "a") as file:
        print("once", file=file)
    return 7

def measure(trained, source, subject, prepared):
    yield Measurement("seven", prepared)
"""

LOOKED = """
import os
from saescale.trainers.evals.evaluation import Measurement

needs = frozenset()
latents = 8

def partners(cell, cells):
    own = next(row for row in cells if row["cell_id"] == cell)
    if os.environ.get("NAMES") == "nobody":
        return ["gone"]
    if os.environ.get("NAMES") == "breaks":
        return own["size"]
    larger = [row["cell_id"] for row in cells if row["n_latents"] > own["n_latents"]]
    return larger[:int(os.environ.get("MOST", 9))]

def measure(trained, source, subject, latents, others):
    yield Measurement("looked", latents)
    yield Measurement("others", sum(other.cell.n_latents for other in others))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Three cells over the toy subject, in the current folder; the evaluations `toy` and `counted`."""
    for room in ("subjects", "evals"):
        (tmp_path / "mine" / room).mkdir(parents=True)
        (tmp_path / "mine" / room / "toy.py").write_text(example(f"trainers/{room}")[1])
    (tmp_path / "mine" / "evals" / "counted.py").write_text(COUNTED)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path)
    harvest(HarvestSpec(subject="toy", layer=0, out="store", tokens=2_048, heldout_tokens=1_024, row_group_rows=256))
    shared = {
        "store": ActivationStore.open("store").identity, "d_model": 16, "tokens": 1_024, "batch_tokens": 128,
        "lr": 3e-3, "k": 2, "dead_after_tokens": 512, "ema": 0.9,
    }  # fmt: skip
    cells = [Cell.model_validate(shared | {"n_latents": n}) for n in (16, 24, 32)]
    spec = EvalSpec(tokens=512, every_tokens=512)
    done = train_pack(PackJob(cells=cells, store="store", run="run", sweep="evals", eval=spec))
    found = RunDirectory("run")
    found.write_spec({"name": "evals", "store": "store", "resolved": {}})
    found.write_results(done.results)
    return found


def measured() -> list[int]:
    """Sizes of the cells that `counted` was called with."""
    return [int(line.split()[0]) for line in Path("measured.txt").read_text().splitlines()]


def change_toy(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Another subject of that name, for this process too."""
    toy = Path("mine/subjects/toy.py")
    assert old in toy.read_text()
    toy.write_text(toy.read_text().replace(old, new))
    for name in [name for name in sys.modules if name.startswith("saescale_user_toy_")]:
        monkeypatch.delitem(sys.modules, name)


def test_all_are_measured_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    whole = module.get_subject
    monkeypatch.setattr(module, "get_subject", lambda *a: loaded.append(a[0]) or whole(*a))
    assert evaluate_run("run", ["counted"]) == (3, 0, 0, ())
    assert loaded == []  # it needs none
    rows = run.read_evals().to_pylist()
    assert sorted(row["value"] for row in rows) == [16, 24, 32]
    kept = {name: rows[0][name] for name in ("evaluation", "metric", "low", "high", "at", "n", "seed")}
    assert kept == {"evaluation": "counted", "metric": "size", "low": 1, "high": 2, "at": "all", "n": 3, "seed": 4}
    done = evaluate_run("run", ["toy", "nmse", "downstream_loss", "counted"])
    assert done[:3] == (9, 3, 0)
    # Of a subject that says no more with its stream than without it.
    assert all("no recovered_" in line and "may be no higher than with x" in line for line in done[3])
    assert loaded == ["toy"]
    assert sorted(measured()) == [16, 24, 32]
    assert {row["evaluation"] for row in run.read_evals().to_pylist()} == {
        "counted", "nmse", "toy", "downstream_loss",
    }  # fmt: skip
    assert evaluate_run("run", ["toy", "nmse", "downstream_loss", "counted"]) == (0, 12, 0, ())


def test_nmse_of_all_held_out_rows_is_a_metric_like_others(run: RunDirectory) -> None:
    evaluate_run("run", ["nmse"])
    rows = {row["cell_id"]: row["value"] for row in run.read_evals().to_pylist() if row["metric"] == "nmse"}
    recorded = {row["cell_id"]: row["nmse"] for row in run.read_results().to_pylist()}
    assert rows.keys() == recorded.keys()
    for cell, value in rows.items():  # the sweep's is of the first 512 rows
        assert value == pytest.approx(recorded[cell], rel=0.1)


def test_what_fails_for_one_cell_is_a_line_and_the_others_go_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "16")
    monkeypatch.setenv("BREAK", "24")
    result = CliRunner().invoke(app, ["eval", "run", "--evals", "counted"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "1 measured, 0 were there, 2 failed" in result.output
    assert "too large for this" in result.output
    assert "ZeroDivisionError: division by zero" in result.output
    assert [row["value"] for row in run.read_evals().to_pylist()] == [32]
    # A table of whole cells, where an evaluation has them; what else there is is counted.
    result = CliRunner().invoke(app, ["eval", "run", "--evals", "core"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert re.search(r"core +cosine +3 ", result.output)
    assert "1e-1" not in result.output
    assert "36 more rows, of single latents, labels or positions" in result.output
    monkeypatch.delenv("FAIL")
    monkeypatch.delenv("BREAK")
    assert evaluate_run("run", ["counted"]) == (2, 1, 0, ())


def test_a_killed_call_loses_nothing_that_was_measured(run: RunDirectory) -> None:
    command = [sys.executable, "-m", "saescale.cluster.cli", "eval", "run", "--evals", "counted"]
    with subprocess.Popen(command, env=os.environ | {"SLOW": "32"}, stdout=subprocess.DEVNULL) as child:
        began = time.monotonic()
        while not (Path("measured.txt").exists() and 32 in measured()):
            assert time.monotonic() - began < 120
            time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
    assert sorted(row["value"] for row in run.read_evals().to_pylist()) == [16, 24]
    assert evaluate_run("run", ["counted"]) == (1, 2, 0, ())
    assert sorted(measured()) == [16, 24, 32, 32]
    assert run.read_evals().num_rows == 3


def test_what_cannot_be_measured_is_one_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SaescaleError, match="unknown evaluation 'conted': did you mean counted"):
        evaluate_run("run", ["conted"])
    with pytest.raises(SaescaleError, match="no finished cell n9"):
        evaluate_run("run", ["counted"], cells=["n9"])
    with pytest.raises(SaescaleError, match="no run directory with a finished cell"):
        evaluate_run("store")
    # Other weights under the same name.
    change_toy(monkeypatch, '"toy-1"', '"toy-2"')
    trusted = evaluate_run("run", ["toy"], trust_remote_code=True)
    assert trusted.failed == 3
    (line,) = trusted.why  # one reason is one line
    assert line.startswith("toy of 3 cells: toy comes with no code of a model that could be trusted")
    loaded: list[str] = []
    whole = module.get_subject
    monkeypatch.setattr(module, "get_subject", lambda *a: loaded.append(a[0]) or whole(*a))
    done = evaluate_run("run", ["toy", "counted"])  # the others go on
    assert (done.measured, done.failed, loaded) == (3, 3, ["toy"])
    (line,) = done.why
    assert "other weights (toy-2) than those that were harvested (toy-1)" in line
    # Another store than that of the training.
    harvest(HarvestSpec(subject="toy", layer=0, out="other", tokens=2_048, heldout_tokens=1_024, row_group_rows=128))
    run.write_spec({"name": "evals", "store": "other", "resolved": {}})
    (line,) = evaluate_run("run", ["nmse"]).why
    assert "it was trained on the store" in line
    # And none at all.
    run.write_spec({"name": "evals", "store": "gone", "resolved": {}})
    with pytest.raises(SaescaleError, match="gone is no activation store"):
        evaluate_run("run", ["nmse"])
    # Of several, each cell is measured on its own, and what is wrong with the others does not matter to it.
    run.write_spec({"name": "evals", "store": ["other", "gone", "store"], "resolved": {}})
    assert evaluate_run("run", ["nmse"]) == (3, 0, 0, ())


def test_what_cells_share_is_made_once(run: RunDirectory) -> None:
    Path("mine/evals/shared.py").write_text(SHARED)
    Path("mine/evals/broken.py").write_text(SHARED.replace("return 7", "raise SaescaleError('no task fits')"))
    done = evaluate_run("run", ["shared", "broken"])
    assert (done.measured, done.failed) == (3, 3)
    assert done.why == ("broken of 3 cells: no task fits",)
    assert [row["value"] for row in run.read_evals().to_pylist()] == [7, 7, 7]
    assert Path("prepared.txt").read_text() == "once\nonce\n"


def test_what_a_cell_has_not_and_others_have_is_said(run: RunDirectory) -> None:
    """When it is measured, in evals.parquet, and at the table of the report."""
    Path("mine/evals/some.py").write_text(SOME)
    done = CliRunner().invoke(app, ["eval", "run", "--evals", "some"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.output.count("some of 2 cells: no words: no word is one token") == 1
    assert re.search(r"some +words +1 +3 ", done.output), done.output
    assert evaluate_run("run", ["some"]) == (0, 3, 0, ())
    table = run.read_evals()
    rows = [row for row in table.to_pylist() if row["metric"] == "words"]
    assert sorted((row["left_out"] or "", row["value"]) for row in rows) == [
        ("", 3.0), ("no word is one token", None), ("no word is one token", None),
    ]  # fmt: skip
    assert len(measured_of(table)["some.words"]) == 1
    (shown,) = evaluation_tables(table, Table.from_rows(run.read_results().to_pylist()))
    assert shown.note == "No words of 2 of 3 cells: no word is one token."
    assert shown.header == ("cell", "size", "words")
    assert [row[2] != "" for row in shown.rows] == [False, False, True]


def looked(run: RunDirectory) -> dict[int, dict[str, float]]:
    """What `looked` measured, by the size of the cell."""
    sizes = {row["cell_id"]: row["n_latents"] for row in run.read_results().to_pylist()}
    found: dict[int, dict[str, float]] = {}
    for row in run.read_evals().to_pylist():
        if row["evaluation"] == "looked":
            found.setdefault(sizes[row["cell_id"]], {"latents": row["latents"]})[row["metric"]] = row["value"]
    return found


def test_cells_are_compared_with_others_by_so_many_latents(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine/evals/looked.py").write_text(LOOKED)
    assert evaluate_run("run", ["looked", "counted"]) == (5, 0, 0, ())  # the largest is compared with none
    assert looked(run) == {
        16: {"latents": 8, "looked": 8, "others": 24 + 32}, 24: {"latents": 8, "looked": 8, "others": 32},
    }  # fmt: skip
    # Without a number what is there stays; with another one it is measured again, once.
    few = [{"looked": {"latents": 3}}]
    assert evaluate_run("run", ["looked"]) == (0, 2, 0, ())
    assert evaluate_run("run", few) == (2, 0, 0, ())
    assert evaluate_run("run", few) == evaluate_run("run", ["looked"]) == (0, 2, 0, ())
    assert {cell: of["looked"] for cell, of in looked(run).items()} == {16: 3, 24: 3}
    # So are those that are compared with other cells than before.
    monkeypatch.setenv("MOST", "1")
    assert evaluate_run("run", few) == (1, 1, 0, ())
    assert {cell: of["others"] for cell, of in looked(run).items()} == {16: 24, 24: 32}
    assert {row["others"] for row in run.read_evals().to_pylist() if row["evaluation"] == "counted"} == {None}
    # What cannot be is said, and the others go on; alone it is an error.
    largest = run.read_results()["cell_id"][2].as_py()
    done = evaluate_run("run", ["looked", "nmse"], cells=[largest])
    assert done == (1, 0, 0, ("looked: run: no cell has others that it would be compared with",))
    with pytest.raises(SaescaleError, match="looked: run: no cell has others"):
        evaluate_run("run", ["looked"], cells=[largest])
    monkeypatch.setenv("NAMES", "nobody")
    with pytest.raises(SaescaleError, match=r"`partners` of looked names 'gone' for n16.*, which is no other finished"):
        evaluate_run("run", ["looked"])
    monkeypatch.setenv("NAMES", "breaks")
    with pytest.raises(SaescaleError, match="`partners` of looked fails with KeyError: 'size'"):
        evaluate_run("run", ["looked"])


def test_cells_that_the_table_does_not_have_yet_are_compared_too(run: RunDirectory) -> None:
    """As at the end of a sweep, whose driver writes tables now and then."""
    Path("mine/evals/looked.py").write_text(LOOKED)
    rows = run.read_results().to_pylist()
    pending = {"cell_id": rows[2]["cell_id"], "status": "pending", "n_latents": 32}
    run.write_results([rows[0], pending])
    assert evaluate_run("run", [{"looked": {"where": "k=2"}}]) == (2, 0, 0, ())
    assert {row["cell_id"]: len(row["others"].split()) for row in run.read_evals().to_pylist()} == {
        rows[0]["cell_id"]: 2, rows[1]["cell_id"]: 1,
    }  # fmt: skip


def test_some_cells_alone(run: RunDirectory) -> None:
    run.write_spec(
        {"name": "evals", "store": "store", "resolved": {}, "eval": [{"counted": {"where": {"n_latents": [16, 24]}}}]}
    )
    asked = CliRunner().invoke(app, ["eval", "run", "--where", "k=2"], env={"COLUMNS": "200"})
    assert asked.exit_code == 0, asked.output
    assert "9 measured, 0 were there" in asked.output  # in place of the sweep file's, of which there is one more
    assert evaluate_run("run") == (0, 8, 0, ())
    Path("run/evals.parquet").unlink()
    assert evaluate_run("run")[:3] == (8, 0, 0)
    for arguments, words in (
        (["--where", "n_latent=16"], "there is no column n_latent; did you mean n_latents?"),
        (
            ["--where", "n_latents=17"],
            "core, downstream_loss, counted: run: no finished cell with --where n_latents=17; n_latents is 16, 24, 32",
        ),
        (["--where", "n_latents=many"], "n_latents holds numbers, not 'many'"),
        (["--where", "architecture>topk"], "architecture holds text, which has no order"),
        (["--evals", "core", "--latents", "3"], "core looks at all latents"),
    ):
        result = CliRunner().invoke(app, ["eval", "run", *arguments])
        assert isinstance(result.exception, SaescaleError)
        assert words in str(result.exception)
    # One of them meets no cell: the other goes on.
    done = evaluate_run("run", [{"counted": {"where": {"n_latents": 17}}}, "nmse"])
    assert (done.measured, len(done.why)) == (3, 1)


def test_a_table_of_an_earlier_version_is_gone_on_with(run: RunDirectory) -> None:
    evaluate_run("run", ["counted", "core"])
    now = pq.read_table("run/evals.parquet")
    pq.write_table(
        now.drop_columns(["latents", "others", "seconds", "shared_seconds"]).replace_schema_metadata(),
        "run/evals.parquet",
    )
    assert evaluate_run("run", ["counted", "core", "nmse"]) == (3, 6, 0, ())
    assert run.read_evals().num_rows == now.num_rows + 6


def test_labels_that_there_are_not_are_one_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    change_toy(monkeypatch, 'labels = ("ahead",)', "labels = ()")
    done = evaluate_run("run", ["toy", "counted"])
    why = ("toy of 3 cells: the subject toy has no labels",)
    assert done == (3, 0, 0, why)  # nothing that could be mended
    assert evaluate_run("run", ["toy", "counted"]) == (0, 3, 0, why)
    assert evaluate_run("run", ["toy"]) == (0, 0, 3, why)  # but then nothing was measured at all


def test_costs_are_told_from_the_first_cell_on(run: RunDirectory) -> None:
    told: list[tuple[int, int, str, float | None]] = []
    lines: list[str] = []
    evaluate_run(
        "run", ["nmse", "counted"], display=SimpleNamespace(stage=lines.append, evals=lambda *a: told.append(a))
    )
    assert [(done, total) for done, total, _, _ in told] == [(done, 6) for done in range(7)]
    assert [left is None for *_, left in told] == [True, True, False, False, False, False, False]
    assert told[-1][3] == 0
    assert told[0][2].startswith("nmse of n16-")
    seconds = r"\d+(\.\d)? (s|min)"
    assert re.fullmatch(rf"nmse {seconds}, counted {seconds} a cell", told[-1][2])
    # What cannot be measured at all keeps nobody from knowing.
    Path("mine/evals/broken.py").write_text(SHARED.replace("return 7", "raise SaescaleError('no task fits')"))
    told.clear()
    evaluate_run("run", ["broken", "core"], display=SimpleNamespace(evals=lambda *a: told.append(a)))
    assert [left is None for *_, left in told] == [True, True, False, False, False, False, False]
    assert re.fullmatch(rf"core {seconds} a cell", told[-1][2])
    # Of what the run has rows of, before anything is measured: here as if by a slower machine.
    slow = {"nmse": 150.0, "counted": 2.0}
    rows = [
        row | {"seconds": slow[row["evaluation"]]} for row in run.read_evals().to_pylist() if row["evaluation"] in slow
    ]
    some = pa.Table.from_pylist([row for row in rows if not row["cell_id"].startswith("n32")], EVALS)
    pq.write_table(some, "run/evals.parquet")
    told.clear()
    evaluate_run("run", ["nmse", "counted", "core"], display=SimpleNamespace(evals=lambda *a: told.append(a)))
    assert told[0] == (0, 5, "nmse 2.5 min, counted 2.0 s a cell", None)  # of core nothing is known
    pq.write_table(some, "run/evals.parquet")
    shown = CliRunner().invoke(app, ["eval", "run", "--evals", "nmse,counted"], env={"COLUMNS": "200"})
    assert "2 to measure: nmse 2.5 min, counted 2.0 s a cell, about 2 min 32 s for all" in shown.output
    # What cells share comes once, and to what is left until then.
    rows = [
        row | {"shared_seconds": 200.0 if row["evaluation"] == "counted" and "n16" in row["cell_id"] else 0.001}
        for row in some.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, EVALS), "run/evals.parquet")
    told.clear()
    evaluate_run("run", ["nmse", "counted"], display=SimpleNamespace(evals=lambda *a: told.append(a)))
    first, *_, last = told
    assert first[2:] == ("nmse 2.5 min, counted 2.0 s a cell and 3.3 min once", pytest.approx(352, abs=0.01))
    assert "once" not in last[2]
    found = run.read_evals().to_pylist()
    (own,) = [row for row in found if row["cell_id"].startswith("n32") and row["evaluation"] == "counted"]
    assert own["shared_seconds"] < 100


def test_export_and_import_give_the_same_file(run: RunDirectory) -> None:
    cell = run.cell_url(run.read_results()["cell_id"][0].as_py())
    said = CliRunner().invoke(app, ["export", cell, "--format", "native", "--out", "out/a.safetensors"])
    assert said.exit_code == 0, said.output
    assert "Next: saescale import out/a.safetensors" in said.output
    said = CliRunner().invoke(app, ["import", "out/a.safetensors", "--format", "native", "--out", "out/b.safetensors"])
    assert said.exit_code == 0, said.output
    said = CliRunner().invoke(app, ["export", cell, "--out", "out/cut", "--max-shard-size", "1 kB"])
    assert said.exit_code == 0, said.output
    assert "out/cut/sae.safetensors.index.json" in said.output
    said = CliRunner().invoke(app, ["import", "out/cut", "--out", "out/c.safetensors"])
    assert said.exit_code == 0, said.output
    assert same_sae(f"{cell}/sae.safetensors", "out/a.safetensors", "out/b.safetensors", "out/c.safetensors")
    for arguments, words in (
        (["export", cell, "--out", "x", "--max-shard-size", "5 GX"], "a size such as 200 GB or 1.5 TiB, not '5 GX'"),
        (["export", cell, "--out", "x", "--format", "toy", "--max-shard-size", "5GB"], "is of the format native"),
        (["export", cell, "--out", cell], "the SAE lies at"),
        (["export", "out/cut", "--out", "out/cut", "--max-shard-size", "2 kB"], "the SAE lies at"),
        (["export", "nowhere", "--out", "x"], "no SAE at nowhere"),
        (["export", cell, "--format", "natve", "--out", "x"], "did you mean native"),
        (["import", "store/manifest.json", "--out", "x"], "no SAE at store/manifest.json"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, SaescaleError)
        assert words in str(result.exception)
