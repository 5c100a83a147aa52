"""Sweeps over a live source on a real Ray cluster: the bits of the same sweep over the stored blocks, whoever dies."""

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from saescale.cluster.crew import harvest_crew
from saescale.cluster.crew.live import LiveCrew
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.live import read_making
from saescale.storage.rundir import RunDirectory
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.contexts import Draw, block_file
from saescale.trainers.harvest.make_shard import ShardJob
from saescale.trainers.harvest.room import Room
from saescale.trainers.subjects.subject import get_subject
from tests.cluster.command import SAESCALE, assert_one_line, environment, saescale_here
from tests.cluster.conftest import Recorder, processes
from tests.cluster.test_survival import Killer, one_result_each
from tests.survival import assert_same, reached
from tests.trainers.subjects.test_spread import most_of
from tests.watched_disk import Watch

TOKENS, BLOCK, HELDOUT = 16_384, 2_048, 1_024
FIELDS = ["--tokens", str(TOKENS), "--heldout-tokens", str(HELDOUT), "--heldout-from", str(8 * HELDOUT)]
FIELDS += ["--context-length", "32", "--shard-rows", str(BLOCK), "--compute-dtype", "float32", "--layer", "2"]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**13)
    monkeypatch.setattr(harvest_crew, "BACKOFF_S", (0.05, 0.2))


@pytest.fixture
def over_live(document: dict[str, Any], tiny_subject: str, tiny_corpus: str) -> dict[str, Any]:
    """A sweep over a live source with room for three blocks of 2,048 tokens, in two packs."""
    source = {
        "subject": tiny_subject, "corpus": tiny_corpus, "layer": 2, "tokens": "1.6384e4", "heldout_tokens": HELDOUT,
        "context_length": 32, "block_rows": BLOCK, "window_blocks": 2, "compute_dtype": "float32", "max_bytes": "1 GB",
        "actors": 1,
    }  # fmt: skip
    document["store"] = {"live": source}
    document["grid"] = {"n_latents": [32, 64], "k": [2, 4]}
    document["train"] |= {"tokens": 2 * TOKENS, "batch_tokens": 512}
    document["eval"] = {"tokens": HELDOUT, "every_tokens": 8_192, "evaluations": []}
    spec = parse_spec(document, "test")
    (asked,) = spec.lives.values()
    room = Room(asked, asked.harvest("x", reads_text=True), 32)
    source["max_bytes"] = room.beside + 3 * room.block
    return document


@pytest.fixture(scope="module")
def stored(
    three_nodes: Any, tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], Any]:
    """What the sweep reaches over the store of `saescale harvest` with the same fields, trained once."""
    known: list[Any] = []
    folder = tmp_path_factory.mktemp("stored")

    def of(document: dict[str, Any]) -> Any:
        if not known:
            url = str(folder / "store")
            done = saescale_here("harvest", tiny_subject, "--corpus", tiny_corpus, "--out", url, *FIELDS)
            assert done.returncode == 0, done.stderr
            source = document["store"]["live"] | {"folder": url}
            path = folder / "stored.yaml"
            path.write_text(yaml.safe_dump(document | {"store": {"live": source}, "out": str(folder / "run")}))
            done = saescale_here("sweep", str(path), "--bootstraps", "0")
            assert done.returncode == 0, done.stdout[-3_000:] + done.stderr
            assert len(list((folder / "store").glob("train-*.parquet"))) == TOKENS // BLOCK
            known.append(reached(RunDirectory(str(folder / "run"))))
        return known[0]

    return of


@pytest.mark.slow
def test_a_live_sweep_gives_the_bits_of_the_stored_one(
    over_live: dict[str, Any],
    stored: Callable[..., Any],
    sweep_file: Callable[[dict[str, Any]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = stored(over_live)
    run = RunDirectory(over_live["out"])
    (folder,) = parse_spec(over_live, "test").lives
    watch = Watch(folder, monkeypatch)
    done = saescale_here("sweep", sweep_file(over_live), "--bootstraps", "0")
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr
    assert_same(reached(run), expected)
    assert watch.blocks <= 3
    assert watch.bytes <= over_live["store"]["live"]["max_bytes"]
    assert watch.of_workers >= 2 * TOKENS // BLOCK  # each block, and more
    making = read_making(folder)
    assert making is not None
    assert (making.state, making.error) == ("ended", None)
    # The sweep is done: no block is left, and again it is shown without a producer.
    assert list(Path(folder).glob("train-*")) == list(Path(folder).glob(".tokens-*")) == []
    assert saescale_here("sweep", f"{run.url}/sweep.yaml", "--bootstraps", "0").returncode == 0
    assert read_making(folder) == making


@pytest.mark.slow
def test_one_worker_trains_more_packs_than_there_is_room_for_one_after_another(
    three_nodes: Any, over_live: dict[str, Any], stored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three orders of the data are three packs, for each of which blocks are made anew; by a subject of which a part
    lies on the disk, since it changes no bit."""
    source = over_live["store"]["live"]
    source["device_map"] = most_of(get_subject(source["subject"], dtype="float32"))
    expected = {row["cell_id"]: row for row in stored(over_live)["results"]}
    over_live["grid"] = {"n_latents": [64], "k": [4]}
    over_live["train"]["stream_seed"] = [1, 2, 0]
    over_live["resources"]["workers"] = 1
    over_live["out"] += "-one"
    spec = parse_spec(over_live, "test")
    (folder,) = spec.lives
    watch = Watch(folder, monkeypatch)
    outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    found = {row["cell_id"]: row for row in reached(outcome.run)["results"]}
    assert [row["status"] for row in found.values()] == ["done"] * 3
    ((same, row),) = ((name, row) for name, row in found.items() if name in expected)
    assert row == expected[same]
    assert watch.blocks <= 3
    assert watch.bytes <= over_live["store"]["live"]["max_bytes"]


@pytest.mark.slow
def test_workers_that_share_a_cell_share_a_live_source(
    three_nodes: Any, over_live: dict[str, Any], stored: Callable[..., Any]
) -> None:
    """Each of them is a consumer; the cell is as one process trains it over the stored blocks."""
    expected = {row["cell_id"]: row for row in stored(over_live)["results"]}
    over_live["grid"] = {"n_latents": [64], "k": [4]}
    over_live["resources"] = {"mesh": {"shards": 2}, "gpus_per_worker": 1, "checkpoint_every_s": 0.2}
    over_live["out"] += "-shared"
    spec = parse_spec(over_live, "test")
    (folder,) = spec.lives
    outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    (found,) = outcome.run.read_results().to_pylist()
    assert found["status"] == "done"
    assert found["nmse"] == pytest.approx(expected[found["cell_id"]]["nmse"], abs=1e-5)
    assert not list(Path(folder).glob("train-*"))


@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_producers_and_consumers_killed_at_random_change_no_result(
    over_live: dict[str, Any], stored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored(over_live)
    del over_live["store"]["live"]["actors"]  # one on each of the nodes
    spec = parse_spec(over_live, "test")
    (folder,) = spec.lives
    watch = Watch(folder, monkeypatch)

    def kill(chance: random.Random) -> bool:
        there = processes(chance.choice(["Worker", "HarvestActor"]))
        if not there or not RunDirectory(spec.out).read_spec():
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(there).send_signal(signal.SIGKILL)
        return True

    with Killer(kill, kills=5, seed=3, pause_s=(0.2, 1.0)) as killer:
        outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    assert killer.done >= 2
    one_result_each(outcome.run, 4)
    assert_same(reached(outcome.run), expected)
    assert watch.blocks <= 3
    assert watch.bytes <= over_live["store"]["live"]["max_bytes"]


@pytest.mark.chaos
def test_a_driver_that_is_killed_goes_on_with_the_blocks_that_are_needed(
    three_nodes: Any, over_live: dict[str, Any], stored: Callable[..., Any], sweep_file: Callable[[dict[str, Any]], str]
) -> None:
    expected = stored(over_live)
    (folder,) = parse_spec(over_live, "test").lives
    over_live["store"]["live"]["max_bytes"] = "1 GB"  # whose blocks of text are larger, in a process of its own
    command = [*SAESCALE, "sweep", sweep_file(over_live), "--bootstraps", "0"]
    for _ in range(2):
        driver = subprocess.Popen(
            command,
            env=environment(RAY_ADDRESS=three_nodes.address),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and driver.poll() is None:
            if any(Path(over_live["out"]).glob("cells/*/checkpoint/*")):
                break
            time.sleep(0.05)
        for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
    done = saescale_here("sweep", sweep_file(over_live), "--bootstraps", "0")
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr
    assert_same(reached(RunDirectory(over_live["out"])), expected)
    assert list(Path(folder).glob("train-*")) == list(Path(folder).glob(".*")) == []


def test_what_an_actor_had_half_written_goes_when_it_dies(over_live: dict[str, Any], tmp_path: Path) -> None:
    """At once, since its bytes are counted no more; what others write stays."""
    (spec,) = parse_spec(over_live, "test").lives.values()
    out, spool = tmp_path / "live", tmp_path / "live" / ".tokens-x"
    crew = LiveCrew(spec, str(spool), None, threading.Event())
    crew._specs = [spec.harvest(str(out), reads_text=True)]
    spool.mkdir(parents=True)
    left = {name: out / f"{name}.{'0' * 32}.partial" for name in (".train-00003.parquet", ".train-00004.parquet")}
    left |= {name: spool / f".{Path(block_file('', name)).name}.{'0' * 32}.partial" for name in (5, 6)}
    for path in left.values():
        path.write_bytes(b"half")
    crew._half_done(ShardJob(SimpleNamespace(name="train-00003.parquet"), {}))
    crew._half_done(Draw(5, "train", 0))
    assert [name for name, path in left.items() if path.exists()] == [".train-00004.parquet", 6]


def test_what_cannot_be_a_live_source_is_one_line(
    over_live: dict[str, Any], sweep_file: Callable[[dict[str, Any]], str]
) -> None:
    source = over_live["store"]["live"]
    for wrong, said in (
        ({"tokens": 1_000}, "store.live: tokens must be a multiple of context_length 32"),
        ({"layer": [2, 3]}, "a live source has one site"),
        ({"max_bytes": "plenty"}, "should be a size such as 200 GB"),
        ({"windows": 3}, "store.live.windows is not a key, did you mean window_blocks"),
        ({"subject": "gtp2"}, "unknown subject 'gtp2'"),
    ):
        over_live["store"] = {"live": source | wrong}
        assert_one_line(saescale_here("sweep", sweep_file(over_live)), said)
        assert not Path(over_live["out"]).exists()


@pytest.mark.slow
def test_what_shows_when_the_subject_is_there_leaves_nothing_behind(
    three_nodes: Any, over_live: dict[str, Any], sweep_file: Callable[[dict[str, Any]], str]
) -> None:
    source = over_live["store"]["live"]
    over_live["store"] = {"live": source | {"max_bytes": source["max_bytes"] - 100_000 * 3}}
    refused = saescale_here("sweep", sweep_file(over_live))
    assert_one_line(refused, "max_bytes must hold a window of 2 blocks", "give at least")
    assert not os.path.exists(over_live["out"])
    least = int(re.search(r"give at least ([\d,]+)", refused.stderr)[1].replace(",", ""))  # type: ignore[index]
    # More tokens have more blocks, whose checksums are noted.
    over_live["store"] = {"live": source | {"max_bytes": least + 100_000, "tokens": 4 * TOKENS}}
    refused = saescale_here("sweep", sweep_file(over_live))
    assert refused.returncode == 2
    assert re.search(r"ended early: it gave [\d,]+ of 65,536 tokens", refused.stderr), refused.stderr
