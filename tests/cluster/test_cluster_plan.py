"""`saescale plan --cluster`: memory, time and bytes against other routes, and what cannot be planned."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saescale.cluster.front.cluster_plan import _groups
from saescale.cluster.sweep.assumed import Described, cells_to_come, describe
from saescale.cluster.sweep.cluster_plan import ClusterPlan, plan_cluster
from saescale.cluster.sweep.held import held_to_runs, measured
from saescale.cluster.sweep.sharding import step_on
from saescale.cluster.sweep.work import work_of_step
from saescale.scaling.planning.devices import CPU, H200, find_device, step_work
from saescale.scaling.planning.network import Network
from saescale.scaling.reproduce import PUBLISHED
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Said, Sent, sent
from saescale.trainers.training.memory import StreamSize, pack_memory
from tests.cluster.command import ROOT, assert_one_line, saescale_here

SWEEP = """
name: small
store: stores/none
out: runs/none
grid: {n_latents: [1024, 4096], k: [8, 32]}
train: {tokens: 819200, batch_tokens: 8192}
eval: {tokens: 8192, every_tokens: 409600}
"""
STREAM = StreamSize(8192, 2**40)


def written(folder: Path, text: str, name: str = "sweep.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def of(folder: Path, *assume: str, more: str = "") -> Described:
    return describe(written(folder, SWEEP + more), ("d_model=512", *assume))


def cell(**changed: Any) -> Cell:
    fields = {"n_latents": 2**17, "k": 64, "batch_tokens": 8192, "d_model": 1024} | changed
    return Cell(
        store="s", tokens=10 * fields["batch_tokens"], lr=1e-4, dead_after_tokens=10**7, precision="bf16", **fields
    )


def test_a_mesh_is_what_the_driver_would_take(tmp_path: Path) -> None:
    """Alone a cell takes what a pack of one does; one that does not fit has as few shards as fit, found by trying."""
    one, device = cell(), find_device("h100")
    alone = step_on(one, Layout(), 1.0, device, Network(8, 450e9, 50e9))
    assert (alone.sent.bytes, alone.network_s) == (0, 0)
    assert alone.compute_s == device.seconds(work_of_step(one))
    described = of(tmp_path)
    (large,) = [each for each in cells_to_come(described.spec, 512) if (each.n_latents, each.k) == (4096, 32)]

    def taken(shards: int) -> float:
        return pack_memory([large], 8192, STREAM, "cuda", layout=Layout(shards)).total

    assert taken(1) == pack_memory([large], 8192, STREAM, "cuda").total
    memory = 0.9 * taken(1)
    plan = plan_cluster(described, device._replace(memory=memory / 0.95), 64)
    (found,) = [group for group in plan.groups if group.cells == (large,)]
    fewest = next(shards for shards in range(1, 64) if taken(shards) <= memory)
    assert found.step.mesh.shards % fewest == 0  # twice as many where that is its share of the work
    assert found.step.mesh.shards > 1
    assert found.step.bytes == taken(found.step.mesh.shards) <= memory
    assert found.job.gpus == found.step.mesh.ranks
    with pytest.raises(SaescaleError, match=r"needs .* GiB"):
        plan_cluster(described, device._replace(memory=1e6), 64)


def test_what_a_mesh_says_goes_at_the_rates_of_the_network() -> None:
    """tests/trainers/test_mesh.py holds it to what is counted."""
    network = Network(4, 4e9, 1e9)
    assert network.seconds(4, 2, 8e9, 1e9, 0) == 2 + 1  # a replica is one node
    assert network.seconds(8, 1, 8e9, 0, 0) == 8
    assert network.seconds(2, 2, 4e9, 4e9, 0) == 2
    assert network.seconds(2, 1, 0, 0, 1000) > 0
    assert sent(Layout(), 512, 65_536, Said([32], 1, 32), 8192) == Sent()
    # Many candidates are counted and not gathered: never more than gathering would be at that point.
    assert sent(Layout(128), 512, 2**23, Said([256], 1, 256), 4096).selection < 127 * 4096 * 256 * 8 / 100
    # k larger than a shard: no more candidates than there are latents.
    assert sent(Layout(4), 512, 40, Said([32], 1, 32), 4096).selection == 3 * 4096 * 10 * 8


def test_hours_of_a_sweep_by_hand(tmp_path: Path) -> None:
    """On one device of a given speed: FLOPs of training and of two evaluations of each cell, and its pack's start."""
    plan = plan_cluster(of(tmp_path), find_device("h100", 1e12), 1)
    flops = 0.0
    for n in (1024, 4096):
        for k in (8, 32):
            flops += 819_200 * 512 * (2 * n + 8 * k) + 2 * 8192 * 512 * (2 * n + 2 * k)
    packs = {group.cells for group in plan.groups}
    assert sum(map(len, packs)) == 4
    assert plan.quiet.seconds == pytest.approx(flops / 1e12 + 2.0 * len(packs), rel=1e-6)
    document = plan.document()
    assert json.loads(json.dumps(document)) == document
    assert document["hours"]["median"] * 3600 == pytest.approx(plan.quiet.seconds, rel=1e-3)
    assert document["disk"]["results"] == pytest.approx(4 * sum(2 * 2 * n * 512 for n in (1024, 4096)), rel=0.01)
    # Small cells of a real device are bound by launches: four times the speed of its products changes little.
    device = find_device("h100")
    faster = device._replace(rates=device.rates._replace(products=4 * device.rates.products))
    slow, fast = (plan_cluster(of(tmp_path), each, 1).quiet.seconds for each in (device, faster))
    assert 0.9 * slow < fast <= slow


def test_a_slow_store_is_what_steps_wait_for(tmp_path: Path) -> None:
    plan = plan_cluster(of(tmp_path, "disk_gb_s=1e-4"), find_device("h100"), 1)
    (group,) = plan.groups
    assert group.seconds == pytest.approx(819_200 * 512 * 2 / 1e5, rel=0.05)
    assert plan.document()["waiting_gpu_hours"] * 3600 == pytest.approx(819_200 * 512 * 2 / 1e5, rel=0.05)
    assert plan_cluster(of(tmp_path, "disk_gb_s=1e6"), find_device("h100"), 1).document()["waiting_gpu_hours"] == 0


def test_failures_and_meshes(tmp_path: Path) -> None:
    """The same sweep where nothing fits one device: gangs, of which a failure of a node stops all."""
    text = SWEEP.replace("[1024, 4096]", "[65536]").replace("batch_tokens: 8192", "batch_tokens: 1024")
    url = written(tmp_path, text)
    (one, _) = cells_to_come(describe(url).spec, 512)
    memory = 0.7 * pack_memory([one], 8192, STREAM, "cuda").total
    small = find_device("h100")._replace(memory=memory / 0.95)
    plan = plan_cluster(describe(url, ["d_model=512", "mtbf_hours=1e12"]), small, 8)
    assert max(group.step.mesh.ranks for group in plan.groups) > 1
    assert max(group.step.bytes for group in plan.groups) <= memory
    assert plan.document()["network"]["mesh"] > 0
    given = ["d_model=512", "mtbf_hours=0.002", "restart_s=1", "repair_s=1"]
    never, often = plan.document(), plan_cluster(describe(url, given), small, 8).document()
    assert never["failures"] == 0 < often["failures"]
    assert often["hours"]["low"] < often["hours"]["median"] < often["hours"]["high"]
    assert often["hours"]["median"] > never["hours"]["median"]
    forced = describe(written(tmp_path, SWEEP + "resources: {mesh: {shards: 2, replicas: 2}}\n"), ["d_model=512"])
    assert {group.step.mesh for group in plan_cluster(forced, find_device("h100"), 4).groups} == {Layout(2, 2)}
    with pytest.raises(SaescaleError, match=r"a cell needs a mesh of 4 GPUs, and there are 2"):
        plan_cluster(forced, find_device("h100"), 2)


LIVE = SWEEP.replace(
    "stores/none",
    "{live: {subject: 'hf:openai-community/gpt2', layer: 8, corpus: text, tokens: 8.0e5, max_bytes: 1.5 TiB}}",
)


def test_a_live_harvest_keeps_pace(tmp_path: Path) -> None:
    url = written(tmp_path, LIVE)

    def plan(parameters: float, gpus: int) -> ClusterPlan:
        return plan_cluster(describe(url, ["d_model=512", f"parameters={parameters}"]), find_device("h100"), gpus)

    few, many = plan(1e8, 16), plan(1e11, 16)
    assert few.harvest_gpus == 1 < many.harvest_gpus < 16
    assert many.harvest_s == pytest.approx(2 * 1e11 * 8e5 / (0.4 * find_device("h100").rates.products))
    assert few.document()["disk"]["source"] == 1.5 * 2**40
    # One fewer would be what all wait for.
    assert many.harvest_s / (many.harvest_gpus - 1) > many.quiet.seconds
    with pytest.raises(SaescaleError, match="--assume parameters="):
        plan_cluster(describe(url, ["d_model=512"]), find_device("h100"), 16)
    with pytest.raises(SaescaleError, match="a live source needs a GPU for its harvest"):
        plan(1e8, 1)


def test_a_mesh_leaves_a_gpu_to_the_harvest(tmp_path: Path) -> None:
    """One cell that fits no device would have all of them, if there were no live source."""
    text = LIVE.replace("[1024, 4096]", "[65536]").replace("[8, 32]", "[32]").replace("8192}", "1024}")
    described = describe(written(tmp_path, text), ["d_model=512", "parameters=1e8"])
    (one,) = cells_to_come(described.spec, 512)
    device = find_device("h100")._replace(memory=0.7 * pack_memory([one], 8192, STREAM, "cuda").total)
    plan = plan_cluster(described, device, 4)
    (group,) = plan.groups
    assert (plan.harvest_gpus, group.step.mesh) == (1, Layout(2))


def test_constants_of_the_gpu_are_those_of_its_benchmark() -> None:
    """Two sizes of the H200's benchmark gave them; the grid of 28 cells did not."""
    found = json.loads((ROOT / "tests" / "benchmarks" / "results" / "cuda.json").read_text())

    def predicted(batch: int, n: int, k: int) -> float:
        pairs = 8.0 * 768 * k * batch
        return H200.seconds(step_work(768, n, 2.0 * n * 768 * batch + pairs, pairs, batch, 4.0 * 2 * n * 768))

    for size in found["sizes"]:
        (ours,) = [each for each in size["contenders"] if each["name"] == "saescale bf16"]
        ratio = predicted(size["batch_tokens"], size["n_latents"], size["k"]) / np.median(ours["seconds"])
        assert 0.9 < ratio < 1.1
    grid = sum(predicted(8192, n, k) for n in (2**11, 2**13, 2**15, 2**17) for k in (8, 16, 32, 64, 128, 256, 512))
    assert 0.8 < grid / np.median(found["grid"]["seconds"]) < 1.25


def test_constants_of_the_cpu_are_those_of_the_published_run() -> None:
    run = measured(PUBLISHED)
    assert run is not None
    ratios = np.array([CPU.seconds(work) for work in run.work]) / run.seconds
    assert 0.9 < ratios.min() < ratios.max() < 1.1


def test_predictions_are_held_to_runs(tmp_path: Path) -> None:
    rows = {(row.run, row.constants_from): row for row in held_to_runs()}
    own = rows["quickstart", "its cells of other N"]
    assert own.cells == 20
    assert 0.95 < own.ratio < 1.05
    assert 0.9 < own.low < own.high < 1.15
    assert len(rows) == 4
    page = (ROOT / "scaling" / "README.md").read_text()
    for row in rows.values():
        error = f"{row.ratio:.2f} | {row.low:.2f} to {row.high:.2f}"
        assert f"| {row.run}, {row.seconds:,.0f} s | {row.constants_from} | {row.cells} | {error} |" in page
    assert held_to_runs(tmp_path) == []


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_descriptions(path: Path) -> None:
    described = describe(str(path))
    assert described.assumed.d_model
    assert cells_to_come(described.spec, described.assumed.d_model)
    assert bool(described.harvested) == (described.assumed.parameters is not None)


def test_the_largest_plan_fits_a_terminal_of_80_columns() -> None:
    described = describe(str(ROOT / "deploy" / "plans" / "gpt4-16m.yaml"))
    document = plan_cluster(described, find_device("h200"), 512).document()
    screen = io.StringIO()
    Console(width=80, file=screen).print(_groups(document["groups"]))
    shown = screen.getvalue()
    assert "…" not in shown
    assert shown.splitlines()[-1].split()[:6] == ["16,777,216", "256", "1", "in", "1", "128"]


def test_the_command(tmp_path: Path) -> None:
    url = written(tmp_path, SWEEP)
    result = saescale_here("plan", "--cluster", url, "--gpus", "2", "--assume", "d_model=512", "--json")
    document = json.loads(result.stdout)
    assert document["cells"] == 4
    assert document["assumed"]["d_model"] == {"value": 512, "from": "stated"}
    assert math.isclose(document["held"][0]["ratio"], 1, abs_tol=0.05)
    result = saescale_here("plan", "--cluster", url, "--gpus", "9", "--assume", "d_model=512")
    assert result.returncode == 0
    for said in ("4 cells on 9 h100, 5 of which have nothing to do", "hours:", "mtbf_hours", "quickstart (881 s)"):
        assert said in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "none.yaml"], "there is no plan or sweep file at none.yaml"),
        (["--cluster", "SWEEP", "--gpus", "0"], "--gpus 0: give a number from 1"),
        (["--cluster", "SWEEP", "--assume", "d_modl=5"], "--assume: d_modl is not a key, did you mean d_model?"),
        (["--cluster", "SWEEP", "--assume", "mtbf_hours"], "--assume mtbf_hours: write NAME=VALUE"),
        (["--cluster", "SWEEP", "--assume", "mtbf_hours=-1"], "--assume: mtbf_hours: input should be greater than 0"),
        (["--cluster", "SWEEP", "--assume", "d_model=100000000000"], "should be less than or equal to 65536"),
        (["--cluster", "SWEEP"], "to plan without its store say what it has, as --assume d_model=768"),
        (["--cluster", "LAYERS", "--assume", "d_model=512"], "there is no folder like stores/none.*"),
        (["--cluster", "SWEEP", "--metric", "downstream_loss.ce"], "it goes with --gpu, --gpus"),
        (["--gpus", "4"], "name the sweep with --cluster"),
        (["--cluster", "MESH", "--assume", "d_model=512"], "resources.mesh.shards: input should be greater than 0"),
        (["--cluster", "LIVE", "--assume", "parameters=1e9"], "the width of a live source's subject is not known"),
        (["--cluster", "BYTES", "--assume", "d_model=512"], "store.live.max_bytes: should be a size such as 200 GB"),
        (["--cluster", "SWEEP", "--assume", "d_model=512", "--assume", "mtbf_hours=1e-4"], "it gets nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(arguments: list[str], said: str, tmp_path: Path) -> None:
    files = {
        "SWEEP": SWEEP, "MESH": SWEEP + "resources: {mesh: {shards: 0}}\n", "LIVE": LIVE,
        "LAYERS": SWEEP.replace("stores/none", "stores/none.*"),
        "BYTES": LIVE.replace("1.5 TiB", "much"),
    }  # fmt: skip
    given = [written(tmp_path, files[one], f"{one}.yaml") if one in files else one for one in arguments]
    result = saescale_here("plan", *given)
    assert_one_line(result, said)
    assert result.stdout == ""
