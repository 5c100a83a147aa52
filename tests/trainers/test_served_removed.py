"""A server's files that are removed behind those who stream, while one of them is away."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from saescale.storage import live as live_files
from saescale.storage.checkpoint import steps
from saescale.storage.errors import SaescaleError
from saescale.storage.live import CONSUMERS, Place, open_source
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Order
from saescale.trainers.cell import EvalSpec
from saescale.trainers.harvest import contexts, live_needs
from saescale.trainers.harvest.live import LiveHarvest, live_here
from saescale.trainers.harvest.live_needs import GoesOn, Needs
from saescale.trainers.harvest.room import Room
from saescale.trainers.harvest.served import Served, ServedCrew
from saescale.trainers.training.together import train_sharded
from saescale.trainers.training.train import PackJob, PackOutcome, train_pack
from tests.survival import assert_same, reached
from tests.trainers import mesh_processes
from tests.trainers.killed import killed_after
from tests.trainers.live_case import cell_of, job_of
from tests.trainers.mesh_processes import Crowd
from tests.trainers.test_served import HELDOUT, TOKENS, D, paced, serve, spec_of, taken
from tests.watched_disk import Watch

# A source with more tokens than a cell's centre is measured on, from which nothing goes until that is done.
MORE, BLOCKS, BATCH, TIMES, FILES = 49_152, 2_048, 512, 40, 58
ROOM = 0.7  # that the files have, of what all of them take: more than those of the centre
ORDER = Order("train", 0, BATCH)


@pytest.fixture(autouse=True)
def small_blocks_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**12)


def job(url: str, run: Path) -> PackJob:
    source = open_source(url)
    cells = [cell_of(source, tokens=MORE, batch_tokens=BATCH, n_latents=32)]
    return job_of(source, str(run), cells, checkpoint_every_s=1e-6, eval=EvalSpec(tokens=HELDOUT, every_tokens=8_192))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_a_worker_that_was_away_for_longer_than_its_lease_finds_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other consumer waits at the room that the server's files have, and the server with it."""
    both = tmp_path / "both"
    both.mkdir()
    folder, url = both / "served", str(both / "live")
    serve(folder, range(FILES), times=TIMES)
    allowed = int(ROOM * taken(folder))
    with live_here(spec_of(folder, tokens=MORE, block_rows=BLOCKS), str(tmp_path / "all")):
        with open_source(str(tmp_path / "all")).batches(ORDER, stop=MORE // BATCH) as stream:
            rows = np.concatenate([batch.x for batch in stream])
        trained = train_pack(job(str(tmp_path / "all"), tmp_path / "expected"))
        RunDirectory(str(tmp_path / "expected")).write_results(trained.results)
    folder.rename(tmp_path / "first")
    spec = spec_of(folder, tokens=MORE, block_rows=BLOCKS, remove_hidden_states=True)
    room = Room(spec, spec.harvest("x", reads_text=True), D)
    spec = spec.model_copy(update={"max_bytes": room.beside + 2 * room.block + allowed})
    watch = Watch(str(both), monkeypatch)
    monkeypatch.setattr(live_files, "GONE_S", 2.0)
    stop, most, found = threading.Event(), list[int](), list[np.ndarray]()
    serve(folder, range(3), times=TIMES)
    client = threading.Thread(target=paced, args=(folder, url, range(3, FILES), most, stop, 0.0, TIMES))

    killed = threading.Event()

    def go_on() -> None:
        for batch in range(MORE // BATCH):
            found.append(next(other).x.copy())
            if killed.is_set():
                other.passed(batch + 1)

    client.start()
    try:
        with live_here(spec, url) as live, open_source(url, ["other"]).batches(ORDER, stop=MORE // BATCH) as other:
            going = threading.Thread(target=go_on)
            going.start()
            assert killed_after(12, 0.0, job(url, both / "run"))
            killed.set()
            other.passed(len(found))
            until = time.monotonic() + 60
            said = r"waiting for the server's next files; files from block \d+ on are kept for cells .* away"
            while live.making.consumers > 1 or not re.fullmatch(said, live.making.state):
                assert time.monotonic() < until
                time.sleep(0.02)
            assert going.is_alive()
            outcome = train_pack(job(url, both / "run"))
            going.join()
            until = time.monotonic() + 60
            while any(path.name < "cmpl-0040" for path in folder.iterdir()):  # all have passed them
                assert time.monotonic() < until
                time.sleep(0.02)
    finally:
        stop.set()
        client.join()
    RunDirectory(str(both / "run")).write_results(outcome.results)
    assert_same(reached(RunDirectory(str(both / "run"))), reached(RunDirectory(str(tmp_path / "expected"))))
    assert np.array_equal(np.concatenate(found), rows)
    assert max(most) <= allowed
    assert watch.bytes <= spec.max_bytes


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    made = Crowd(tmp_path_factory.mktemp("crowd"), 2)
    yield made
    made.close()


def trained_by(processes: int, crowd: Crowd, job: PackJob, stop_after: int | None = None) -> PackOutcome:
    """What one process, or as many shards, reach; told to stop after so many questions."""
    if processes > 1:
        outcomes = crowd.ask(mesh_processes.train, processes, 1, job, stop_after)
        assert all(isinstance(outcome, PackOutcome) for outcome in outcomes), outcomes
        return outcomes[0]
    asked = iter(range(10**9))
    return train_pack(job, should_stop=lambda: stop_after is not None and next(asked) >= stop_after)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pack_that_waits_for_room_saves_so_that_there_is_room(processes: int, crowd: Crowd, tmp_path: Path) -> None:
    """All rows that there is room for are trained on long before a checkpoint is due."""
    folder, url, stop, most = tmp_path / "served", str(tmp_path / "live"), threading.Event(), list[int]()
    serve(folder, range(FILES), times=TIMES)
    allowed = int(ROOM * taken(folder))
    folder.rename(tmp_path / "first")
    spec = spec_of(folder, tokens=MORE, block_rows=BLOCKS, remove_hidden_states=True)
    room = Room(spec, spec.harvest("x", reads_text=True), D)
    spec = spec.model_copy(update={"max_bytes": room.beside + 2 * room.block + allowed})
    serve(folder, range(3), times=TIMES)
    client = threading.Thread(target=paced, args=(folder, url, range(3, FILES), most, stop, 0.0, TIMES))
    client.start()
    try:
        with live_here(spec, url):
            later = job(url, tmp_path / "run").model_copy(update={"checkpoint_every_s": 1.0})
            outcome = trained_by(processes, crowd, later)
    finally:
        stop.set()
        client.join()
    assert [result["status"] for result in outcome.results] == ["done"]
    assert max(most) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pack_that_waits_for_rows_stops_when_it_is_told_to(processes: int, crowd: Crowd, tmp_path: Path) -> None:
    """It is asked once for each batch, of which there are 72, and then while it waits."""
    folder, url, mine = tmp_path / "served", str(tmp_path / "live"), tmp_path / "run"
    serve(folder, range(42), times=TIMES)
    with live_here(spec_of(folder, tokens=MORE, block_rows=BLOCKS), url):
        seldom = job(url, mine).model_copy(update={"checkpoint_every_s": 60.0})
        outcome = trained_by(processes, crowd, seldom, stop_after=80)
        assert outcome.stopped
        (cell,) = (mine / "cells").iterdir()
        assert 0 < max(steps(str(cell / "checkpoint"))) < MORE // BATCH
        serve(folder, range(42, FILES), times=TIMES)
        assert trained_by(processes, crowd, seldom).results[0]["status"] == "done"


def needs_of(
    url: Path, monkeypatch: pytest.MonkeyPatch, awaited: Callable[[Mapping[str, int]], Mapping[str, int] | None] | None
) -> Needs:
    monkeypatch.setattr(live_needs, "LOOK_S", 0.0)
    spec = spec_of(url)
    return Needs(str(url), 40, Room(spec, spec.harvest("x", reads_text=True), D), awaited)


def place(url: Path, name: str, passed: int, cells: list[str], beat: int = 0) -> Path:
    where = url / CONSUMERS / f"{name}.json"
    where.parent.mkdir(exist_ok=True)
    where.write_text(Place(need=passed, passed=passed, end=40, cells=cells, beat=beat).model_dump_json())
    return where


def test_what_cells_that_are_away_go_on_from_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: dict[str, int] | None = None
    needs = needs_of(tmp_path, monkeypatch, lambda away: awaited)
    place(tmp_path, "one", 30, ["a"])
    closed = place(tmp_path, "two", 12, ["b", "c"])
    needs.look()
    assert needs.held == 0  # nobody knows yet who else will come
    awaited = {"a": 0, "b": 0, "c": 0, "d": 6}
    needs.look()
    assert needs.held == 6  # of one that has not come yet, what its checkpoint says
    place(tmp_path, "three", 20, ["d"])
    closed.unlink()  # it broke off in good order
    needs.look()
    assert (needs.passed, needs.held) == (20, 12)
    del awaited["b"]
    needs.look()
    assert needs.held == 12
    place(tmp_path, "four", 18, ["c"])  # it goes on elsewhere
    needs.look()
    assert needs.held == 18
    awaited = {"a": 0}  # the others have failed, or are done
    needs.look()
    assert (needs.passed, needs.held) == (18, 18)


def test_a_consumer_that_was_killed_is_gone_when_another_has_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody says which cells are awaited."""
    monkeypatch.setattr(live_files, "GONE_S", 0.05)
    needs, kept = needs_of(tmp_path, monkeypatch, lambda away: away), needs_of(tmp_path, monkeypatch, None)
    killed = place(tmp_path, "one", 5, ["a", "b"])
    needs.look()
    kept.look()
    time.sleep(0.1)
    place(tmp_path, "two", 30, ["c"])
    needs.look()
    assert (needs.passed, needs.held, killed.exists()) == (30, 5, True)
    place(tmp_path, "three", 9, ["a"])
    needs.look()
    assert (needs.held, killed.exists()) == (5, True)  # b is still away
    place(tmp_path, "four", 7, ["b"])
    needs.look()
    assert (needs.held, killed.exists()) == (7, False)
    killed = place(tmp_path, "one", 5, ["a"])
    kept.look()
    time.sleep(0.1)
    place(tmp_path, "five", 30, ["c"])
    kept.look()
    assert (kept.held, killed.exists()) == (30, False)  # where all can be made again


def test_a_file_that_comes_again_is_named(tmp_path: Path) -> None:
    folder, url, order = tmp_path / "served", str(tmp_path / "live"), Order("train", 1, 128)
    spec = spec_of(folder, tokens=2 * TOKENS, remove_hidden_states=True)
    serve(folder, range(60))  # of two windows, and of a part of the next one
    said = r"cmpl-0000\.safetensors: a file of that name was taken and removed before, .* nothing is lost"
    with live_here(spec, url):
        stream = open_source(url).batches(order, stop=16)
        for batch in range(8):
            next(stream)
            stream.passed(batch + 1)
        until = time.monotonic() + 30
        while (folder / "cmpl-0000.safetensors").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        serve(folder, range(1))
        with stream, pytest.raises(SaescaleError, match=said):
            list(stream)
    stream = open_source(url).batches(order, 8, 16)
    with stream, live_here(spec, url), pytest.raises(SaescaleError, match=said):  # a later process knows it too
        list(stream)
    (folder / "cmpl-0000.safetensors").rename(folder / "cmpl-0060.safetensors")
    serve(folder, range(61, 120))
    stream = open_source(url).batches(order, 8, 16)
    with stream, live_here(spec, url):
        assert len(list(stream)) == 8


def test_cells_whose_files_were_removed_are_told_before_anything_begins(tmp_path: Path) -> None:
    folder, url = tmp_path / "served", str(tmp_path / "live")
    spec = spec_of(folder, remove_hidden_states=True)
    serve(folder, range(90))
    with live_here(spec, url), open_source(url).batches(Order("train", 1, 128), stop=TOKENS // 128) as stream:
        for _ in range(5):
            next(stream)
        stream.passed(5)
        until = time.monotonic() + 30
        while (folder / "cmpl-0000.safetensors").exists():
            assert time.monotonic() < until
            time.sleep(0.02)

    def again(awaited: dict[str, GoesOn]) -> LiveHarvest:
        served, spool = Served(str(folder), url, removes=True), str(tmp_path / "live" / ".tokens-x")
        return LiveHarvest(spec, url, ServedCrew(served, 1, spool), spool, served=served, awaited=lambda: awaited)

    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    said = r"live: 1 of 2 cells \(such as b\) need hidden states that were removed .*cmpl-0000\.safetensors and those"
    with pytest.raises(SaescaleError, match=said):
        again({"a": GoesOn(5 * 128, 4 * 128), "b": GoesOn(0, 0)}).__enter__()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    with again({"a": GoesOn(5 * 128, 4 * 128)}):
        pass


@pytest.mark.chaos
def test_a_rank_that_is_lost_while_all_wait_for_rows_is_named(tmp_path: Path) -> None:
    """The others wait for it, not for rows that may come in days, and what was saved meanwhile is gone on from."""
    folder, url, mine = tmp_path / "served", str(tmp_path / "live"), tmp_path / "run"
    there = 42  # files, whose rows are 71 batches
    serve(folder, range(there), times=TIMES)
    hit: list[int] = []

    def strike(processes: list[BaseProcess]) -> None:
        def wait() -> None:
            while not list(mine.glob("cells/*/checkpoint/step-00000071-*")):
                time.sleep(0.05)
            time.sleep(1.0)
            hit.append(processes[1].pid or 0)
            os.kill(hit[0], signal.SIGKILL)

        threading.Thread(target=wait, daemon=True).start()

    with live_here(spec_of(folder, tokens=MORE, block_rows=BLOCKS), url):
        later = job(url, mine).model_copy(update={"checkpoint_every_s": 0.5})
        with pytest.raises(SaescaleError) as caught:
            train_sharded(later, 2, deadline_s=8.0, started=strike)
        assert f"pid {hit[0]}" in str(caught.value)
        serve(folder, range(there, FILES), times=TIMES)
        again = train_sharded(later, 2)
    assert again.results[0]["status"] == "done"
    assert again.results[0]["tokens"] == MORE
