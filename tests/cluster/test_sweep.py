"""Sweeps on a real two-node Ray cluster: results, kills, resume, the ledger, W&B files."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.driver import run_sweep
from cluster.spec import parse_spec
from scaling.report import analyse
from storage.errors import SaescaleError, SaescaleWarning
from storage.lease import Standing
from storage.rundir import RunDirectory
from tests.cluster.conftest import Recorder

TIMES = ("wall_s", "tokens_per_s")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return sorted(rows, key=lambda row: (row["cell_id"], row.get("step") or 0))


def pool_workers() -> list[psutil.Process]:
    """The pool's actors on the nodes that this process started, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
    return found


def test_a_killed_worker_changes_no_result(two_nodes: Any, document: dict[str, Any], tmp_path: Path) -> None:
    document["train"]["tokens"] = 131_072  # long enough for the kill to fall into the middle of a pack
    quiet = Recorder()
    undisturbed = run_sweep(parse_spec(document, "test"), quiet, bootstraps=50)
    assert undisturbed.trained == undisturbed.cells == 9
    fractions, finished = [p.fraction for p in quiet.seen], [p.done for p in quiet.seen]
    assert fractions == sorted(fractions)
    assert finished == sorted(finished)
    assert (fractions[-1], finished[-1]) == (pytest.approx(1.0), 9)

    killed: list[int] = []

    def kill_once(progress: Standing) -> None:
        checkpoints = list(Path(document["out"]).glob("cells/*/checkpoint/latest.json"))
        if not killed and checkpoints and (workers := pool_workers()):
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    document["out"] = str(tmp_path / "disturbed")
    with pytest.warns(UserWarning, match="a worker died"):
        disturbed = run_sweep(parse_spec(document, "test"), Recorder(kill_once), bootstraps=50)
    assert killed
    a, b = undisturbed.run, disturbed.run
    assert without_times(a.read_results().to_pylist()) == without_times(b.read_results().to_pylist())
    assert without_times(a.read_curves().to_pylist()) == without_times(b.read_curves().to_pylist())
    for fits in (undisturbed.fits, disturbed.fits):
        assert {fit["law"] for fit in fits["fits"]} >= {"n_k"}
    strip = lambda fits: {key: value for key, value in fits.items() if key != "source"}  # noqa: E731
    assert strip(undisturbed.fits) == strip(disturbed.fits)


def test_a_finished_sweep_is_not_trained_again(two_nodes: Any, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    first = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    again = Recorder()
    second = run_sweep(parse_spec(document, "test"), again, bootstraps=10)
    assert (first.trained, second.trained) == (2, 0)
    assert second.fits == first.fits
    assert again.stages == []


def test_results_whose_driver_died_before_the_ledger_are_kept(two_nodes: Any, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    wanted = outcome.run.read_results().to_pylist()
    outcome.run.write_results([{"cell_id": row["cell_id"], "status": "pending"} for row in wanted])
    again = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    assert again.trained == 0
    assert again.run.read_results().to_pylist() == wanted


def test_another_sweep_in_the_run_directory_is_refused(two_nodes: Any, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2]}
    run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    before = RunDirectory(document["out"]).read_results().to_pylist()
    document["train"]["ema"] = 0.5
    with pytest.raises(SaescaleError, match=r"holds another sweep \(train.ema is 0.9 there and 0.5 here\)"):
        run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    assert RunDirectory(document["out"]).read_results().to_pylist() == before


def test_a_poisoned_cell_fails_beside_healthy_ones(two_nodes: Any, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    document["train"]["lr"] = {"at": 32, "value": 1e-3, "exponent": 100.0}  # 1.3e27 at 64 latents
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    rows = {row["n_latents"]: row for row in outcome.run.read_results().to_pylist()}
    assert outcome.failed == 1
    assert rows[32]["status"] == "done"
    assert rows[64]["status"] == "failed"
    assert "diverged" in rows[64]["error"]


def test_a_sweep_in_object_storage_with_wandb_offline(
    two_nodes: Any, document: dict[str, Any], store: Any, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fsspec

    from storage.files import join, list_names

    target = fsspec.filesystem("s3")
    target.put(store.url + "/", join(s3_url, "store"), recursive=True)
    monkeypatch.setenv("SAESCALE_CACHE", str(tmp_path / "cache"))
    document |= {"store": join(s3_url, "store"), "out": join(s3_url, "run"), "wandb": {"mode": "offline"}}
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    assert outcome.trained == 2
    assert "report.html" in list_names(document["out"])
    assert {row["status"] for row in outcome.run.read_results().to_pylist()} == {"done"}


def test_wandb_offline_runs_lie_in_the_run_directory(two_nodes: Any, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    document["wandb"] = {"mode": "offline"}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    runs = list((Path(outcome.run.url) / "wandb").glob("offline-run-*"))
    assert len(runs) == 3  # two cells and the summary
    assert outcome.wandb is not None
    assert "wandb sync" in outcome.wandb


def test_warnings_of_workers_reach_the_user(two_nodes: Any, document: dict[str, Any]) -> None:
    """A damaged checkpoint is met in a worker process; the driver says so, and the result is the same."""
    document["grid"] = {"n_latents": [64], "k": [2]}
    document["train"]["tokens"] = 262_144

    def interrupt(progress: Standing) -> None:
        if len(list(Path(document["out"]).glob("cells/*/checkpoint/*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(parse_spec(document, "test"), Recorder(interrupt), bootstraps=10)
    newest = max(Path(document["out"]).glob("cells/*/checkpoint/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-8] + b"garbage!")
    with pytest.warns(SaescaleWarning, match="cannot be used, going back to the one before"):
        outcome = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    assert outcome.run.read_results().to_pylist()[0]["status"] == "done"


def test_too_few_held_out_rows_are_named_before_training(document: dict[str, Any]) -> None:
    document["eval"]["tokens"] = 4_096
    with pytest.raises(SaescaleError, match=r"holds 2048 heldout rows and eval\.tokens asks for 4096"):
        run_sweep(parse_spec(document, "test"), Recorder())
    assert not Path(document["out"]).exists()


def test_a_report_made_half_way_is_made_again_when_the_sweep_is_done(two_nodes: Any, document: dict[str, Any]) -> None:
    document["train"]["tokens"] = 131_072

    def interrupt(progress: Standing) -> None:
        if progress.done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(parse_spec(document, "test"), Recorder(interrupt), bootstraps=10)
    run = RunDirectory(document["out"])
    half = analyse(run, bootstraps=10)
    assert half["cells"] < 9
    whole = run_sweep(parse_spec(document, "test"), Recorder(), bootstraps=10)
    assert whole.fits["cells"] == 9


def test_a_sweep_that_cannot_be_planned_leaves_nothing(two_nodes: Any, document: dict[str, Any]) -> None:
    document["train"] |= {"batch_tokens": 2**30, "tokens": 2**30}
    with pytest.raises(SaescaleError, match=r"needs .* GiB and a worker has"):
        run_sweep(parse_spec(document, "test"), Recorder())
    assert not Path(document["out"]).exists()


def test_a_lost_node_does_not_end_the_sweep(two_nodes: Any, document: dict[str, Any]) -> None:
    """A node with its worker goes down in the middle; the other worker finishes, and the results are complete."""
    document["train"]["tokens"] = 131_072
    extra = two_nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    document["resources"]["workers"] = 3
    removed: list[bool] = []

    def remove(progress: Standing) -> None:
        if not removed and list(Path(document["out"]).glob("cells/*/checkpoint/latest.json")):
            two_nodes.remove_node(extra, allow_graceful=False)
            removed.append(True)

    outcome = run_sweep(parse_spec(document, "test"), Recorder(remove), bootstraps=10)
    assert removed
    assert {row["status"] for row in outcome.run.read_results().to_pylist()} == {"done"}
