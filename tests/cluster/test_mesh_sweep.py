"""Cells that several workers share, beside cells of one worker, on a real cluster of three nodes."""

import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from saescale.cluster.crew import train_crew
from saescale.cluster.crew.claims import MeshShape, Resources
from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.sweep import execute, gang
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.gang import nearest
from saescale.cluster.sweep.meshes import check_meshes, plan_meshes
from saescale.cluster.sweep.packing import cost
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory
from saescale.storage.waiting import waits
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from tests.cluster.conftest import NODE, Recorder, trained_alone


def cell_of(n_latents: int, **more: Any) -> Cell:
    fields = {
        "store": "x",
        "d_model": 32,
        "k": 4,
        "tokens": 4096,
        "batch_tokens": 256,
        "lr": 1e-3,
        "dead_after_tokens": 4096,
    }
    return Cell(n_latents=n_latents, **(fields | more))


# --- the decision


def by_size(cells: Any) -> float:
    return float(sum(cell.n_latents for cell in cells))


def on_mesh(cell: Cell, layout: Layout) -> float:
    return float(layout.share(cell.n_latents, 0).size)


def plan(cells: list[Cell], memory: float, workers: int = 4, **asked: Any) -> dict[str, Layout]:
    return plan_meshes(cells, Resources(**asked), workers, memory, by_size, on_mesh)


def test_a_cell_is_shared_where_it_fits_no_worker() -> None:
    small, large = cell_of(64), cell_of(256)
    assert plan([small, large], 256) == {}
    # Three shards fit (86 each); of the larger one that is all the work there is, so it gets no more than fit.
    assert plan([small, large], 90) == {large.cell_id: Layout(3)}
    assert plan([small, large], 130, workers=8) == {large.cell_id: Layout(8)}  # 2 fit; it is nearly all of the work
    others = [cell_of(100, seed=seed) for seed in range(40)]
    assert plan([large, *others], 130, workers=8) == {large.cell_id: Layout(2)}
    assert cost(large) / 2 < sum(cost(cell) for cell in [large, *others]) / 8
    shape = MeshShape(shards=2, replicas=2)
    assert plan([small, large], 10**9, mesh=shape) == dict.fromkeys((small.cell_id, large.cell_id), Layout(2, 2))
    assert plan([small], 10**9, mesh=MeshShape()) == {}
    thresholds = cell_of(256, architecture="jumprelu")
    assert plan([thresholds], 90) == {thresholds.cell_id: Layout(3)}


def test_what_fits_no_mesh_is_said_in_gib() -> None:
    with pytest.raises(SaescaleError, match=r"on each of 4 workers that share it, and of 4 workers each has 0.0 GiB"):
        plan([cell_of(256)], 60)
    # What cannot be shared is left to packing, which refuses it.
    assert plan([cell_of(256, architecture="switch")], 60) == {}


@pytest.mark.parametrize(
    ("mesh", "cell", "workers", "said"),
    [
        ({"shards": 65}, {}, "auto", "65 shards exceed n_latents = 64"),
        ({"replicas": 3}, {}, "auto", "a batch of 256 tokens cannot be cut into 3 equal slices"),
        ({"shards": 2}, {"architecture": "switch"}, "auto", "switch trains in one process alone"),
        ({"shards": 2, "replicas": 2}, {}, 3, "which are 4 workers at a time, and resources.workers is 3"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(mesh: Any, cell: Any, workers: Any, said: str) -> None:
    with pytest.raises(SaescaleError, match=said):
        check_meshes(lambda: [cell_of(64, **cell)], Resources(workers=workers, mesh=mesh))


@pytest.mark.parametrize(
    ("nodes", "layout", "chosen"),
    [
        # The fullest node that has room for all; what is left of one for the next replica.
        ("aaaaabbbb", Layout(4), "bbbb"),
        ("aaaabbbbcc", Layout(4, 2), "aaaabbbb"),
        ("aaaaaaaabb", Layout(4, 2), "aaaaaaaa"),
        # No node has so many: as few nodes as can be.
        ("abbbcc", Layout(4), "bbba"),
        ("aabbbcc", Layout(2, 3), "aaccbb"),
        ("abcabc", Layout(2, 3), "aabbcc"),
        ("abc", Layout(1, 2), "ab"),
    ],
)
def test_the_shards_of_a_replica_are_on_one_node_where_they_can(nodes: str, layout: Layout, chosen: str) -> None:
    free = [f"{node}{number}" for number, node in enumerate(nodes)]
    found = nearest(free, layout, lambda worker: worker[0])
    assert "".join(worker[0] for worker in found) == chosen
    assert len(set(found)) == layout.ranks


# --- sweeps


@pytest.fixture
def shared(document: dict[str, Any]) -> dict[str, Any]:
    """Two cells, each by two shards."""
    document["grid"] = {"n_latents": [65], "k": [4, 8]}
    document["resources"] = {"workers": 3, "checkpoint_every_s": 0.2, "mesh": {"shards": 2}, "stalled_after_s": 40}
    return document


def assert_as_alone(spec: SweepSpec, run: RunDirectory, shards: int = 2) -> None:
    """Each cell as one process trains it, to the precision that is promised of shards."""
    alone = trained_alone(spec)["results"]
    found = {row["cell_id"]: row for row in run.read_results().to_pylist()}
    wanted = {row["cell_id"]: row for row in RunDirectory(f"{spec.out}-alone").read_results().to_pylist()}
    assert alone
    assert set(found) == set(wanted)
    for name, row in found.items():
        assert row["status"] == "done", row
        assert row["nmse"] == pytest.approx(wanted[name]["nmse"], abs=1e-5)
        assert row["flops"] == pytest.approx(wanted[name]["flops"], rel=1e-4)
        run.check_cell(name)
    assert run.cells_with_weights() == sorted(found)
    parts = {f"sae-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)} | {"sae.safetensors.index.json"}
    for names in run.cell_files().values():
        assert names - {"curve.parquet", "result.json"} in ({"sae.safetensors"}, parts)


@pytest.mark.slow
def test_a_mesh_that_the_cluster_can_never_give_says_what_it_has(three_nodes: Any, document: dict[str, Any]) -> None:
    document["resources"] = {"mesh": {"shards": 2, "replicas": 2}, "workers": "auto"}
    with pytest.raises(
        SaescaleError, match=r"asks for 4 workers at a time, and the cluster has room for 3 \(3 CPUs, 3 GPUs\)"
    ):
        run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    assert not Path(document["out"]).exists()


@pytest.mark.slow
def test_shared_cells_and_cells_of_one_worker_run_side_by_side(
    three_nodes: Any, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's memory is said to end between the small cells and the large one."""
    document["grid"] = {"n_latents": [32, 257], "k": [2, 4]}
    document["resources"] = {"workers": 3, "checkpoint_every_s": 0.2}
    monkeypatch.setattr(TrainCrew, "needs", lambda *_, **__: by_size)
    monkeypatch.setattr(TrainCrew, "needs_on_mesh", lambda *_, **__: on_mesh)
    monkeypatch.setattr(TrainCrew, "memory", 200.0)
    begun: list[tuple[int, list[int]]] = []
    usual = execute.Execution._start

    def start(self: Any, workers: Any, pack: Any) -> None:
        begun.append((len(workers), [running.pack.layout.ranks for running in self.running.values()]))
        usual(self, workers, pack)

    monkeypatch.setattr(execute.Execution, "_start", start)
    spec = parse_spec(document, "test")
    display = Recorder()
    outcome = run_sweep(spec, display, settings=FitSettings(0))
    assert outcome.failed == 0
    assert_as_alone(spec, outcome.run)
    assert any(stage.endswith(", 2 shared by 2 shards x 1 replicas") for stage in display.stages), display.stages
    # Two shared cells one after the other, and a small pack beside one of them.
    assert sorted(count for count, _ in begun)[-2:] == [2, 2]
    assert any(count == 1 and 2 in beside for count, beside in begun), begun


@pytest.mark.slow
def test_a_single_cell_gets_as_many_workers_as_it_needs(
    three_nodes: Any, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """workers: auto is one worker for one cell, until it turns out that it fits two."""
    document["grid"] = {"n_latents": [257], "k": [4]}
    document["resources"] = {"gpus_per_worker": 1}
    monkeypatch.setattr(TrainCrew, "needs", lambda *_, **__: by_size)
    monkeypatch.setattr(TrainCrew, "needs_on_mesh", lambda *_, **__: on_mesh)
    monkeypatch.setattr(TrainCrew, "memory", 200.0)
    spec = parse_spec(document, "test")
    outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    assert outcome.failed == 0
    assert_as_alone(spec, outcome.run)


@ray.remote(num_cpus=0, num_gpus=1)
class Holder:
    """Of a worker of somebody else's."""

    def up(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_workers_that_wait_for_others_are_said_and_given_to_who_waits_for_them(
    three_nodes: Any, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else has one GPU and waits for two, this sweep the others and waits for that one: for ever. A cell for
    one worker is trained meanwhile."""
    monkeypatch.setattr(gang, "PATIENCE_S", 4.0)
    monkeypatch.setattr(train_crew, "_COMPANY_S", 1.0)
    shared["grid"] = {"n_latents": [32, 257], "k": 4}
    shared["resources"] = {"workers": 3, "gpus_per_worker": 1, "checkpoint_every_s": 0.2}
    monkeypatch.setattr(TrainCrew, "needs", lambda *_, **__: by_size)
    monkeypatch.setattr(TrainCrew, "needs_on_mesh", lambda *_, **__: on_mesh)
    monkeypatch.setattr(TrainCrew, "memory", 90.0)
    others, said, done = [Holder.remote()], list[str](), list[int]()
    ray.get(others[0].up.remote())

    def look(standing: Standing) -> None:
        said.extend(wait.what for wait in waits(0.0) if "workers for cell" in wait.what)
        done.append(standing.done)
        if len(others) == 1 and said:
            others.extend(Holder.remote() for _ in range(2))
            asked.extend(other.up.remote() for other in others[1:])
        if len(others) == 3 and len(ray.wait(asked, num_returns=2, timeout=0)[0]) == 2:
            for other in others:
                ray.kill(other)
            others.append(None)

    asked: list[Any] = []
    spec = parse_spec(shared, "test")
    outcome = run_sweep(spec, Recorder(look), settings=FitSettings(0))
    assert outcome.failed == 0
    assert len(others) == 4
    assert "3 workers for cell" in said[0]
    assert "(3 shards x 1 replicas), of which 2 are up" in said[0]
    assert any("the cluster has 0 of its 3 GPUs free" in what for what in said), said
    assert 1 in done
    assert_as_alone(spec, outcome.run, shards=3)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
@pytest.mark.parametrize("how", ["kills", "halt", "node"])
def test_what_a_mesh_loses_at_random_changes_no_result(
    three_nodes: Any, shared: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group starts again from its checkpoint with another worker: for one that was killed, and so twice;
    of the first, which has the store of those who meet, when that was halted; or of one that went with its node."""
    monkeypatch.setattr(execute, "DEADLINE_S", 12.0)
    monkeypatch.setattr(gang, "COMPANY_S", 8.0)
    shared["train"]["tokens"] = 98_304
    shared["grid"]["k"] = 4
    spec, hit, notes, gone = parse_spec(shared, "test"), list[str](), list[str](), list[Any]()
    chance = random.Random(how)
    moments = sorted(chance.uniform(0.05, 0.8) for _ in range(2 if how == "kills" else 1))
    members: list[tuple[str, int]] = []
    usual = execute.Execution._start

    def start(self: Any, workers: Any, pack: Any) -> None:
        usual(self, workers, pack)
        members[:] = [(self.crew.ready[worker].node_id, self.crew.ready[worker].pid) for worker in workers]

    monkeypatch.setattr(execute.Execution, "_start", start)
    monkeypatch.setattr(TrainCrew, "warn", lambda self, text: notes.append(text))

    def strike(standing: Standing) -> None:
        if gone and len(gone) < 2:
            gone.append(three_nodes.add_node(**NODE))
        if len(hit) == len(moments) or standing.fraction < moments[len(hit)] or not standing.running:
            return
        _, pid = members[0] if how == "halt" else chance.choice(members)
        if not psutil.pid_exists(pid):
            return
        hit.append(str(pid))
        nodes = {node.node_id: node for node in three_nodes.list_all_nodes() if not node.head}
        if how == "node":
            # The head cannot go; one of two members is on another node.
            gone.append(next(nodes[node_id] for node_id, _ in members if node_id in nodes))
            three_nodes.remove_node(gone[0], allow_graceful=False)
        else:
            os.kill(pid, signal.SIGSTOP if how == "halt" else signal.SIGKILL)

    outcome = run_sweep(spec, Recorder(strike), settings=FitSettings(0))
    assert len(hit) == len(moments)
    assert outcome.failed == 0
    assert_as_alone(spec, outcome.run)
    text = " ".join(notes)
    if how == "node":
        assert len(gone) == 2
        assert "cells go on from their checkpoints" in text or "cells begin again" in text
    else:
        # A first one that is gone says nothing of ranks, and Ray who it was.
        assert all(f"pid {pid}; last heard of at" in text or f"/{pid})" in text for pid in hit), notes
        assert text.count("cells go on from their checkpoints") + text.count("cells begin again") >= len(hit), notes
    if how == "halt":
        assert f"rank 0 (shard 0, replica 0; {socket.gethostname()}, pid {hit[0]}; " in text, notes
