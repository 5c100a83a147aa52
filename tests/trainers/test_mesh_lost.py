"""A rank of a mesh that is killed or halted at any stage of a training: who is named, and that nothing changes."""

import random
import signal
from pathlib import Path

import pytest

from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.train import PackJob
from tests.trainers.struck import PLACES, Strike, train_struck
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
LAYOUT, STEPS = Layout(2, 2), 12


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> PackJob:
    folder = tmp_path_factory.mktemp("struck")
    url = write_store(str(folder / "store"), sparse_rows(2048, 0), sparse_rows(512, 1))
    cell = Cell(
        store=ActivationStore.open(url).identity, d_model=D_MODEL, n_latents=51, k=8, tokens=128 * STEPS,
        batch_tokens=128, lr=1e-3, dead_after_tokens=512, settings={"k_aux": 16},
    )  # fmt: skip
    return PackJob(
        cells=[cell], store=url, run=str(folder / "run"), sweep="x", eval=EvalSpec(tokens=512, every_tokens=128 * 4),
        threads=1, checkpoint_every_s=1e-6,
    )  # fmt: skip


def left(run: str, job: PackJob) -> dict[str, bytes]:
    """Every file of the finished cell but those that have the time in them."""
    folder = Path(RunDirectory(run).cell_url(job.cells[0].cell_id))
    assert not (folder / "checkpoint").exists()
    RunDirectory(run).check_cell(job.cells[0].cell_id)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("sae")}


@pytest.fixture(scope="module")
def unbroken(job: PackJob) -> dict[str, bytes]:
    answers = train_struck(job, LAYOUT)
    assert answers[0][0]["status"] == "done", answers
    return left(job.run, job)


def strikes() -> list[Strike]:
    """One rank at each place, by chance, but what only the first process does."""
    chance = random.Random(16)
    most = {"start": 1, "a collective": 150, "a sum": 20, "an evaluation": 3, "the weights": 1, "the result": 1}
    found = []
    for place in PLACES:
        rank = 0 if place in ("the pointer", "the result") else chance.randrange(LAYOUT.ranks)
        if place in ("a part of a checkpoint", "the weights"):
            rank %= LAYOUT.shards  # the first replica's
        found.append(Strike(rank, place, chance.randint(1, most.get(place, STEPS - 2)), signal.SIGKILL))
    return found


@pytest.mark.parametrize("strike", strikes(), ids=lambda strike: strike.place.replace(" ", "-"))
def test_a_rank_killed_at_any_stage_changes_no_bit(
    job: PackJob, unbroken: dict[str, bytes], tmp_path: Path, strike: Strike
) -> None:
    mine = job.model_copy(update={"run": str(tmp_path / "run")})
    answers = train_struck(mine, LAYOUT, strike)
    named = f"rank {strike.rank} (shard {strike.rank % 2}, replica {strike.rank // 2}"
    for rank, answer in enumerate(answers):
        if rank != strike.rank and strike.place not in ("start", "the result"):
            assert answer.startswith("MeshBroken: the mesh of 2 shards x 2 replicas broke: "), answer
            assert named in answer
    train_struck(mine, LAYOUT)
    assert left(mine.run, mine) == unbroken


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_is_halted_is_named_within_the_deadline(
    job: PackJob, unbroken: dict[str, bytes], tmp_path: Path, rank: int
) -> None:
    """Rank 0 too, which has the store in which all say that they are there."""
    mine = job.model_copy(update={"run": str(tmp_path / "run")})
    answers = train_struck(mine, LAYOUT, Strike(rank, "a collective", 60, signal.SIGSTOP), deadline_s=4.0)
    for answer in answers[:rank] + answers[rank + 1 :]:
        assert f"rank {rank} (shard {rank % 2}, replica {rank // 2}; " in answer, answer
        assert "gives no sign of life" in answer or "does not answer, or is gone" in answer
    train_struck(mine, LAYOUT)
    assert left(mine.run, mine) == unbroken
