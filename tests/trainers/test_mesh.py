"""One cell trained by real processes: 1, 2 and 4 shards x 1 and 2 replicas, under gloo."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from saescale.storage import checkpoint
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import pairwise
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.exchange import native
from saescale.trainers.exchange.native import read
from saescale.trainers.mesh import traffic
from saescale.trainers.mesh.keys import reference
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.training import together
from saescale.trainers.training.together import train_sharded
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers import mesh_processes as mesh
from tests.trainers.mesh_processes import Crowd, Stepped
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store
from tests.trainers.test_mesh_selection import scores_of

pytestmark = pytest.mark.slow
STEPS = 14
LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    made = Crowd(tmp_path_factory.mktemp("crowd"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def one() -> Stepped:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = mesh.alone(STEPS)
    torch.set_num_threads(threads)
    return made


@pytest.mark.parametrize(("shards", "replicas"), LAYOUTS)
def test_processes_train_what_one_does(crowd: Crowd, one: Stepped, shards: int, replicas: int) -> None:
    """With AuxK at work on fewer dead latents than k_aux and on more, Multi-TopK, N no multiple of the shards. The
    guard in each process: nothing [batch, N] of the whole width is ever made."""
    answers = crowd.ask(mesh.take_steps, shards, replicas, STEPS)
    assert all(isinstance(answer, Stepped) for answer in answers), answers
    for answer in answers:
        # Every process has the same bits of what is the whole's.
        assert answer.losses == answers[0].losses
        assert answer.dead == answers[0].dead
        assert torch.equal(answer.params["b_pre"], answers[0].params["b_pre"])
        assert answer.pairs == one.pairs
        assert answer.guarded > 100
    for replica in range(1, replicas):
        for shard in range(shards):
            for name, t in answers[shard].params.items():
                assert torch.equal(t, answers[replica * shards + shard].params[name]), name
    assert answers[0].losses == pytest.approx(one.losses, rel=1e-5)
    assert answers[0].dead == pytest.approx(one.dead, abs=1e-6)
    for name, t in mesh.whole(answers, shards).items():
        # Adam divides by the root of a square: where a gradient is all but 0 its last bits are a step.
        assert float((t - one.params[name]).norm()) <= 1e-3 * float(one.params[name].norm()), name


@pytest.mark.parametrize(("shards", "replicas"), [(2, 1), (3, 1), (4, 1), (2, 2)])
def test_processes_select_what_a_plain_sort_does(crowd: Crowd, shards: int, replicas: int) -> None:
    """Given scores, both ways, to the last bit; test_mesh_selection.py has more cases, on threads."""
    cases = [
        (scores_of(kind, n), k, keys)
        for kind in ("random", "bf16", "equal", "one_shard", "negative", "zeros")
        for n, k in ((37, 5), (10, 9))
        for keys in (0, 10**9)
    ]
    answers = crowd.ask(mesh.choose, shards, replicas, cases)
    for number, (scores, k, _) in enumerate(cases):
        for replica in range(replicas):
            parts = [answers[replica * shards + shard][number] for shard in range(shards)]
            assert torch.equal(torch.cat(parts, dim=1), reference(scores, k) & (scores > 0)), number


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "hierarchical_topk"])
def test_others_made_of_topk_are_shared_as_well(crowd: Crowd, architecture: str) -> None:
    """BatchTopK's selection is over the rows of all replicas too, and its threshold of use the same everywhere."""
    threads, fields = torch.get_num_threads(), mesh.of(architecture)
    torch.set_num_threads(1)
    alone = mesh.alone(STEPS, fields)
    torch.set_num_threads(threads)
    assert 0 < alone.idle[0] < mesh.K_AUX < max(alone.idle)
    for shards, replicas in LAYOUTS if architecture == "batchtopk" else [(2, 2)]:
        answers = crowd.ask(mesh.take_steps, shards, replicas, STEPS, None, fields)
        for answer in answers:
            assert (answer.losses, answer.dead, answer.pairs) == (answers[0].losses, answers[0].dead, alone.pairs)
            assert answer.guarded > 100
        # The last of the losses is that of use, by the threshold.
        assert answers[0].losses == pytest.approx(alone.losses, rel=1e-5)
        assert answers[0].dead == pytest.approx(alone.dead, abs=1e-6)


@pytest.mark.parametrize("architecture", mesh.PENALISED)
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_those_that_decide_by_thresholds_are_shared_as_well(
    crowd: Crowd, architecture: str, dense_above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dense steps alone, and by sparse ones; the same on all ranks, and a replica as the other one to the bit."""
    threads, fields = torch.get_num_threads(), mesh.of(architecture)
    torch.set_num_threads(1)
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", dense_above)
    alone = mesh.alone(STEPS, fields)
    torch.set_num_threads(threads)
    for shards, replicas in LAYOUTS if architecture == "jumprelu" else [(2, 2)]:
        answers = crowd.ask(mesh.take_steps_so, shards, replicas, dense_above, STEPS, None, fields)
        for rank, answer in enumerate(answers):
            assert (answer.losses, answer.dead, answer.pairs) == (answers[0].losses, answers[0].dead, alone.pairs)
            assert answer.guarded > 100
            for name, t in answer.params.items():
                assert torch.equal(t, answers[rank % shards].params[name]), name
        assert answers[0].losses == pytest.approx(alone.losses, rel=1e-5)
        assert answers[0].dead == pytest.approx(alone.dead, abs=1e-6)
    poisoned = crowd.ask(mesh.take_steps_so, 2, 2, dense_above, 4, 1, fields)
    assert {answer.error for answer in poisoned} == {
        "at step 3: training loss nan with lr 0.003: diverged; try a smaller lr"
    }


def test_the_case_above_has_few_and_many_dead_latents(one: Stepped) -> None:
    assert 0 < one.idle[0] < mesh.K_AUX < max(one.idle)


def test_a_replica_has_the_bits_of_one_process(crowd: Crowd) -> None:
    """It sums the gradient of the whole batch in the order of one. AuxK alone goes another way."""
    fields = {"settings": {"k_aux": 0, "multi_topk": True}}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = mesh.alone(STEPS, fields)
    torch.set_num_threads(threads)
    for answer in crowd.ask(mesh.take_steps, 1, 2, STEPS, None, fields):
        for name, t in answer.params.items():
            assert torch.equal(t, alone.params[name]), name


def test_bf16_ties_do_not_part_the_replicas(crowd: Crowd) -> None:
    fields = {"precision": "bf16"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = mesh.alone(6, fields)
    torch.set_num_threads(threads)
    answers = crowd.ask(mesh.take_steps, 2, 2, 6, None, fields)
    assert answers[0].losses == answers[3].losses
    assert answers[0].losses == pytest.approx(alone.losses, rel=1e-3)


def test_nan_on_one_rank_is_the_same_error_on_all(crowd: Crowd) -> None:
    answers = crowd.ask(mesh.take_steps, 2, 2, 6, 1)
    assert {answer.error for answer in answers} == {
        "at step 3: training loss nan with lr 0.003: diverged; try a smaller lr"
    }


def test_what_a_step_says_is_counted(crowd: Crowd) -> None:
    """One key for each candidate of a shard, one [batch, d_model] each for x_hat, and little else."""
    fields = {"settings": {"k_aux": 0}}
    rows, told = mesh.BATCH, Said([mesh.K], 1, mesh.K)
    for shards in (2, 4):
        sent = crowd.ask(mesh.take_steps, shards, 1, 3, None, fields)[0].sent
        assert sent["select"] == (shards - 1) * rows * mesh.K * 8
        reduction = 2 * (shards - 1) * rows * mesh.D * 4 // shards  # each shard sums a part, and tells it
        # Beside it d_model numbers for b_pre's gradient, and two counts.
        assert sent["sum_shards"] == reduction + (shards - 1) * (mesh.D * 4 + 2 * 8)
        assert set(sent) == {"select", "sum_shards"}
        planned = traffic.sent(Layout(shards), mesh.D, mesh.N, told, rows)
        assert planned.selection == sent["select"]
        assert planned.reductions == pytest.approx(sent["sum_shards"], rel=0.02)
        assert crowd.ask(mesh.add, shards, 1, 8192)[0] == {"sum_shards": 2 * (shards - 1) * 8192 * 4 // shards}
    sent = crowd.ask(mesh.take_steps, 1, 2, 3, None, fields)[0].sent
    # Errors of a replica's rows, then index, z and dz of its pairs; no gradient of N x d_model.
    assert sent["gather_replicas"] == rows // 2 * (mesh.D * 4 + mesh.K * 12)
    assert (
        traffic.sent(Layout(1, 2), mesh.D, mesh.N, Said([mesh.K], 1, mesh.K), rows).replicas == sent["gather_replicas"]
    )
    # Both at once, with a second reconstruction of 4 k: what plans say is what is counted, but for a few numbers.
    fields = {"settings": {"k_aux": 0, "multi_topk": True}}
    counted = sum(crowd.ask(mesh.take_steps, 2, 2, 3, None, fields)[0].sent.values())
    assert traffic.sent(
        Layout(2, 2), mesh.D, mesh.N, Said([mesh.K, 4 * mesh.K], 2, 5 * mesh.K), rows
    ).bytes == pytest.approx(counted, rel=0.02)


# --- whole trainings


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PackJob:
    folder = tmp_path_factory.mktemp("sharded")
    url = write_store(str(folder / "store"), sparse_rows(4096, 0), sparse_rows(512, 1))
    cell = Cell(
        store=ActivationStore.open(url).identity, d_model=D_MODEL, n_latents=101, k=8, tokens=128 * 30,
        batch_tokens=128, lr=1e-3, dead_after_tokens=512, settings={"k_aux": 16},
    )  # fmt: skip
    return PackJob(
        cells=[cell], store=url, run=str(folder / "run"), sweep="x", eval=EvalSpec(tokens=512, every_tokens=128 * 10),
        threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(job: PackJob) -> dict[str, Any]:
    """By one process."""
    return train_pack(job).results[0]


def elsewhere(job: PackJob, tmp_path: Path, **more: Any) -> PackJob:
    return job.model_copy(update={"run": str(tmp_path / "run"), **more})


def assert_same(
    job: PackJob, result: dict[str, Any], unbroken: dict[str, Any], original: PackJob, shards: int = 1
) -> None:
    assert result["nmse"] == pytest.approx(unbroken["nmse"], abs=1e-5)
    assert {k: result[k] for k in ("status", "l0", "flops", "tokens")} == {
        k: unbroken[k] for k in ("status", "l0", "flops", "tokens")
    }
    # Shards divide a sum in float64.
    assert result["dead_fraction"] == pytest.approx(unbroken["dead_fraction"], rel=1e-6)
    name = result["cell_id"]
    run, first = RunDirectory(job.run), RunDirectory(original.run)
    run.check_cell(name)
    assert [row["step"] for row in run.read_cell_curve(name)] == [row["step"] for row in first.read_cell_curve(name)]
    got, wanted = read(run.cell_url(name)).sae.params, read(first.cell_url(name)).sae.params
    for key, t in wanted.items():
        assert float((got[key] - t).norm()) <= 1e-2 * float(t.norm()), key
    weights = ["sae.safetensors"]
    if shards > 1:
        weights = [f"sae-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)]
        weights += ["sae.safetensors.index.json"]
    assert sorted(path.name for path in Path(run.cell_url(name)).iterdir()) == [
        "curve.parquet", "result.json", *weights
    ]  # fmt: skip
    assert run.cells_with_weights() == [name]


def test_a_checkpoint_goes_on_at_any_other_sharding(
    crowd: Crowd, job: PackJob, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """1 process, 4 shards, 2 x 2, 1 x 2, 3 shards, 1 process: each trains some steps and stops."""
    mine = elsewhere(job, tmp_path)
    name = mine.cells[0].cell_id
    folder = RunDirectory(mine.run).checkpoint_url(name)
    questions = iter(range(10**6))
    assert train_pack(mine, should_stop=lambda: next(questions) >= 4).stopped
    steps = [checkpoint.load(folder)[2]]
    for shards, replicas in ((4, 1), (2, 2), (1, 2), (3, 1)):
        outcome = crowd.ask(mesh.train, shards, replicas, mine, 5)[0]
        assert outcome.stopped, outcome
        tensors, _, step = checkpoint.load(folder)
        steps.append(step)
        assert tensors["W_enc"].shape == (101, D_MODEL)
        assert tensors["b_pre"].shape == (D_MODEL,)
        parts = [path for path in Path(folder).iterdir() if f"step-{step:08d}" in path.name]
        # Each shard wrote its own, and replicas did not.
        assert len(parts) == shards
        if shards > 1:
            most = max(path.stat().st_size for path in parts)
            assert most < 1.3 / shards * sum(path.stat().st_size for path in parts) + 4096
    assert steps == sorted(set(steps))
    assert_same(mine, train_pack(mine).results[0], unbroken, job)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "hierarchical_topk"])
def test_those_made_of_topk_go_on_at_another_sharding(
    crowd: Crowd, job: PackJob, tmp_path: Path, architecture: str
) -> None:
    """The threshold of use among the weights; nmse is that of one process."""
    fields = job.cells[0].model_dump(exclude={"settings"}) | {"settings": {"k_aux": 16}, "architecture": architecture}
    mine = elsewhere(job, tmp_path, cells=[Cell(**fields)])
    one = mine.model_copy(update={"run": str(tmp_path / "one")})
    unbroken = train_pack(one).results[0]
    assert crowd.ask(mesh.train, 2, 2, mine, 12)[0].stopped
    (result,) = crowd.ask(mesh.train, 3, 1, mine)[0].results
    assert_same(mine, result, unbroken, one, shards=3)
    if architecture != "hierarchical_topk":
        got, wanted = (read(RunDirectory(of.run).cell_url(result["cell_id"])).sae for of in (mine, one))
        assert float(got.params["threshold"]) == pytest.approx(float(wanted.params["threshold"]), rel=1e-3)
        assert float(wanted.params["threshold"]) > 0


@pytest.mark.parametrize("architecture", mesh.PENALISED)
def test_those_that_decide_by_thresholds_go_on_at_another_sharding(
    crowd: Crowd, job: PackJob, tmp_path: Path, architecture: str
) -> None:
    """From dense steps into sparse ones, while the coefficient is found by the L0 of all processes."""
    fields = job.cells[0].model_dump(exclude={"settings"})
    # At that of the others one pair on the edge of ProLU's jump is 3e-4 of nmse: one process that starts from weights
    # which differ by 1e-7 ends there too, or does not.
    lr = 1e-2 if architecture == "prolu" else 3e-2
    cell = Cell(**(fields | {"architecture": architecture, "tokens": 128 * 60, "lr": lr}))
    mine = elsewhere(job, tmp_path, cells=[cell])
    one = mine.model_copy(update={"run": str(tmp_path / "one")})
    unbroken = train_pack(one).results[0]
    folder = RunDirectory(mine.run).checkpoint_url(cell.cell_id)
    assert crowd.ask(mesh.train, 2, 2, mine, 8)[0].stopped
    _, state, _ = checkpoint.load(folder)
    assert not state["worked"]["tokens"]
    assert crowd.ask(mesh.train, 1, 2, mine, 30)[0].stopped
    _, state, step = checkpoint.load(folder)
    assert 0 < state["worked_dense"]["tokens"] < 128 * step
    (result,) = crowd.ask(mesh.train, 3, 1, mine)[0].results
    assert_same(mine, result, unbroken, one, shards=3)
    assert result["coefficient"] == pytest.approx(unbroken["coefficient"], rel=1e-4)


def test_a_damaged_part_is_one_generation_lost(
    crowd: Crowd, job: PackJob, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """Whichever process has it, all go back to the step before, and end with the same."""
    mine = elsewhere(job, tmp_path, checkpoint_every_s=1e-6)
    folder = Path(RunDirectory(mine.run).checkpoint_url(mine.cells[0].cell_id))
    assert crowd.ask(mesh.train, 2, 1, mine, 6)[0].stopped
    newest = max(checkpoint.steps(str(folder)))
    (damaged,) = folder.glob(f"step-{newest:08d}*shard-00001-of-00002*")
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    outcomes = crowd.ask(mesh.train, 2, 1, mine)
    assert_same(mine, outcomes[0].results[0], unbroken, job, shards=2)
    # What two wrote: by any other number, one process among them, and once more as one file or smaller ones.
    url, result = RunDirectory(mine.run).cell_url(mine.cells[0].cell_id), outcomes[0].results[0]
    native.copy(url, str(tmp_path / "one"))
    native.copy(url, str(tmp_path / "many"), 4096)
    # Those bytes are what one process would have written of it.
    native.write(read(url), str(tmp_path / "written"))
    assert (tmp_path / "one" / "sae.safetensors").read_bytes() == (
        tmp_path / "written" / "sae.safetensors"
    ).read_bytes()
    for where in (url, str(tmp_path / "one"), str(tmp_path / "many")):
        for shards, replicas in ((3, 1), (1, 2)):
            for nmse, l0, held in crowd.ask(mesh.load, shards, replicas, where, mine):
                assert nmse == pytest.approx(result["nmse"], rel=1e-6)
                assert l0 == pytest.approx(result["l0"], rel=1e-6)
                assert held <= 101 * D_MODEL // shards + D_MODEL
    # A part that is damaged concerns whoever has its rows.
    damaged = Path(url) / "sae-00002-of-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(Damaged, match=r"sae-00002-of-00002.safetensors has a wrong checksum; restore it"):
        read(url)
    with pytest.raises(Damaged, match=r"sae-00002-of-00002.safetensors is damaged .*result.json"):
        RunDirectory(mine.run).check_cell(mine.cells[0].cell_id)


def test_several_processes_are_refused_by_what_cannot_be_shared(crowd: Crowd, job: PackJob, tmp_path: Path) -> None:
    cell = Cell(**(job.cells[0].model_dump(exclude={"settings"}) | {"architecture": "frozen_decoder"}))
    answers = crowd.ask(mesh.train, 2, 1, elsewhere(job, tmp_path, cells=[cell]))
    for answer in answers:
        assert answer.startswith(
            "frozen_decoder trains in one process alone; of the architectures, batchtopk, gated, hierarchical_topk"
        )


def test_what_cannot_be_is_said_before_a_process_starts(job: PackJob, tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="102 shards exceed n_latents = 101"):
        train_sharded(elsewhere(job, tmp_path), 102)
    assert not (tmp_path / "run").exists()


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_or_hangs_is_named_and_the_next_try_ends_alike(
    job: PackJob, unbroken: dict[str, Any], tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == signal.SIGSTOP:
        monkeypatch.setattr(together, "_LEAVE_S", 3.0)  # one that is halted has no last word
    mine = elsewhere(job, tmp_path, checkpoint_every_s=1e-6)
    folder = RunDirectory(mine.run).checkpoint_url(mine.cells[0].cell_id)
    hit: list[int] = []

    def strike(processes: list[BaseProcess]) -> None:
        def wait() -> None:
            while not checkpoint.steps(folder) or max(checkpoint.steps(folder)) < 5:
                time.sleep(0.05)
            os.kill(processes[1].pid or 0, how)
            hit.append(processes[1].pid or 0)

        threading.Thread(target=wait, daemon=True).start()

    with pytest.raises(SaescaleError) as caught:
        train_sharded(mine, 2, deadline_s=8.0, started=strike)
    assert hit
    assert f"pid {hit[0]}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same(mine, train_sharded(mine, 2).results[0], unbroken, job, shards=2)
    assert json.loads((Path(mine.run) / "cells" / mine.cells[0].cell_id / "result.json").read_text())["turn"] == 2
