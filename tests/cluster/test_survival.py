"""Sweeps under kills, on a real three-node cluster: every cell has one result, that of the undisturbed run."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from saescale.cluster.sweep import execute
from saescale.cluster.sweep import packing as plan
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.lease import Standing, read_driver
from saescale.storage.rundir import RunDirectory
from tests.cluster.command import SAESCALE, environment, saescale_here
from tests.cluster.conftest import NODE, Recorder, processes, trained_alone
from tests.s3_faults import Faults
from tests.survival import assert_same, reached

ROOT = Path(__file__).parents[2]


def one_result_each(run: RunDirectory, cells: int) -> None:
    """No cell lost, and nothing left of the training."""
    rows = run.read_results().to_pylist()
    assert len(rows) == len({row["cell_id"] for row in rows}) == cells
    left = {cell_id: sorted(names) for cell_id, names in run.cell_files().items()}
    assert set(left) == {row["cell_id"] for row in rows}
    assert all(names == ["curve.parquet", "result.json", "sae.safetensors"] for names in left.values())


@pytest.fixture
def sweep(document: dict[str, Any]) -> dict[str, Any]:
    """Long enough for kills to fall into the middle of packs."""
    document["train"]["tokens"] = 196_608
    document["eval"]["every_tokens"] = 32_768
    document["resources"] = {"workers": 3, "checkpoint_every_s": 0.3}
    return document


@pytest.fixture(scope="module")
def undisturbed(three_nodes: Any, store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """What a sweep reaches when nothing happens; trained once for all tests that ask for the same."""
    known: dict[str, Any] = {}

    def of(document: dict[str, Any]) -> dict[str, Any]:
        asked = {key: document[key] for key in ("grid", "train", "eval")}
        if str(asked) not in known:
            out = str(tmp_path_factory.mktemp("undisturbed") / "run")
            quiet = Recorder()
            spec = parse_spec(document | {"out": out, "store": store.url}, "test")
            outcome = run_sweep(spec, quiet, settings=FitSettings(0))
            assert outcome.failed == 0
            fractions, finished = [s.fraction for s in quiet.seen], [s.done for s in quiet.seen]
            assert fractions == sorted(fractions)
            assert finished == sorted(finished)
            assert (fractions[-1], finished[-1]) == (pytest.approx(1.0), outcome.cells)
            one_result_each(outcome.run, outcome.cells)
            known[str(asked)] = reached(outcome.run)
        return known[str(asked)]

    return of


class Killer:
    """Kills something at seeded random moments while a sweep runs, in a thread of its own."""

    def __init__(
        self, kill: Callable[[random.Random], bool], kills: int, seed: int, pause_s: tuple[float, float]
    ) -> None:
        self._kill, self._kills, self._pause_s = kill, kills, pause_s
        self._random = random.Random(seed)
        self.done = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while self.done < self._kills and not self._over.wait(self._random.uniform(*self._pause_s)):
            self.done += self._kill(self._random)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_workers_and_nodes_killed_at_random_change_no_result(
    three_nodes: Any, sweep: dict[str, Any], undisturbed: Callable[..., Any]
) -> None:
    expected = undisturbed(sweep)
    lost_nodes: list[int] = []
    new_nodes: list[int] = []

    def replace_nodes(standing: Standing) -> None:
        # Here, since Ray starts a node in the main thread only.
        if len(new_nodes) < len(lost_nodes):
            three_nodes.add_node(**NODE)
            new_nodes.append(1)

    seen = Recorder(replace_nodes)

    def kill(draw: random.Random) -> bool:
        # Only what trains: a worker that still starts has nothing to lose.
        training = [int(worker.name.split("/")[-1]) for worker in seen.seen[-1].workers] if seen.seen else []
        alive = [pid for pid in training if psutil.pid_exists(pid)]
        # No earlier than that share of the work is done: however fast this machine is, there is something left to do.
        if not alive or seen.seen[-1].fraction < killer.done / 13:
            return False
        if killer.done in (3, 8):
            node = draw.choice([node for node in three_nodes.list_all_nodes() if not node.head])
            three_nodes.remove_node(node, allow_graceful=False)
            lost_nodes.append(1)
            return True
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(alive), signal.SIGKILL)
            return True
        return False

    with Killer(kill, kills=12, seed=4, pause_s=(0.1, 0.5)) as killer:
        outcome = run_sweep(parse_spec(sweep, "test"), seen, settings=FitSettings(0))
    assert killer.done == 12
    assert len(lost_nodes) == len(new_nodes) == 2
    one_result_each(outcome.run, outcome.cells)
    assert_same(reached(outcome.run), expected)


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_drivers_killed_at_random_change_no_result(
    three_nodes: Any, sweep: dict[str, Any], undisturbed: Callable[..., Any], tmp_path: Path
) -> None:
    """Each driver goes on where the one before it was; the second of two says so and stops."""
    expected = undisturbed(sweep)
    draw = random.Random(1)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    command = [*SAESCALE, "sweep", str(path), "--address", three_nodes.address, "--bootstraps", "0"]
    said, kills = "", 0
    for _ in range(4):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
            while driver.poll() is None and not any(Path(sweep["out"]).glob("cells/*/checkpoint/step-*.safetensors")):
                time.sleep(0.05)
            if not said:
                with pytest.raises(SaescaleError, match=r"driven by another process already .process \d+ on"):
                    run_sweep(parse_spec(sweep, "test"), Recorder(), settings=FitSettings(0))
                said = "refused"
            time.sleep(draw.uniform(0.2, 2.0))
            driver.send_signal(signal.SIGKILL)
        if driver.returncode != -signal.SIGKILL:  # it had finished
            break
        kills += 1
        found = read_driver(sweep["out"])
        assert found is not None
        while found.lives():  # the process that works ends a moment after the one that was started and killed
            time.sleep(0.01)
    assert kills >= 3
    outcome = run_sweep(parse_spec(sweep, "test"), Recorder(), settings=FitSettings(0))
    one_result_each(outcome.run, outcome.cells)
    assert_same(reached(outcome.run), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_a_sweep_over_two_stores_survives_kills_and_has_laws_of_each(
    three_nodes: Any, document: dict[str, Any], two_stores: list[str]
) -> None:
    """A worker is killed, then the sweep is interrupted and resumed; every cell ends as when it is trained alone."""
    document["grid"] = {"n_latents": [32, 64, 128], "k": [2, 4, 8]}
    document["train"]["tokens"] = 65_536
    document["resources"] = {"workers": 2, "checkpoint_every_s": 0.3}
    killed: list[int] = []

    def disturb(standing: Standing) -> None:
        if standing.running and not killed:
            killed.append(int(standing.running[0].worker.split("/")[-1]))
            os.kill(killed[0], signal.SIGKILL)
        elif standing.done >= 6:
            raise KeyboardInterrupt

    spec = parse_spec(document, "test")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, Recorder(disturb), settings=FitSettings(0))
    resumed = run_sweep(spec, Recorder(), settings=FitSettings(0))
    assert killed
    assert 0 < resumed.trained < resumed.cells == 18
    one_result_each(resumed.run, 18)
    assert_same(reached(resumed.run), trained_alone(spec))
    fitted = json.loads(saescale_here("fit", spec.out, "--json", "--bootstraps", "40").stdout)
    sites = [entry["of"]["site"] for entry in fitted["fits"] if entry["law"] == "n_k"]
    assert sorted(sites) == ["resid_post.0", "resid_post.3"]


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_fails_alone(
    three_nodes: Any, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever process trains the poisoned cell is killed; the pack is split until that cell is alone."""
    monkeypatch.setattr(execute, "MAX_ATTEMPTS", 2)
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    document["train"]["tokens"] = 262_144
    document["resources"] = {"workers": 1, "checkpoint_every_s": 600}
    killed: set[int] = set()

    def poison(standing: Standing) -> None:
        for cell in standing.running:
            pid = int(cell.worker.split("/")[-1])
            if cell.cell_id.startswith("n64-") and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)

    with pytest.warns(SaescaleWarning) as told:
        outcome = run_sweep(parse_spec(document, "test"), Recorder(poison), settings=FitSettings(0))
    assert len(killed) == 4
    assert any("go on as two packs" in str(warning.message) for warning in told)
    rows = {row["n_latents"]: row for row in outcome.run.read_results().to_pylist()}
    assert rows[32]["status"] == "done"
    assert rows[64]["status"] == "failed"
    assert "a worker died" in rows[64]["error"]
    assert "2 times in a row" in rows[64]["error"]

    # It was not the cell's own fault: asked for, it is trained again, and only it.
    again = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0), retry_failed=True)
    assert (again.trained, again.failed) == (1, 0)
    one_result_each(again.run, 2)


@pytest.mark.slow
def test_a_pack_too_large_for_memory_is_split(three_nodes: Any, document: dict[str, Any]) -> None:
    """The process gets room for one of the two cells, each of which holds 268 MB, but not for both."""
    document["grid"] = {"n_latents": [131_072], "k": [2], "seed": [0, 1]}
    document["train"] |= {"tokens": 1_024, "auxk": {"k": 0}}
    document["eval"] = {"tokens": 512, "every_tokens": 1_024}
    document["resources"] = {"workers": 1}
    limited: list[int] = []

    class Limiting(Recorder):
        def stage(self, text: str) -> None:
            super().stage(text)
            if text.startswith("training"):
                for worker in processes("Worker"):
                    # Threads that start meanwhile take some tens of MB each.
                    room = worker.memory_info().vms + 400 * 2**20
                    worker.rlimit(psutil.RLIMIT_AS, (room, resource.RLIM_INFINITY))
                    limited.append(worker.pid)

    display = Limiting()
    with pytest.warns(SaescaleWarning, match="did not fit into memory.*its 2 cells go on as two packs"):
        outcome = run_sweep(parse_spec(document, "test"), display, settings=FitSettings(0))
    assert len(limited) == 1
    assert outcome.failed == 0
    one_result_each(outcome.run, 2)


@pytest.mark.slow
def test_a_worker_that_stalls_is_replaced(three_nodes: Any, sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"n_latents": [32], "k": [2]}
    sweep["resources"] |= {"workers": 1, "stalled_after_s": 6.0}
    stopped: list[int] = []

    def stop(standing: Standing) -> None:
        if standing.workers and not stopped:
            stopped.append(int(standing.workers[0].name.split("/")[-1]))
            os.kill(stopped[0], signal.SIGSTOP)

    with pytest.warns(SaescaleWarning, match="got nothing done for .* s and is ended"):
        outcome = run_sweep(parse_spec(sweep, "test"), Recorder(stop), settings=FitSettings(0))
    assert not psutil.pid_exists(stopped[0])
    one_result_each(outcome.run, 1)


@pytest.mark.slow
def test_nodes_that_join_take_part(three_nodes: Any, sweep: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The packs are all handed out when a node comes, so one of them is divided for it."""
    monkeypatch.setattr(execute, "LOOK_S", 0.2)
    monkeypatch.setattr(plan, "PACKS_PER_WORKER", 1)
    sweep["grid"] = {"n_latents": [32], "k": [2, 4, 8], "seed": [0, 1]}
    sweep["train"]["tokens"] = 2**30  # longer than any worker takes to start; it is interrupted
    sweep["resources"]["workers"] = "auto"
    joined: list[Any] = []
    cells: dict[str, set[str]] = {}

    def join(standing: Standing) -> None:
        for cell in standing.running:
            cells.setdefault(cell.worker, set()).add(cell.cell_id)
        if len(standing.workers) == 3 and not joined:
            joined.append(three_nodes.add_node(**NODE))
        if len(cells) > 3:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(parse_spec(sweep, "test"), Recorder(join), settings=FitSettings(0))
    finally:
        for node in joined:
            three_nodes.remove_node(node)
    newest = list(cells)[-1]
    former = [worker for worker in cells if worker != newest and cells[worker] & cells[newest]]
    assert len(former) == 1
    found = read_driver(sweep["out"])
    assert found is not None
    assert found.state == "stopped"


@pytest.mark.chaos
def test_an_object_store_that_fails_dawdles_and_goes_away_changes_no_result(
    three_nodes: Any,
    sweep: dict[str, Any],
    undisturbed: Callable[..., Any],
    store: Any,
    s3_url: str,
    s3_faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fsspec

    expected = undisturbed(sweep)
    fsspec.filesystem("s3").put(store.url + "/", files.join(s3_url, "store"), recursive=True)
    sweep |= {"store": files.join(s3_url, "store"), "out": files.join(s3_url, "run")}
    training, over = threading.Event(), threading.Event()

    def go_away() -> None:
        training.wait()
        with s3_faults.outage():
            over.wait(600)

    usual = execute.Execution._again

    def again(*arguments: Any, **more: Any) -> None:
        over.set()  # a worker has tried as often as it does
        usual(*arguments, **more)

    monkeypatch.setattr(execute.Execution, "_again", again)
    away = threading.Thread(target=go_away)
    away.start()
    try:
        with s3_faults.injected(rate=0.1) as met, pytest.warns(SaescaleWarning, match="go on when it answers"):
            outcome = run_sweep(
                parse_spec(sweep, "test"),
                Recorder(lambda now: training.set() if now.running else None),
                settings=FitSettings(0),
            )
    finally:
        over.set()
        training.set()
        away.join()
    assert all(met[kind] for kind in ("500 Internal Server Error", "503 Slow Down", "slow", "cut"))
    assert outcome.failed == 0
    one_result_each(outcome.run, outcome.cells)
    assert_same(reached(outcome.run), expected)
