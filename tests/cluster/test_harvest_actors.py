"""Harvests on a real Ray cluster: the store of one process, whatever the number of actors and whoever dies."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.crew import crew
from saescale.cluster.crew import harvest_crew as module
from saescale.cluster.crew.harvest import harvest_on_actors
from saescale.cluster.crew.harvest_worker import HarvestActor
from saescale.cluster.crew.shares import share_beside, share_out
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.conduct import harvest, harvest_each
from saescale.trainers.harvest.layers import each_layer
from saescale.trainers.harvest.spec import HarvestSpec
from tests.cluster.command import SAESCALE, assert_one_line, environment, saescale, saescale_here
from tests.cluster.conftest import processes


@pytest.fixture(scope="module")
def spec(tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> HarvestSpec:
    """A finished harvest by one process: 6 train shards and 2 heldout shards, of a text that is one block."""
    spec = HarvestSpec(
        subject=tiny_subject,
        layer=2,
        corpus=tiny_corpus,
        out=str(tmp_path_factory.mktemp("alone") / "store"),
        tokens=12_288,
        heldout_tokens=3_072,
        context_length=32,
        shard_rows=2_048,
        row_group_rows=256,
        batch_contexts=1,  # slow enough for kills to fall into shards
        compute_dtype="float32",
    )
    harvest(spec)
    return spec


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text in several blocks, and no long waits."""
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**13)
    monkeypatch.setattr(crew, "POLL_S", 0.02)
    monkeypatch.setattr(module, "SHOW_S", 0.02)
    monkeypatch.setattr(module, "BACKOFF_S", (0.05, 0.2))


def everything(url: str) -> dict[str, bytes | None]:
    """Every file and folder below, hidden ones too."""
    paths = sorted(Path(url).rglob("*"))
    return {str(path.relative_to(url)): path.read_bytes() if path.is_file() else None for path in paths}


class Dying(HarvestActor):
    """Is gone as soon as it begins to come up."""

    def __init__(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def quiet(*_: Any) -> None:
    pass


def test_two_actors_write_the_store_of_one_process(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative path is another folder in an actor
    seen: list[tuple[int, int, float, str, list[float]]] = []
    done = harvest_on_actors([spec.model_copy(update={"out": "store"})], 2, None, lambda *told: seen.append(told))
    assert everything("store") == everything(spec.out)
    assert done.manifests == [ActivationStore.open(spec.out).manifest]
    assert sum(row.rows for row in done.actors) == 12_288 + 3_072
    assert sum(row.shards for row in done.actors) == 8
    assert all(row.tokens_per_s > 0 and row.node for row in done.actors)
    rows = [told[0] for told in seen]
    assert rows == sorted(rows)
    assert seen[-1][:2] == (15_360, 15_360)
    assert {told[3] for told in seen} >= {"starting actors: 2", "harvesting", "done"}
    # A finished one is returned without actors.
    assert harvest_on_actors([spec.model_copy(update={"out": "store"})], 1, None, quiet) == (done.manifests, [])


@pytest.mark.chaos
def test_layers_in_one_pass_are_the_stores_of_one_process_whoever_dies(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path
) -> None:
    """Both the driver's folder of ids and what a killed actor had half done lie in the store that is missing first."""
    alone = [spec.model_copy(update={"out": f"{tmp_path}/alone/resid_post.{n}", "layer": n}) for n in (0, 1, 3)]
    harvest_each(alone)
    again = each_layer(spec.model_copy(update={"out": f"{tmp_path}/all"}), "0,1,3")
    harvest(again[0])
    killed: list[int] = []

    def kill(done: int, total: int, rate: float, stage: str, rates: list[float]) -> None:
        if done > 4_000 and not killed:
            victim = min(processes("HarvestActor"), key=lambda process: process.pid)
            victim.kill()
            killed.append(victim.pid)

    with pytest.warns(SaescaleWarning, match="died"):
        done = harvest_on_actors(again, 2, None, kill)
    assert everything(f"{tmp_path}/all") == everything(f"{tmp_path}/alone")
    assert [manifest.site.layer for manifest in done.manifests] == [0, 1, 3]
    # Of its last shard the killed actor may have written one store, or both, and told nobody.
    assert 14 <= sum(row.shards for row in done.actors) <= 16
    assert sum(row.rows for row in done.actors) in (13_312, 15_360)


def test_one_actor_in_object_storage(three_nodes: Any, spec: HarvestSpec, s3_url: str) -> None:
    harvest_on_actors([spec.model_copy(update={"out": s3_url})], 1, None, quiet)
    names = files.list_names(s3_url)
    assert {name: files.read_bytes(files.join(s3_url, name)) for name in names} == everything(spec.out)
    assert len(files.list_below(s3_url)) == len(names)


@pytest.mark.parametrize("seed", [0])
@pytest.mark.chaos
def test_killed_actors_change_no_byte(three_nodes: Any, spec: HarvestSpec, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0, 10_000) for _ in range(2))
    killed: list[int] = []

    def kill(done: int, total: int, rate: float, stage: str, rates: list[float]) -> None:
        tokenizing = stage.startswith("tokenizing")
        there = sorted(processes("HarvestActor"), key=lambda process: process.pid)
        if not there or not (tokenizing or (moments and done > moments[0])):
            return
        if not tokenizing:
            moments.pop(0)
            time.sleep(chance.uniform(0, 0.05))
        victim = chance.choice(there)
        victim.kill()
        victim.wait(60)  # or it may be found once more
        killed.append(victim.pid)

    again = spec.model_copy(update={"out": str(tmp_path / "store")})
    with pytest.warns(SaescaleWarning, match="died"):
        harvest_on_actors([again], 2, None, kill)
    assert len(set(killed)) == 3
    assert everything(again.out) == everything(spec.out)


def test_actors_that_die_too_often_end_in_one_error_and_leave_no_manifest(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 1)

    def kill_all(done: int, total: int, rate: float, stage: str, rates: list[float]) -> None:
        if rates:
            for process in processes("HarvestActor"):
                process.kill()

    again = spec.model_copy(update={"out": str(tmp_path / "store")})
    with pytest.raises(SaescaleError, match=r"died 1 times at train-0000\d.parquet: .* run the same command again"):
        harvest_on_actors([again], 1, None, kill_all)
    names = {name for name in everything(again.out) if not name.startswith(".")}
    assert names < {"harvest.json", *(f"train-{n:05d}.parquet" for n in range(6))}
    # One process goes on from there.
    harvest(again)
    assert everything(again.out) == everything(spec.out)


def test_actors_that_do_not_come_up_end_in_one_error(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(module, "HarvestActor", Dying)
    with pytest.raises(SaescaleError, match=r"1 actors in a row died while they started: The actor is dead"):
        harvest_on_actors([spec.model_copy(update={"out": str(tmp_path / "store")})], 1, None, quiet)


@pytest.mark.chaos
def test_a_killed_driver_goes_on_and_the_actors_are_shown(
    three_nodes: Any, tiny_subject: str, tiny_corpus: str, tmp_path: Path
) -> None:
    url, corpus = tmp_path / "store", tmp_path / "longer.jsonl"
    corpus.write_text(Path(tiny_corpus).read_text() * 5)
    command = ["harvest", tiny_subject, "--layer", "2", "--out", str(url), "--context-length", "32"]
    command += ["--corpus", str(corpus)]
    command += ["--tokens", "65536", "--heldout-tokens", "8192", "--address", three_nodes.address, "--actors"]
    with subprocess.Popen([*SAESCALE, *command, "1"], env=environment(), stdout=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 200
        while not list(url.glob("*.parquet")) and time.monotonic() < deadline:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    assert not (url / "manifest.json").exists()

    result = saescale(*command, "2")
    assert result.returncode == 0, result.stderr
    assert "actor  node" in result.stdout
    assert "73,728 rows" in result.stdout

    alone = tmp_path / "alone"
    alone.mkdir()
    plan = (url / "harvest.json").read_bytes()
    (alone / "harvest.json").write_bytes(plan)  # or `auto` might come to another arithmetic
    fields = {name: value for name, value in json.loads(plan).items() if name in HarvestSpec.model_fields}
    harvest(HarvestSpec(**fields, out=str(alone)))
    assert everything(str(url)) == everything(str(alone))


def test_a_second_driver_that_comes_too_late_returns_the_first_ones_store(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path
) -> None:
    again = spec.model_copy(update={"out": str(tmp_path / "store")})
    others: list[Any] = []

    def overtaken(done: int, total: int, rate: float, stage: str, rates: list[float]) -> None:
        if stage.startswith("harvesting") and not others:
            others.append(harvest(again))  # which removes every spool when it has sealed the store

    assert harvest_on_actors([again], 1, None, overtaken).manifests == others
    assert everything(again.out) == everything(spec.out)


# --- how many actors


BOX, SMALL, GPUS = {"CPU": 16.0}, {"CPU": 2.0}, {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "actors", "shares"),
    [
        ([BOX], "auto", (1, 16, 16.0, 0)),
        ([BOX, BOX], "auto", (2, 16, 16.0, 0)),
        ([BOX] * 9, "auto", (5, 16, 16.0, 0)),  # no more than shards
        ([BOX], 3, (3, 5, 5.0, 0)),
        ([SMALL], 3, (3, 1, 0.5, 0)),  # two on one core, for thirds of two cores would not fit on one
        ([GPUS, BOX], "auto", (5, 4, 4.0, 1)),
        ([GPUS, GPUS], 16, (16, 4, 4.0, 1)),
        ([{"CPU": 4.0, "GPU": 8.0}], 8, (8, 1, 0.5, 1)),
    ],
)
def test_an_actor_has_a_gpu_or_its_share_of_the_cores(
    nodes: list[dict[str, float]], actors: int | str, shares: tuple[int, int, float, int]
) -> None:
    assert share_out(nodes, actors, shards=5) == shares


@pytest.mark.parametrize(
    ("nodes", "actors", "shares"),
    [
        ([GPUS, BOX], "auto", (1, 32, 32.0, 8)),  # one for each node that has some
        ([GPUS, GPUS], 4, (4, 16, 16.0, 4)),
        ([GPUS, {"CPU": 8.0, "GPU": 2.0}], 3, (3, 8, 8.0, 2)),  # with three each, the third would find none
        ([BOX, BOX], "auto", (2, 16, 16.0, 0)),
    ],
)
def test_an_actor_of_a_spread_subject_has_several_gpus_of_one_node(
    nodes: list[dict[str, float]], actors: int | str, shares: tuple[int, int, float, int]
) -> None:
    assert share_out(nodes, actors, shards=5, spread=True) == shares


@pytest.mark.parametrize(
    ("nodes", "actors", "spread", "shares"),
    [
        ([BOX, BOX], "auto", False, (2, 8, 8.0, 0)),
        ([SMALL], "auto", False, (1, 1, 1.0, 0)),
        ([{"CPU": 1.0}], "auto", False, (1, 1, 0.5, 0)),
        ([BOX], 3, False, (3, 2, 2.0, 0)),
        ([GPUS, BOX], "auto", False, (4, 3, 1.0, 1)),
        ([GPUS], 8, False, (8, 1, 1.0, 0.5)),
        ([{"CPU": 8.0, "GPU": 1.0}], "auto", False, (1, 2, 1.0, 0.5)),
        ([GPUS], "auto", True, (1, 8, 1.0, 4)),
        ([GPUS] * 4, "auto", True, (2, 16, 1.0, 8)),
        ([BOX, BOX], "auto", True, (2, 8, 8.0, 0)),
    ],
)
def test_actors_beside_workers_have_half(
    nodes: list[dict[str, float]], actors: int | str, spread: bool, shares: tuple[int, int, float, float]
) -> None:
    found = share_beside(nodes, actors, blocks=5, spread=spread)
    assert found == shares
    name, each = ("GPU", found.gpus) if found.gpus else ("CPU", found.cpus)
    has = [node.get(name, 0.0) for node in nodes]
    assert each * found.actors <= sum(has) / 2
    assert sum(int(one // each) for one in has) >= found.actors  # all find room


def test_more_actors_than_gpus_are_refused() -> None:
    with pytest.raises(SaescaleError, match="9 actors with a GPU each, but the cluster has 8"):
        share_out([GPUS, BOX], 9, shards=100)


# --- bad input


def test_a_bad_number_of_actors_is_one_line(tiny_subject: str) -> None:
    result = saescale_here("harvest", tiny_subject, "--layer", "2", "--out", "nowhere", "--actors", "0")
    assert_one_line(result, "--actors must be a number of at least 1, or auto, not '0'")


def test_a_layer_that_there_is_not_is_told_before_a_local_ray_starts(
    spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(crew, "connect", lambda address: pytest.fail("Ray was started"))
    wrong = spec.model_copy(update={"out": str(tmp_path / "store"), "layer": 9})
    with pytest.raises(SaescaleError, match="has no layer 9"):
        harvest_on_actors([wrong], 1, None, quiet)


def test_a_short_corpus_is_one_line_and_leaves_an_empty_folder(
    three_nodes: Any, spec: HarvestSpec, tmp_path: Path
) -> None:
    short = spec.model_copy(update={"out": str(tmp_path / "store"), "tokens": 1_000_000})
    with pytest.raises(SaescaleError, match=r"too short: .* of 1,000,000 and heldout got [\d,]+ of 3,072"):
        harvest_on_actors([short], 1, None, quiet)
    assert everything(short.out) == {}


def test_a_node_that_does_not_see_the_store_is_named(three_nodes: Any, spec: HarvestSpec) -> None:
    hidden = spec.model_copy(update={"out": f"memory://{time.time_ns()}"})
    with pytest.raises(SaescaleError, match=r"the node \S+ does not see the store's folder memory://.*s3://"):
        harvest_on_actors([hidden], 1, None, quiet)
