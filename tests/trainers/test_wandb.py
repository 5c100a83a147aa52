"""The real W&B client: offline, read back from disk; online, against a loopback server that records what arrives."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
import wandb
from pydantic import ValidationError

from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import (
    Logged,
    WandbLogger,
    WandbSettings,
    how_to_read,
    log_summary,
    resolve_mode,
)
from tests.trainers.wandb_case import (
    CONTEXT,
    DONE,
    FITS,
    KEY,
    OFFLINE,
    RESULTS,
    bare_machine,
    cell,
    messages,
    row,
    server,
    train,
    wait_for,
)  # fmt: skip
from tests.trainers.wandb_server import WandbServer

__all__ = ["bare_machine", "server"]  # fixtures


class Offline(NamedTuple):
    record: dict[str, Any]  # id, name, group, job type, tags
    history: list[dict[str, Any]]
    metrics: dict[str, str | None]  # defined metric -> its step axis
    overview: dict[str, Any]  # config, summary, exit_code


def inspect(run: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def runs(directory: Path) -> list[Offline]:
    """All offline runs under `directory`, oldest first, as W&B's own reader sees them."""
    found = []
    for folder in sorted((directory / "wandb").glob("offline-run-*"), key=lambda f: f.stat().st_ctime_ns):
        records = [json.loads(line) for line in inspect(folder).splitlines()]
        metrics = [r["metric"] for r in records if r["type"] == "metric"]
        found.append(
            Offline(
                record=next(r["run"] for r in records if r["type"] == "run"),
                history=[r["history"]["item"] for r in records if r["type"] == "history"],
                metrics={m["name"]: m.get("step_metric") for m in metrics},
                overview=json.loads(inspect(folder, "--summary")),
            )
        )
    return found


def test_two_cells_are_two_runs_of_one_group(tmp_path: Path) -> None:
    logger = WandbLogger(OFFLINE, "my sweep", str(tmp_path))
    cells = [cell(16), cell(32, seed=1)]
    logger.open(cells, CONTEXT)
    for step in (2, 4):
        for c in cells:
            logger.log(c, row(step, nmse=1 / (step * c.n_latents)))
    logger.finish(cells[0], DONE)
    logger.finish(cells[1], {"status": "failed", "error": "loss is NaN at step 4"})
    logger.close()

    by_id = {run.record["run_id"].rsplit("-", 1)[0]: run for run in runs(tmp_path)}
    assert set(by_id) == {c.cell_id for c in cells}
    first, second = (by_id[c.cell_id] for c in cells)
    assert [r["_step"] for r in first.history] == [2, 4]
    for logged, step in zip(first.history, (2, 4), strict=True):
        expected = row(step, nmse=1 / (step * 16))._asdict()
        # What a cell has none of is not logged, or W&B would show an empty panel.
        del expected["step"], expected["coefficient"]
        assert "coefficient" not in logged
        assert {name: logged[name] for name in expected} == expected
    assert [r["nmse"] for r in second.history] == [1 / 64, 1 / 128]

    assert first.record["run_group"] == second.record["run_group"] == "my sweep"
    assert first.record["job_type"] == "cell"
    assert first.record["project"] == "saescale"
    assert (first.record["display_name"], second.record["display_name"]) == ("topk n16 k4", "topk n32 k4 seed 1")
    assert set(first.record["tags"]) == {"topk", "toy", "resid_post.3"}
    for name in ("nmse", "train_nmse", "l0", "dead_fraction", "dead_fraction_long", "lr", "tokens_per_s"):
        assert first.metrics[name] == "tokens"
    assert first.metrics["tokens"] is None
    assert first.metrics["flops"] is None

    config = first.overview["config"]
    # Settings stand beside the fields, so that runs can be filtered by them.
    defined = cells[0].model_dump(exclude={"settings"}) | cells[0].whole_settings.model_dump()
    assert {name: config[name] for name in defined} == defined
    assert config["cell_id"] == cells[0].cell_id
    assert config["site"] == "resid_post.3"
    summary = first.overview["summary"]
    assert {name: summary.get(name) for name in DONE} == DONE
    assert summary["diverged"] is False
    assert first.overview["exit_code"] == 0
    assert second.overview["exit_code"] == 1
    assert second.overview["summary"]["error"] == "loss is NaN at step 4"


def test_a_resumed_cell_has_the_same_run(tmp_path: Path) -> None:
    logger = WandbLogger(OFFLINE, "sweep", str(tmp_path))
    for step in (2, 4):
        logger.open([cell()], CONTEXT)
        logger.log(cell(), row(step))
        if step == 4:
            logger.finish(cell(), DONE)
        logger.close()
    before, after = runs(tmp_path)
    assert before.record["run_id"] == after.record["run_id"]
    assert after.record["resume"]
    assert before.overview["summary"]["status"] == "interrupted"
    assert [r["_step"] for r in before.history + after.history] == [2, 4]
    assert (before.overview["exit_code"], after.overview["exit_code"]) == (1, 0)


def test_a_killed_process_leaves_its_points(tmp_path: Path) -> None:
    script = f"""
from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import *
from saescale.storage.columns import CurveRow
from saescale.trainers.cell import Cell
wandb_client.FLUSH_INTERVAL = 0.2
cell = Cell(**{cell().model_dump()!r})
logger = WandbLogger(WandbSettings(mode="offline"), "sweep", {str(tmp_path)!r})
logger.open([cell], {{}})
logger.log(cell, CurveRow(*{tuple(row(2))!r}))
logger._thread.submit(print, "logged", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "logged\n"
    deadline = time.monotonic() + 120
    while not any('"history"' in inspect(folder) for folder in (tmp_path / "wandb").glob("offline-run-*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.communicate()
    (run,) = runs(tmp_path)
    assert [r["_step"] for r in run.history] == [2]


def test_sweeps_do_not_share_runs() -> None:
    assert wandb_client.run_id("cell", "a") != wandb_client.run_id("cell", "b")


def test_secrets_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    context = {
        **CONTEXT,
        "storage_options": {"key": "hush", "secret": "hush", "token": "hush", "endpoint": "http://u:hush@host:9000/x"},
        "urls": ["https://b/x?X-Amz-Signature=hush&other=1"],
    }
    logger = WandbLogger(OFFLINE, "sweep", str(tmp_path))
    logger.open([cell()], context)
    logger.finish(cell(), {"status": "failed", "error": "cannot read s3://me:hush@bucket/x"})
    logger.close()
    bad = pa.table({"cell_id": ["a"], "error": ["cannot read s3://me:hush@bucket/x"]})
    log_summary(OFFLINE, "sweep", context, {**FITS, "source": "s3://me:hush@bucket/x"}, bad, {}, str(tmp_path))
    written = [path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert written
    assert not [data for data in written if b"hush" in data or KEY.encode() in data]
    config, of_summary = (run.overview["config"] for run in runs(tmp_path))
    assert of_summary["store"] == "s3://***@bucket/store"
    assert config["context_store"] == "s3://***@bucket/store"
    assert config["store"] == cell().store
    assert config["storage_options"] == {"endpoint": "http://***@host:9000/x"}
    assert config["tokens"] == 64


def test_summary_run(tmp_path: Path) -> None:
    figure = tmp_path / "nmse.png"
    matplotlib.image.imsave(figure, np.zeros((4, 4, 3)))
    for _ in range(2):
        logged = log_summary(OFFLINE, "sweep", CONTEXT, FITS, RESULTS, {"nmse.png": figure.read_bytes()}, str(tmp_path))
        assert logged == Logged("offline", None, True)
    first, again = runs(tmp_path)
    assert first.record["run_id"] == again.record["run_id"]
    assert (first.record["job_type"], first.record["run_group"]) == ("summary", "sweep")
    assert first.overview["config"]["laws"] == {"n_k": "L = ...", "c": "L = a C^b"}
    assert first.overview["exit_code"] == 0
    assert first.overview["summary"]["n_k/alpha/value"] == -0.5
    assert first.overview["summary"]["n_k/alpha/high"] == -0.4
    assert first.overview["summary"]["n_k/exponent_of_n_at_k32/low"] == 0.05
    assert first.overview["summary"]["c/b/value"] == -0.1
    assert first.overview["summary"]["n_k/points"] == 20
    assert first.overview["summary"]["cells_diverged"] == 1
    assert first.overview["summary"]["figures/nmse"]["_type"] == "image-file"
    assert list((tmp_path / "wandb" / "artifacts").rglob("*"))
    media = next((tmp_path / "wandb").glob("offline-run-*/files/media"))
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in media.rglob("*.table.json")}
    assert tables["coefficients"]["data"][0] == ["n_k", "alpha", -0.5, -0.6, -0.4]
    assert [r[0] for r in tables["results"]["data"]] == ["a", "b"]


def test_off_writes_nothing(tmp_path: Path) -> None:
    off = WandbSettings(mode="off")
    logger = WandbLogger(off, "sweep", str(tmp_path / "w"))
    logger.open([cell()], CONTEXT)
    logger.log(cell(), row(1))
    logger.finish(cell(), DONE)
    logger.close()
    assert log_summary(off, "sweep", CONTEXT, FITS, RESULTS, [], str(tmp_path / "w")) == Logged("off", None, True)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_BASE_URL": "http://wandb.example"}, "online"),
        ("auto", {"WANDB_BASE_URL": "http://other.example"}, "offline"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("off", {"WANDB_API_KEY": KEY}, "off"),
    ],
)
def test_mode(
    setting: Any, environment: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"machine wandb.example\n  login user\n  password {KEY}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(WandbSettings(mode=setting)) == mode


def test_bad_key_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.warns(UserWarning, match="logging offline") as caught:
        assert resolve_mode(WandbSettings()) == "offline"
    assert "too-short" not in str(caught[0].message)


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_nobody_is_asked(mode: str, tmp_path: Path) -> None:
    """On a terminal, where W&B would ask for a key and wait."""
    script = f"""
from saescale.trainers.loggers.wandb_cells import *
from tests_cell import cell
logger = WandbLogger(WandbSettings(mode={mode!r}), "sweep", {str(tmp_path)!r})
logger.open([cell], {{}})
logger.close()
"""
    (tmp_path / "tests_cell.py").write_text(
        f"from saescale.trainers.cell import Cell\ncell = Cell(**{cell().model_dump()!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    assert process.wait(timeout=60) == 0
    said = os.read(terminal, 10_000).decode() if mode == "online" else ""
    os.close(terminal)
    assert ("has no key" in said) == (mode == "online")
    assert len(runs(tmp_path)) == 1


def test_import_is_cheap() -> None:
    script = (
        "import sys, saescale.trainers.loggers.wandb_cells; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, stdin=subprocess.DEVNULL).returncode == 0


def raising(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_failing_client_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", raising)
    (said,) = messages(lambda: train(OFFLINE, tmp_path, [cell(16), cell(32)]))
    assert "No space left" in said
    (said,) = messages(lambda: log_summary(OFFLINE, "sweep", CONTEXT, FITS, RESULTS, [], str(tmp_path)))
    assert "No space left" in said


def test_a_failing_log_turns_that_run_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb.Run, "log", raising)
    assert len(messages(lambda: train(OFFLINE, tmp_path, [cell(16), cell(32)]))) == 2


def test_a_folder_that_cannot_be_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(messages(lambda: train(OFFLINE, tmp_path / "file", [cell()]))) == 1


def test_a_missing_figure_does_not_raise(tmp_path: Path) -> None:
    act = lambda: log_summary(OFFLINE, "s", CONTEXT, FITS, RESULTS, [str(tmp_path / "no.png")], str(tmp_path))  # noqa: E731
    assert len(messages(act)) == 1


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_server_out_of_reach_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    (said,) = messages(lambda: train(WandbSettings(), tmp_path, [cell(16), cell(32)]))
    assert "no answer" in said
    assert "wandb sync" in said
    assert len(runs(tmp_path)) == 2


def test_a_server_that_never_lets_a_run_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run costs one (short) time-out, those after it go to disk."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr(wandb_client, "reachable", lambda mode, directory: mode)
    monkeypatch.setattr(wandb_client, "INIT_TIMEOUT", 2.0)
    (said,) = messages(lambda: train(WandbSettings(), tmp_path, [cell(16), cell(32), cell(64)]))
    assert cell(16).cell_id in said
    assert [run.overview["config"]["n_latents"] for run in runs(tmp_path)] == [32, 64]


def test_online(server: WandbServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = [cell(16), cell(32)]
    assert messages(lambda: train(WandbSettings(entity="me"), tmp_path, cells)) == []
    opened = {v["name"]: v for name, v in server.received if name == "UpsertBucket" and v.get("groupName")}
    assert {v["displayName"] for v in opened.values()} == {"topk n16 k4", "topk n32 k4"}
    assert {v["groupName"] for v in opened.values()} == {"sweep"}
    assert {v["project"] for v in opened.values()} == {"saescale"}
    for run_id in opened:
        streamed = [b for path, b in server.received if path == f"/files/me/saescale/{run_id}/file_stream"]
        lines = [
            line for b in streamed for line in b.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        ]
        assert [json.loads(line)["nmse"] for line in lines] == [0.5]
        assert [b["exitcode"] for b in streamed if b.get("complete")] == [0]
    asked = [v["name"] for name, v in server.received if name == "RunResumeStatus"]
    assert set(asked) == set(opened)
    assert "hush" not in json.dumps(server.received)
    assert KEY not in json.dumps(server.received)
    assert capfd.readouterr() == ("", "")


def test_a_server_that_dies_holds_nobody_up(server: WandbServer, tmp_path: Path) -> None:
    """All cells together wait once for their uploads, and the process ends."""
    script = f"""
from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import *
from saescale.trainers.cell import Cell
wandb_client.FINISH_TIMEOUT = 2.0
cells = [Cell(**fields) for fields in {[cell(n).model_dump() for n in (16, 32, 64, 128)]!r}]
logger = WandbLogger(WandbSettings(), "sweep", {str(tmp_path)!r})
logger.open(cells, {{}})
input()
for cell in cells:
    logger.finish(cell, {{"status": "done"}})
logger.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "always", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: len({v["name"] for name, v in server.received if name == "UpsertBucket"}) == 4, process)
        server.shutdown()
        server.server_close()
        said = process.communicate("\n", timeout=180)[1]
    finally:
        process.kill()
    assert process.returncode == 0
    assert said.count("W&B: ") == 1
    assert "Traceback" not in said


def test_how_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example")
    (tmp_path / "my runs" / "wandb").mkdir(parents=True)
    line = how_to_read("offline", str(tmp_path / "my runs"), OFFLINE, "sweep")
    assert f"wandb leet '{tmp_path}/my runs/wandb'`" in line
    assert f"wandb sync '{tmp_path}/my runs/wandb'/offline-run-*`" in line
    online = how_to_read("online", "x", WandbSettings(entity="me"), "a/b")
    assert "http://wandb.example/me/saescale/groups/a%2Fb" in online
    assert "a/b" in how_to_read("online", "x", WandbSettings(), "a/b")
    assert "\n" not in line + online


def test_the_command_to_upload_finds_the_runs(tmp_path: Path) -> None:
    train(OFFLINE, tmp_path, [cell(16), cell(32)])
    command = re.findall(r"`(wandb sync [^`]*)`", how_to_read("offline", str(tmp_path), OFFLINE, "sweep"))[0]
    shell = f"{sys.executable} -m {command} --dry-run"
    done = subprocess.run(
        shell, shell=True, capture_output=True, text=True, timeout=60, env=os.environ | {"WANDB_SILENT": "false"}
    )
    assert "Would sync 2 run(s)" in done.stdout + done.stderr


def test_settings_refuse_unknown_keys() -> None:
    with pytest.raises(ValidationError):
        WandbSettings(projekt="x")
