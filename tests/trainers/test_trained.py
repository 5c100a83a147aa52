"""A trained SAE in use: raw activations in, latents and x_hat in their space out, the same from its file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saescale.storage.errors import Damaged
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals import nmse
from saescale.trainers.exchange import native, trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.dense_training import dense_nmse
from tests.trainers.synthetic import sparse_rows

MakeCell = Callable[..., Cell]


@pytest.fixture(scope="module")
def finished(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[trained.Trained, float]]:
    """A trained cell of each precision, read from its file, and the nmse of its result."""
    run = RunDirectory(str(tmp_path_factory.mktemp("trained")))
    cells = [make_cell(), make_cell(precision="bf16")]
    job = PackJob(
        cells=cells, store=sparse_store.url, run=run.url, sweep="t", eval=EvalSpec(tokens=2_048), threads=1
    )  # fmt: skip
    reached = {row["cell_id"]: row["nmse"] for row in train_pack(job).results}
    return {cell.precision: (native.read(run.cell_url(cell.cell_id)), reached[cell.cell_id]) for cell in cells}


def test_raw_activations_in_and_out(
    finished: dict[str, tuple[trained.Trained, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = finished["fp32"][0]
    raw = torch.from_numpy(sparse_rows(100, seed=5)) * 8 + 3
    latents, x_hat = sae.encode(raw), sae.reconstruct(raw)
    W_enc, b_enc, W_dec, b_pre = (sae.sae.params[name] for name in ("W_enc", "b_enc", "W_dec", "b_pre"))
    pre = (normalise(raw) - b_pre) @ W_enc.T + b_enc
    best = pre.topk(sae.cell.k, dim=1)
    wanted = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    assert torch.allclose(latents, wanted, atol=1e-6)
    rows = raw.double()
    mean = rows.mean(dim=1, keepdim=True)
    restored = (wanted @ W_dec + b_pre).double() * (rows - mean).norm(dim=1, keepdim=True) + mean
    assert torch.allclose(x_hat.double(), restored, rtol=1e-3, atol=1e-3)
    # In the space of the activations it is nearer to them than their mean is.
    assert (x_hat - raw).square().sum() < 0.75 * (raw - raw.float().mean(dim=0)).square().sum()

    # In pieces, the last one short.
    monkeypatch.setattr(trained, "CHUNK_ENTRIES", 7 * sae.cell.n_latents)
    for whole, pieces in ((latents, sae.encode(raw)), (x_hat, sae.reconstruct(raw))):
        assert torch.allclose(whole, pieces, atol=1e-4)
    sparse = sae.encode_sparse(raw)
    assert sparse.indices.shape == sparse.values.shape == (100, int((latents > 0).sum(dim=1).max()))
    assert bool((sparse.values.diff(dim=1) <= 0).all())
    assert bool(((sparse.indices == -1) == (sparse.values == 0)).all())
    spread = torch.zeros(100, sae.cell.n_latents + 1).scatter(
        1, sparse.indices.where(sparse.indices >= 0, 64), sparse.values
    )
    assert torch.allclose(spread[:, :-1], latents, atol=1e-5)


def test_no_rows_give_no_latents(finished: dict[str, tuple[trained.Trained, float]]) -> None:
    sae, none = finished["fp32"][0], torch.zeros(0, 32)
    assert sae.encode(none).shape == (0, 64)
    assert sae.reconstruct(none).shape == (0, 32)
    assert sae.encode_sparse(none).indices.shape == (0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_evaluation_gives_the_nmse_of_the_result(
    sparse_store: ActivationStore, finished: dict[str, tuple[trained.Trained, float]], precision: str
) -> None:
    sae, reached = finished[precision]
    found = {m.metric: m for m in nmse.measure(sae, sparse_store, None)}
    assert found["nmse"].value == pytest.approx(reached, rel=1e-6 if precision == "fp32" else 2e-3)
    assert found["nmse"].n == 2_048
    assert found["nmse"].value == pytest.approx(
        dense_nmse(sae.sae, sparse_store, 2_048), rel=1e-5 if precision == "fp32" else 5e-3
    )
    assert 0 < found["l0"].value <= sae.cell.k


def test_what_is_written_is_read_back(finished: dict[str, tuple[trained.Trained, float]], tmp_path: Path) -> None:
    sae = finished["bf16"][0]
    wrote = native.write(sae, str(tmp_path / "mine.safetensors")) + native.write(sae, str(tmp_path / "folder"))
    assert wrote == [str(tmp_path / "mine.safetensors"), str(tmp_path / "folder" / "sae.safetensors")]
    for url in (wrote[0], str(tmp_path / "folder")):
        again = native.read(url)
        assert (again.cell, again.sae.precision) == (sae.cell, "bf16")
        for name, tensor in sae.sae.params.items():
            assert np.array_equal(tensor.numpy(), again.sae.params[name].numpy())


def test_files_that_the_result_of_a_cell_does_not_name_are_refused(
    finished: dict[str, tuple[trained.Trained, float]], tmp_path: Path
) -> None:
    """One file where it names an index, and an index where it names one file."""
    one, many, index = tmp_path / "one", tmp_path / "many", "sae.safetensors.index.json"
    native.write(finished["fp32"][0], str(one))
    native.copy(str(one), str(many), 4_096)
    assert (many / index).is_file()
    for folder, named in ((one, index), (many, "sae.safetensors")):
        for sums, refused in (({}, False), ({"xxh3": {named: "0" * 16}}, True)):
            (folder / "result.json").write_text(json.dumps({"status": "done"} | sums))
            if refused:
                with pytest.raises(Damaged, match=r"none of the files that the cell's result.json"):
                    native.read(str(folder))
            else:
                assert native.read(str(folder)).cell == finished["fp32"][0].cell
