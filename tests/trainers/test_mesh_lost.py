"""A rank of a mesh that is killed or halted at any stage of a training: who is named, and that nothing changes."""

import random
import signal
from pathlib import Path

import pytest

from saescale.storage import files
from saescale.storage.errors import Damaged
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange import native
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


def left(run: str, job: PackJob, shards: int = LAYOUT.shards) -> dict[str, bytes]:
    """The weights of the finished cell. Nothing lies beside them but its curve and its result, whatever was killed."""
    cell_id, found = job.cells[0].cell_id, RunDirectory(run)
    weights = {f"sae-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)}
    weights.add("sae.safetensors.index.json")
    assert found.cell_files() == {cell_id: {"curve.parquet", "result.json", *weights}}
    found.check_cell(cell_id)
    return {name: files.read_bytes(files.join(found.cell_url(cell_id), name)) for name in weights}


@pytest.fixture(scope="module")
def unbroken(job: PackJob) -> dict[str, bytes]:
    answers = train_struck(job, LAYOUT)
    assert answers[0][0]["status"] == "done", answers
    return left(job.run, job)


def strikes() -> list[Strike]:
    """One rank at each place, by chance, but what only the first process does."""
    chance = random.Random(16)
    most = {"start": 1, "a collective": 150, "an evaluation": 3, "the weights": 1, "the result": 1}
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


def test_a_halted_rank_0_is_named_within_the_deadline(
    job: PackJob, unbroken: dict[str, bytes], tmp_path: Path
) -> None:  # fmt: skip
    """It has the store in which all say that they are there, which then does not answer. test_mesh.py halts another."""
    mine = job.model_copy(update={"run": str(tmp_path / "run")})
    answers = train_struck(mine, LAYOUT, Strike(0, "a collective", 60, signal.SIGSTOP), deadline_s=4.0)
    for answer in answers[1:]:
        assert "rank 0 (shard 0, replica 0; " in answer
        assert answer.endswith(" does not answer, or is gone")
    train_struck(mine, LAYOUT)
    assert left(mine.run, mine) == unbroken


def test_an_object_store_is_left_as_tidy_by_another_sharding(job: PackJob, s3_url: str, tmp_path: Path) -> None:
    """Of the two shards that were killed nothing is left, where three go on; and one process reads what they wrote."""
    mine = job.model_copy(update={"run": f"{s3_url}/run"})
    train_struck(mine, Layout(2), Strike(0, "a part of a checkpoint", 3, signal.SIGKILL))
    assert RunDirectory(mine.run).cell_files()
    answers = train_struck(mine, Layout(3))
    (result,) = answers[0]
    left(mine.run, mine, shards=3)
    url = RunDirectory(mine.run).cell_url(result["cell_id"])
    source = ActivationStore.open(job.store)
    held_out, trained = HeldOut(source, job.eval.tokens), native.read(url)
    (quality,) = held_out.evaluate([lambda: trained.sae], trained.origin, False)
    assert quality.nmse == pytest.approx(result["nmse"], rel=1e-6)
    one = native.copy(url, str(tmp_path / "one"))
    assert [Path(each).name for each in one] == ["sae.safetensors"]
    # A shard that is cut short, or gone, is one line that names it.
    name = files.join(url, "sae-00002-of-00003.safetensors")
    files.write_atomic(name, files.read_bytes(name)[:-7])
    with pytest.raises(Damaged, match=r"sae-00002-of-00003.safetensors has \d+ bytes, not \d+") as caught:
        native.read(url)
    assert "\n" not in str(caught.value)
    files.remove(name)
    with pytest.raises(Damaged, match=r"sae-00002-of-00003.safetensors is missing"):
        native.copy(url, str(tmp_path / "two"))
    assert not list((tmp_path).glob("two*/*"))
