"""The fast path trains to the same result as the dense fp32 reference, on real activations."""

from pathlib import Path

import pytest

from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.harvest.conduct import HarvestSpec, harvest
from saescale.trainers.precision import Precision
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.dense_training import Outcome, train_dense

HELD_OUT = 4_096
pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    url = str(tmp_path_factory.mktemp("smollm2") / "store")
    sizes = {"tokens": 16_384, "heldout_tokens": HELD_OUT, "row_group_rows": 2_048, "shard_rows": 16_384}
    # In float32: what bfloat16 rounds to depends on the processor.
    exact = {"subject": "smollm2-135m", "layer": 22, "out": url, "compute_dtype": "float32"}
    harvest(HarvestSpec.model_validate(exact | sizes))
    return ActivationStore.open(url)


def cell_of(store: ActivationStore, precision: Precision) -> Cell:
    return Cell(
        store=store.fingerprint, d_model=576, n_latents=2_048, k=32, tokens=98_304, batch_tokens=512,
        lr=2e-3, settings={"k_aux": 256}, dead_after_tokens=512, ema=0.95, precision=precision,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dense(smollm2_store: ActivationStore) -> Outcome:
    """In float32, whatever the precision of the fast path."""
    return train_dense(smollm2_store, cell_of(smollm2_store, "fp32"), HELD_OUT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_held_out_nmse_within_half_a_percent_and_dead_fraction_within_a_point(
    smollm2_store: ActivationStore, dense: Outcome, tmp_path: Path, precision: Precision
) -> None:
    cell = cell_of(smollm2_store, precision)
    settings = EvalSpec(tokens=HELD_OUT, every_tokens=98_304)
    job = PackJob(cells=[cell], store=smollm2_store.url, run=str(tmp_path / "run"), sweep="precision", eval=settings)
    fast = train_pack(job).results[0]
    assert fast["nmse"] == pytest.approx(dense.nmse, rel=0.005)
    assert fast["dead_fraction"] == pytest.approx(dense.dead_fraction, abs=0.01)
    assert dense.dead_fraction > 0.01  # or AuxK had nothing to do
    assert 0 < dense.nmse < 0.6
