"""How far a sweep is, as told from its run directory alone, and what a person sees of it."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saescale.cluster.front.inspection import describe
from saescale.cluster.front.status_view import cells_lines, jobs_table, line, render
from saescale.cluster.sweep.status import MAX_READ, CellStatus, JobStatus, SweepStatus, read_status, with_job
from saescale.storage import checkpoint
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import Lease, RunningCell, Standing, newest_file
from saescale.storage.rundir import RunDirectory
from saescale.storage.waiting import waiting, waits
from tests.cluster.command import ROOT, SAESCALE, assert_one_line, environment, interruptible, saescale, saescale_here


@pytest.fixture(autouse=True)
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saescale.storage.lease.BEAT_S", 0.2)


def row(n_latents: int, k: int, status: str = "pending", seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": f"n{n_latents}-k{k}-s{seed}",
        "n_latents": n_latents,
        "k": k,
        "seed": seed,
        "status": status,
    } | more


def make_run(url: str, rows: list[dict[str, Any]]) -> RunDirectory:
    run = RunDirectory(url)
    run.write_spec({"name": "grid", "grid": {"name": "no"}, "store": "s", "resolved": {"name": "neither"}})
    run.write_results(rows)
    return run


ROWS = [
    row(64, 2, "done", nmse=0.5, dead_fraction=0.0, wall_s=1.5),
    row(64, 4, "failed", error="the loss is not finite [at step 3]"),
    row(128, 2),
    row(128, 4),
]


def statuses(found: SweepStatus) -> list[str]:
    return [cell.status for cell in found.cells]


def shown(*what: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(*what, highlight=False)
    return console.export_text()


@pytest.mark.parametrize("remote", [False, True])
def test_without_a_driver_the_files_of_the_cells_tell(tmp_path: Path, remote: bool, request: Any) -> None:
    url = request.getfixturevalue("s3_url") if remote else str(tmp_path / "run")
    rows = [*ROWS, row(256, 2), row(256, 4)]
    run = make_run(url, rows)
    checkpoint.save(run.checkpoint_url("n128-k2-s0"), 7, {}, {})
    # These ended after the ledger was last written.
    result = row(128, 4, "done", nmse=0.4, wall_s=2.0)
    run.write_cell_result("n128-k4-s0", result)
    run.write_json("cells/n128-k4-s0/sae.safetensors", {})
    run.write_cell_result("n256-k2-s0", row(256, 2, "failed", error="too hot"))
    found = read_status(url)
    assert (found.sweep, found.state, found.driver, found.standing) == ("grid", "unfinished", None, None)
    assert statuses(found) == ["done", "failed", "started", "done", "failed", "pending"]
    assert [cell.step for cell in found.cells] == [None, None, 7, None, None, None]
    assert (found.cells[3].nmse, found.cells[4].error) == (0.4, "too hot")
    assert found.counts.model_dump() == {
        "cells": 6, "done": 2, "diverged": 0, "missed_k": 0, "failed": 2, "running": 0, "started": 1, "pending": 1,
    }  # fmt: skip


def test_thousands_of_cells_are_not_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(str(tmp_path / "run"), [row(64, k) for k in range(1, 101)])
    for k in range(1, 101):
        run.write_cell_result(f"n64-k{k}-s0", row(64, k, "failed" if k > 60 else "done", nmse=0.1))
        if k <= 60:
            run.write_json(f"cells/n64-k{k}-s0/sae.safetensors", {})
    read: list[str] = []
    plain = RunDirectory.read_cell_result
    monkeypatch.setattr(RunDirectory, "read_cell_result", lambda run, cell: read.append(cell) or plain(run, cell))
    found = read_status(run.url)
    assert statuses(found) == ["done"] * 60 + ["failed"] * 40
    assert len(read) == MAX_READ


def test_a_live_driver_tells_what_runs(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    running = RunningCell(cell_id="n128-k2-s0", worker="gpu-1/77", step=30, steps=100, nmse=0.45, dead_fraction=0.01)
    with Lease(run.url, job="grid-1a2b3c4d") as lease:
        lease.standing = Standing(
            cells=4, done=1, failed=1, fraction=0.6, tokens_per_s=1234.0, left_s=75, interrupted=1, running=[running]
        )
        until(lambda: read_status(run.url).counts.running == 1)
        found = read_status(run.url)
        picture, plain = shown(render(found, 100), width=100), line(found)
    assert found.state == "running"
    assert found.active
    assert found.driver is not None
    assert found.driver.alive
    assert found.driver.job == "grid-1a2b3c4d"
    assert statuses(found) == ["done", "failed", "running", "pending"]
    assert found.cells[2].model_dump() == running.model_dump() | {
        "n_latents": 128, "k": 2, "seed": 0, "status": "running", "wall_s": None, "l0_error": None, "error": None,
        "architecture": None, "store": None, "subject": None, "site": None,
    }  # fmt: skip
    for said in (
        "1 of 4 cells done, 1 running, 1 failed, 1 pending",
        "60% of the FLOPs, 1,234 SAE tokens/s, 1 min 15 s",
    ):
        assert said in picture
        assert said in plain
    assert "1 pack interrupted" in picture
    assert f"process {os.getpid()} on" in picture
    assert "n128-k2-s0  gpu-1/77  30/100  0.45  0.01" in picture
    assert "the loss is not finite [at step 3]" in picture  # brackets are no markup
    ended = read_status(run.url)
    assert (ended.state, ended.active, ended.counts.running) == ("stopped", False, 0)
    assert "run the same command again" in shown(render(ended, 80))


def test_what_ended_in_a_pack_at_work_counts_as_done(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    lease = Lease(run.url)
    lease.standing = Standing(cells=4, done=2, failed=1, running=[])
    until(lambda: read_status(run.url).counts.done == 2)
    counts = read_status(run.url).counts
    assert (counts.done, counts.failed, counts.pending) == (2, 1, 1)
    lease.end("finished")
    assert read_status(run.url).counts.done == 1


@pytest.mark.parametrize(("state", "error"), [("finished", None), ("stopped", None), ("failed", "disk full")])
def test_how_a_driver_ended(tmp_path: Path, state: Any, error: str | None) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    Lease(run.url).end(state, error)
    found = read_status(run.url)
    assert (found.state, found.reason, found.active) == (state, error, False)
    assert (error or "") in shown(render(found, 80))


def test_a_driver_that_was_killed_is_said_to_have_died(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    code = "import os, sys; from saescale.storage.lease import Lease; Lease(sys.argv[1]); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, run.url], cwd=ROOT, check=False)
    found = read_status(run.url)
    assert found.state == "died"
    assert "ended without a word" in shown(render(found, 200), width=200)


def test_a_lost_cluster_has_a_state_of_its_own(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    lease = Lease(run.url)
    lease.end("lost", "the head of the Ray cluster at h:6379 is gone")
    found = read_status(run.url)
    assert (found.state, found.reason, found.active) == ("lost", "the head of the Ray cluster at h:6379 is gone", False)
    picture = shown(render(found, 100), width=100)
    assert "Next: run the same command again when the cluster is up" in picture
    assert "checkpoints" not in picture  # of which there are none
    checkpoint.save(run.checkpoint_url("n128-k2-s0"), 7, {}, {})
    assert "it goes on from the checkpoints" in shown(render(read_status(run.url), 100), width=100)


def test_what_a_driver_waits_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "__defaults__", (0.0,))
    run = make_run(str(tmp_path / "run"), ROWS)
    with Lease(run.url) as lease, waiting("an answer of s3://b", limit_s=600):
        until(lambda: bool(read_status(run.url).waits))
        found = read_status(run.url)
        assert "waiting for an answer of s3://b: " in shown(render(found, 100), width=100)
        assert "so far" in line(found)
        lease.end("stopped")
    assert read_status(run.url).waits == []


def test_diverged_cells_and_architectures_are_told(tmp_path: Path) -> None:
    rows = [
        row(64, 2, "done", nmse=0.5, architecture="topk"),
        row(64, 2, "done", nmse=1e27, architecture="jumprelu") | {"cell_id": "other"},
        row(128, 2, architecture="jumprelu"),
    ]
    found = read_status(make_run(str(tmp_path / "run"), rows).url)
    assert (found.counts.done, found.counts.diverged) == (2, 1)
    assert [cell.architecture for cell in found.cells] == ["topk", "jumprelu", "jumprelu"]
    picture = shown(render(found, 100), width=100)
    assert "2 of 3 cells done (1 of them diverged)" in picture
    assert "other" in picture
    assert [words for words in picture.splitlines() if "n=" in words] == [
        "     topk n=64  0.5000", " jumprelu n=64   1e+27", "jumprelu n=128       ·",
    ]  # fmt: skip
    lines = list(cells_lines(found.cells))
    assert lines[2].split()[:3] == ["other", "jumprelu", "diverged"]


def test_inspect_names_each_law_once(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    for laws, said in ((["n_k", "n", "n_k", "n"], "n_k, n"), ([], "none could be fitted")):
        run.write_json("fits.json", {"format": 1, "fits": [{"law": law} for law in laws]})
        assert describe(run.url)["laws"] == said


def test_inspect_takes_the_file_of_an_sae_and_names_what_is_not_finished(tmp_path: Path) -> None:
    sae = next((ROOT / "tests" / "data" / "run-0.1.0" / "cells").iterdir()) / "sae.safetensors"
    (tmp_path / "mine.safetensors").write_bytes(sae.read_bytes())
    assert describe(str(tmp_path / "mine.safetensors")) == describe(str(sae.parent))
    for file, said in (
        ("harvest.json", "is a harvest that is not finished; run the same harvest again"),
        ("live.json", "holds blocks of a live source"),
    ):
        (tmp_path / file).write_text("{}")
        with pytest.raises(SaescaleError, match=said):
            describe(str(tmp_path))


def test_the_document_for_programs(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    result = saescale("status", run.url, "--json")
    document = json.loads(result.stdout)
    assert list(document) == [
        "format", "sweep", "run", "state", "reason", "driver", "job", "counts", "standing", "waits",
        "sources", "cells",
    ]  # fmt: skip
    assert document["counts"]["cells"] == len(document["cells"]) == 4
    assert SweepStatus.model_validate(document) == read_status(run.url)


def test_a_run_directory_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    code = (
        "import sys, saescale.cluster.cli; sys.argv[1:] = ['status', sys.argv[1], '--cells']\n"
        "try: saescale.cluster.cli.main()\n"
        "finally: print([m for m in ('torch', 'ray', 'wandb', 'lightning', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, run.url], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    assert "the loss is not finite [at step 3]" in result.stdout


def test_where_there_is_no_run(tmp_path: Path) -> None:
    assert_one_line(saescale_here("status", str(tmp_path)), "is not a run directory")
    assert_one_line(saescale_here("status", "grid-1a2b3c4d", RAY_API_SERVER_ADDRESS=""), "--address")
    assert_one_line(saescale_here("stop", str(tmp_path)), "nothing drives")
    run = make_run(str(tmp_path / "run"), ROWS)
    (tmp_path / "run" / "driver.json").write_text("{")
    assert_one_line(saescale_here("status", run.url), "driver.json is damaged")
    (tmp_path / "run" / "sweep.yaml").write_text("name: [")
    assert_one_line(saescale_here("status", run.url), "sweep.yaml is damaged")


def test_watching_without_a_terminal_ends_with_the_sweep(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    lease = Lease(run.url)
    watching = [
        subprocess.Popen([*SAESCALE, "status", run.url, *how], env=environment(), stdout=subprocess.PIPE, text=True)
        for how in (["--watch"], ["--watch", "--json"])
    ]
    for process in watching:
        assert process.stdout is not None
        assert "running" in process.stdout.readline()
    lease.end("finished")
    lines, documents = [process.communicate(timeout=60)[0].splitlines() for process in watching]
    assert lines[-1].startswith("grid finished, 1 of 4 cells done")
    assert json.loads(documents[-1])["state"] == "finished"
    assert [process.returncode for process in watching] == [0, 0]


def test_watching_on_a_terminal_leaves_the_last_picture(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    Lease(run.url).end("finished")
    result = saescale("status", run.url, "--watch", FORCE_COLOR="1", TERM="xterm", COLUMNS="80", LINES="24")
    assert result.returncode == 0, result.stderr
    last = result.stdout.rsplit("\x1b[?25h", 1)[-1]  # after the cursor is shown again
    assert last.count("1 of 4 cells done, 1 failed, 2 pending") == 1


def test_who_ends_watching_ends_nothing_else(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    with Lease(run.url):
        process = subprocess.Popen(
            [*SAESCALE, "status", run.url, "-w"],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "the sweep goes on\n"
        assert process.returncode == 0
        assert read_status(run.url).state == "running"


def test_stop_ends_a_driver_on_this_machine(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    code = (
        "import signal, sys, time, saescale.storage.lease\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "with saescale.storage.lease.Lease(sys.argv[1]): time.sleep(300)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, run.url], cwd=ROOT)
    until(lambda: read_status(run.url).state == "running")
    result = saescale("stop", run.url)
    assert result.returncode == 0, result.stderr
    assert "stopped; the checkpoints are in" in result.stdout
    assert driver.wait(timeout=60) == 130
    assert read_status(run.url).state == "stopped"


def test_a_driver_elsewhere_is_not_stopped_from_here(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ROWS)
    with Lease(run.url):
        document = json.loads(Path(newest_file(str(tmp_path / "run"))[0]).read_text())
    elsewhere = document | {"machine": "far", "host": "far", "state": "running", "beat_at": time.time()}
    Path(newest_file(str(tmp_path / "run"))[0]).write_text(json.dumps(elsewhere))
    assert_one_line(saescale_here("stop", run.url), "driven on another machine", "there")
    submitted = elsewhere | {"job": "grid-1a2b3c4d"}
    Path(newest_file(str(tmp_path / "run"))[0]).write_text(json.dumps(submitted))
    assert_one_line(saescale_here("stop", run.url, RAY_API_SERVER_ADDRESS=""), "--address")


def grid(sizes: int, ks: int, seeds: int, status: Callable[[int], str]) -> SweepStatus:
    cells = [
        CellStatus(**row(512 + n, 1 + k, status(i), seed, nmse=0.1 + seed, step=5, steps=10, error="bad " * 50))
        for i, (n, k, seed) in enumerate((n, k, s) for n in range(sizes) for k in range(ks) for s in range(seeds))
    ]
    return SweepStatus(sweep="grid", run="r", state="running", counts={"cells": len(cells)}, cells=cells)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("height", [24, 40])
def test_ten_thousand_cells_fit_on_a_terminal(width: int, height: int) -> None:
    draw = random.Random(0)
    drawn = [draw.choice(["done", "failed", "running", "started", "pending"]) for _ in range(1000)]
    status = grid(20, 50, 10, lambda i: drawn[i // 10])
    lines = shown(render(status, width, height), width=width).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert sum("--cells lists all" in line for line in lines) >= 2
    for text in ("k=1 ", "n=512", "n=531"):
        assert any(text in line for line in lines), text


def test_each_status_has_its_look() -> None:
    names = ["done", "failed", "running", "started", "pending"]
    picture = shown(render(grid(1, 5, 1, lambda i: names[i]), 80)).splitlines()
    assert next(line for line in picture if line.startswith("n=512")).split()[1:] == [
        "0.1000", "failed", "50%", "started", "·",
    ]  # fmt: skip


def test_a_place_of_several_seeds_says_how_many_are_done() -> None:
    partly = shown(render(grid(1, 2, 3, lambda i: "done" if i < 4 else "pending"), 80))
    assert "best nmse" in partly
    assert "0.1000 (1/3)" in partly
    assert "0.1000 " in partly.replace("0.1000 (1/3)", "")


def test_every_cell_on_a_line() -> None:
    lines = list(cells_lines(grid(2, 2, 1, lambda i: ("done", "failed")[i % 2]).cells))
    assert len(lines) == 5
    assert lines[1].split()[:4] == ["n512-k1-s0", "done", "5/10", "0.1"]
    assert lines[2].endswith("bad " * 49 + "bad")


def test_a_job_and_its_run(tmp_path: Path) -> None:
    def job(state: str, message: str | None = None) -> JobStatus:
        return JobStatus(
            id="grid-1a2b3c4d", sweep="grid", run="r", state=state, message=message, submitted_at=1000, ended_at=None
        )

    for state, expected in (("pending", "waiting"), ("running", "starting"), ("failed", "failed")):
        found = with_job(None, job(state, "no store" if state == "failed" else None))
        assert (found.state, found.cells) == (expected, [])
        assert expected in shown(render(found, 80))
    run = make_run(str(tmp_path / "run"), ROWS)
    Lease(run.url, job="grid-00000000").end("stopped")
    before = read_status(run.url)
    assert with_job(before, job("running")).state == "starting"  # it has not taken the run up yet
    assert with_job(before, job("stopped")).state == "stopped"
    assert with_job(before, job("failed", "no store")).reason == "no store"
    Lease(run.url, job="grid-1a2b3c4d").end("failed", "disk full")
    assert with_job(read_status(run.url), job("failed", "x")).reason == "disk full"
    with Lease(run.url):
        other = with_job(read_status(run.url), job("failed", "driven by another process"))
    assert other.state == "running"
    assert "the job said: driven by another process" in shown(render(other, 120), width=120)
    assert "grid-1a2b3c4d  grid   running" in shown(jobs_table([job("running")], now=1060.0))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except SaescaleError:
            pass
        time.sleep(0.1)
    raise AssertionError("waited in vain")
