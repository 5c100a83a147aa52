"""An architecture of the user's own, the page's example: trained beside TopK, killed, resumed, read back."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saescale.storage import checkpoint
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.architecture import Batch, Conditions, Settings, Shape
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.exchange import native
from saescale.trainers.mesh.mesh import ALONE
from saescale.trainers.preprocess import Centre, normalise
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.dense_training import dense_nmse, train_dense
from tests.trainers.killed import killed_after
from tests.trainers.synthetic import D_MODEL, sparse_rows

MakeCell = Callable[..., Cell]
BY_RUN = ("wall_s", "turn", "by", "xxh3")  # of a result: what no two runs share


def comparable(run: RunDirectory, cells: list[Cell]) -> list[object]:
    """Results, curves and weights, less times and who wrote them in which turn."""
    found: list[object] = []
    for cell in cells:
        result = run.read_cell_result(cell.cell_id)
        assert result is not None
        found.append({key: value for key, value in result.items() if key not in BY_RUN})
        found.append([row | {"tokens_per_s": 0} for row in run.read_cell_curve(cell.cell_id)])
        found.append({name: t.tolist() for name, t in native.read(run.cell_url(cell.cell_id)).sae.params.items()})
    return found


@pytest.mark.slow
def test_it_trains_beside_topk_and_goes_on_after_sigkill_to_the_same_bits(
    toy: str, sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    assert {"topk", "toy"} <= set(ARCHITECTURES.names())
    shared = {"tokens": 24_576, "dead_after_tokens": 512}
    own = make_cell(architecture=toy, settings={"share": 0.4}, n_latents=256, **shared)
    cells = [own, make_cell(**shared)]

    def job(name: str) -> PackJob:
        return PackJob(
            cells=cells, store=sparse_store.url, run=str(tmp_path / name), sweep="toy", threads=1,
            eval=EvalSpec(tokens=2_048, every_tokens=4_096), checkpoint_every_s=0.02,
        )  # fmt: skip

    outcome = train_pack(job("a"))
    result = {row["cell_id"]: row for row in outcome.results}[own.cell_id]
    assert (result["status"], result["architecture"]) == ("done", "toy")

    # Held to a training loop and an evaluation that share no path with it.
    dense = train_dense(sparse_store, own, 2_048)
    assert result["nmse"] == pytest.approx(dense.nmse, rel=1e-3)
    assert result["dead_fraction"] == pytest.approx(dense.dead_fraction, abs=1 / 256)
    assert 0.05 < result["dead_fraction"] < 0.95
    trained = native.read(RunDirectory(str(tmp_path / "a")).cell_url(own.cell_id))
    assert trained.cell == own
    assert result["nmse"] == pytest.approx(dense_nmse(trained.sae, sparse_store, 2_048), rel=1e-6)
    assert 0 < result["l0"] < own.k  # the share left some out

    # It has no fast path, so its steps were dense, and it says 12 d a pair of those.
    assert result["flops"] == result["flops_dense"] == 12 * 256 * D_MODEL * own.tokens

    calls = iter(range(10**6))
    late = RunDirectory(str(tmp_path / "c"))
    assert train_pack(job("c"), should_stop=lambda: next(calls) == 70).stopped
    train_pack(job("c"))
    assert comparable(late, cells) == comparable(RunDirectory(str(tmp_path / "a")), cells)

    run = RunDirectory(str(tmp_path / "b"))
    assert killed_after(60, 0.0, job("b"))
    reached = checkpoint.steps(run.checkpoint_url(own.cell_id))
    assert reached
    assert 0 < reached[0] < own.steps
    train_pack(job("b"))
    assert comparable(run, cells) == comparable(RunDirectory(str(tmp_path / "a")), cells)


def test_its_dead_latents_and_losses(toy: str) -> None:
    """A latent that fires in the batch is not dead in it; the dead ones feel the loss that is made of them."""
    module = ARCHITECTURES.load(toy)
    settings = module.Settings(k=2, share=0.0, revival=0.5)
    assert isinstance(settings, Settings)
    params = {
        name: made.data
        for name, made in module.parameters(Shape(D_MODEL, 40), settings, Centre(torch.zeros(D_MODEL), 1.0), 0).items()
    }
    x = normalise(torch.from_numpy(sparse_rows(30, seed=3)))
    dead = DeadLatents(40)
    dead.tokens_since[:] = 1_000
    step = DenseStep(module, 40).measure(
        params, params, Batch.of(x, torch.zeros(D_MODEL), False), settings, Conditions(1.0, 1_000), dead, ALONE
    )  # fmt: skip
    latents = module.forward(params, x, settings).latents
    fired = (latents > 1e-3).any(dim=0)
    assert 0 < int(fired.sum()) < 40
    assert torch.equal(dead.tokens_since, torch.where(fired, 0, 1_030))
    assert step.worked == (30, int((latents > 0).sum()), 0, 0, 0)
    assert torch.equal(step.gradient.of_trained["bias"] == -0.5, ~fired)  # dead: no other loss reaches them
    assert step.parts["revival"] == 0.0


def test_mistakes_in_its_settings_and_precision_are_named(toy: str, make_cell: MakeCell) -> None:
    for fields, said in (
        ({"settings": {"shear": 0.1}}, "shear is no setting of toy: did you mean share?"),
        ({"settings": {"share": 2}}, "setting share of toy"),
        ({"settings": {"k_aux": 8}}, "k_aux is no setting of toy"),
        ({"precision": "bf16"}, "toy has no fast path"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            make_cell(architecture=toy, **fields)
    assert make_cell(architecture=toy, settings={"share": 0.1}).settings == {}


def test_the_memory_of_what_has_no_fast_path(toy: str, make_cell: MakeCell) -> None:
    one = pack_memory([make_cell(architecture=toy, n_latents=8_192)], 2_048, StreamSize(1_024, 16_384))
    two = pack_memory([make_cell(architecture=toy, n_latents=16_384)], 2_048, StreamSize(1_024, 16_384))
    # Four copies of two matrices and a bias, and the counters of dead latents; the centre beside them.
    assert one.held == 4 * 4 * (2 * 8_192 * D_MODEL + 8_192 + D_MODEL) + 8 * 8_192
    assert two.training > one.training > 256 * 8_192 * 4 * 3
    assert math.isfinite(two.total)
