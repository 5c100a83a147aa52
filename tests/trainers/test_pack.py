"""A pack from stream to results: a known dictionary recovered, exact resume after SIGKILL, single cells that fail."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from saescale.storage import checkpoint
from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists
from saescale.storage.lease import Lease, Superseded
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Order
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.topk_sparse import TopKStep
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import OutOfMemory
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange import native
from saescale.trainers.preprocess import geometric_median, measure_centre, normalise
from saescale.trainers.training.report import Progress
from saescale.trainers.training.train import PackJob, PackOutcome, train_pack
from tests.trainers.killed import killed_after
from tests.trainers.synthetic import D_MODEL, sparse_rows, true_dictionary, write_store
from tests.trainers.topk_case import in_float64, new_sae

MakeCell = Callable[..., Cell]


def job(cells: list[Cell], store: ActivationStore, run: str, **fields: object) -> PackJob:
    # One thread: bits are compared between processes.
    defaults = {"eval": EvalSpec(tokens=2_048, every_tokens=2_048), "threads": 1}
    return PackJob(cells=cells, store=store.url, run=run, sweep="test", **(defaults | fields))


def weights(run: str, cell: Cell) -> dict[str, torch.Tensor]:
    return native.read(RunDirectory(run).cell_url(cell.cell_id)).sae.params


def comparable(outcome: PackOutcome) -> dict[str, dict[str, object]]:
    """Results without what may differ between two equal trainings: times."""
    return {r["cell_id"]: {k: v for k, v in r.items() if k != "wall_s"} for r in outcome.results}


def test_a_known_dictionary_is_recovered(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    cell = make_cell(n_latents=128, tokens=16_384 * 8, batch_tokens=128, ema=0.99, lr=4e-3, dead_after_tokens=4_096)
    result = train_pack(job([cell], sparse_store, run_url)).results[0]
    decoder = weights(run_url, cell)["W_dec"]
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    # Preprocessing takes the mean over d_model off every direction, from the true ones too.
    truth = normalise(torch.from_numpy(true_dictionary()))
    similarity = (truth @ decoder.T).max(dim=1).values
    assert float((similarity > 0.9).float().mean()) > 0.9, similarity.sort().values
    assert result["nmse"] < 0.12
    assert result["l0"] <= cell.k


def test_results_and_curves_are_complete(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    cells = [make_cell(), make_cell(n_latents=96, k=5, tokens=4_096), make_cell(multi_topk=True)]
    seen: list[Progress] = []
    outcome = train_pack(job(cells, sparse_store, run_url), report=seen.append)
    run = RunDirectory(run_url)
    assert not outcome.stopped
    assert {r["cell_id"] for r in outcome.results} == run.cells_with_results() == {c.cell_id for c in cells}
    assert seen[-1].done == 3
    assert {c.cell_id: c.nmse for p in seen for c in p.ended} == {r["cell_id"]: r["nmse"] for r in outcome.results}
    assert seen[-1].trained_tokens == sum(cell.tokens for cell in cells)
    for cell in cells:
        result, curve = run.read_cell_result(cell.cell_id), run.read_cell_curve(cell.cell_id)
        assert result is not None
        assert result["status"] == "done"
        assert result["tokens"] == cell.tokens == curve[-1]["tokens"]
        assert result["device"] == "cpu"  # in the tests, whose GPUs are hidden
        assert result["nmse"] == curve[-1]["nmse"] > 0
        assert [row["tokens"] for row in curve] == list(range(2_048, cell.tokens + 1, 2_048))
        assert result["flops"] == curve[-1]["flops"] > 0
        assert 0 <= result["dead_fraction_long"] <= result["dead_fraction"] <= 1
        assert not exists(run.checkpoint_url(cell.cell_id))


def test_results_say_what_moves_nmse(
    sparse_store: ActivationStore, make_cell: MakeCell, run_url: str, tmp_path: Path, toy: str
) -> None:
    """What a cell was told stands in its row, in a column or in `settings`."""
    cells = [make_cell(tokens=512, heldout_rows=2_048, stream_seed=5, multi_topk=True, k_aux=16)]
    cells += [make_cell(tokens=512, stream_seed=5, architecture=toy, settings={"share": 0.3})]
    run = RunDirectory(run_url)
    run.write_results(train_pack(job(cells, sparse_store, run_url)).results)
    shared = {
        "store": sparse_store.fingerprint, "corpus": sparse_store.manifest.corpus, "heldout_rows": 2_048,
        "precision": "fp32", "batch_tokens": 256, "ema": 0.9,
    }  # fmt: skip
    rows = {row["architecture"]: row for row in run.read_results().to_pylist()}
    for row, own in ((rows["topk"], {"k_aux": 16, "auxk_coefficient": 1 / 32}), (rows[toy], {"k_aux": None})):
        assert {name: row[name] for name in shared | own} == shared | own
    others = {"dead_after_tokens": 2_048, "stream_seed": 5}
    assert json.loads(rows["topk"]["settings"]) == others | {"multi_topk": True}
    assert json.loads(rows[toy]["settings"]) == others | {"share": 0.3, "revival": 0.001}
    with pytest.raises(SaescaleError, match="measured on other held-out rows than 1024"):
        train_pack(job(cells, sparse_store, str(tmp_path / "b"), eval=EvalSpec(tokens=1_024)))


def test_a_cell_does_not_depend_on_its_pack(sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path) -> None:
    cell, other = make_cell(), make_cell(n_latents=80, k=4, seed=3)
    alone = train_pack(job([cell], sparse_store, str(tmp_path / "alone")))
    together = train_pack(job([other, cell], sparse_store, str(tmp_path / "together")))
    assert comparable(alone)[cell.cell_id] == comparable(together)[cell.cell_id]
    for name, tensor in weights(str(tmp_path / "alone"), cell).items():
        assert torch.equal(tensor, weights(str(tmp_path / "together"), cell)[name])


def test_the_first_kernel_does_not_change_the_number_of_threads(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    script = """
import sys, torch
from saescale.trainers.training.train import *
torch.set_num_threads(1)
train_pack(PackJob.model_validate_json(sys.argv[1]))
sys.exit(torch.get_num_threads() != 1)
"""
    request = job([make_cell(tokens=512)], sparse_store, str(tmp_path / "run"), threads=None)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script, request.model_dump_json()], env=environment, check=True)


def test_a_stopped_pack_goes_on_to_the_same_bits(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    cells = [make_cell(), make_cell(n_latents=96, k=5, tokens=4_096)]
    undisturbed = train_pack(job(cells, sparse_store, str(tmp_path / "a")))
    calls = iter(range(10**6))
    stopped = train_pack(job(cells, sparse_store, str(tmp_path / "b")), should_stop=lambda: next(calls) == 9)
    assert stopped.stopped
    assert checkpoint.steps(RunDirectory(str(tmp_path / "b")).checkpoint_url(cells[0].cell_id)) == [9]
    resumed = train_pack(job(cells, sparse_store, str(tmp_path / "b")))
    assert comparable(resumed) == comparable(undisturbed)
    for cell in cells:
        a, b = RunDirectory(str(tmp_path / "a")), RunDirectory(str(tmp_path / "b"))
        rows = [[{**row, "tokens_per_s": 0} for row in run.read_cell_curve(cell.cell_id)] for run in (a, b)]
        assert rows[0] == rows[1]
        for name, tensor in weights(str(tmp_path / "a"), cell).items():
            assert torch.equal(tensor, weights(str(tmp_path / "b"), cell)[name])


@pytest.mark.chaos
def test_sigkill_at_any_moment_loses_nothing(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    cells = [make_cell(tokens=49_152), make_cell(n_latents=96, k=5, tokens=49_152)]
    undisturbed = train_pack(job(cells, sparse_store, str(tmp_path / "a"), checkpoint_every_s=0.05))
    request = job(cells, sparse_store, str(tmp_path / "b"), checkpoint_every_s=0.02)
    rng = np.random.default_rng(0)
    kills = [killed_after(int(rng.integers(1, 40)), float(rng.uniform(0, 0.1)), request) for _ in range(6)]
    assert sum(kills) >= 2
    resumed = train_pack(request)
    assert comparable(resumed) == comparable(undisturbed)
    for cell in cells:
        for name, tensor in weights(str(tmp_path / "a"), cell).items():
            assert torch.equal(tensor, weights(str(tmp_path / "b"), cell)[name])


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    cell = make_cell()
    undisturbed = train_pack(job([cell], sparse_store, str(tmp_path / "a")))
    for stop_at in (5, 8):
        calls = iter(range(10**6))
        train_pack(
            job([cell], sparse_store, str(tmp_path / "b")), should_stop=lambda: next(calls) == stop_at  # noqa: B023
        )  # fmt: skip
    url = RunDirectory(str(tmp_path / "b")).checkpoint_url(cell.cell_id)
    newest = max(Path(url).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-8] + b"garbage!")
    with pytest.warns(UserWarning, match="wrong checksum"):
        resumed = train_pack(job([cell], sparse_store, str(tmp_path / "b")))
    assert comparable(resumed) == comparable(undisturbed)


def test_a_resumed_pack_keeps_the_order_of_its_checkpoint(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make_cell(), make_cell(n_latents=96, k=5)]
    undisturbed = train_pack(job(cells, sparse_store, str(tmp_path / "a")))
    calls = iter(range(10**6))
    train_pack(job(cells, sparse_store, str(tmp_path / "b")), should_stop=lambda: next(calls) == 9)
    monkeypatch.setattr(Order.__new__, "__defaults__", (3,))
    other_order = train_pack(job(cells, sparse_store, str(tmp_path / "c")))
    assert comparable(other_order) != comparable(undisturbed)
    assert comparable(train_pack(job(cells, sparse_store, str(tmp_path / "b")))) == comparable(undisturbed)


@pytest.mark.parametrize("position", [None, {"mix_row_groups": 3}])
def test_checkpoints_without_one_order_of_the_data_are_not_used(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path, position: dict[str, int] | None
) -> None:
    cells = [make_cell(), make_cell(n_latents=96, k=5)]
    undisturbed = train_pack(job(cells, sparse_store, str(tmp_path / "a")))
    calls = iter(range(10**6))
    train_pack(job(cells, sparse_store, str(tmp_path / "b")), should_stop=lambda: next(calls) == 9)
    pointer = Path(RunDirectory(str(tmp_path / "b")).checkpoint_url(cells[1].cell_id)) / "latest-00001.json"
    content = json.loads(pointer.read_text())
    del content["checksum"]  # as a pointer of an earlier version has none
    for generation in content["generations"]:
        stream = generation["meta"].pop("stream")
        if position is not None:
            generation["meta"]["stream"] = stream | position
    pointer.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="order of its data"):
        again = train_pack(job(cells, sparse_store, str(tmp_path / "b")))
    assert comparable(again) == comparable(undisturbed)


def test_a_cell_that_diverges_fails_alone(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    healthy, poisoned = make_cell(), make_cell(lr=1e30)
    results = {r["cell_id"]: r for r in train_pack(job([poisoned, healthy], sparse_store, run_url)).results}
    assert results[poisoned.cell_id]["status"] == "failed"
    assert "diverged" in results[poisoned.cell_id]["error"]
    assert results[poisoned.cell_id]["nmse"] is None
    assert results[healthy.cell_id]["status"] == "done"


def test_sigterm_means_what_it_meant_before(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    """Also while a batch is waited for: Lightning's handler would only take note."""
    seen = set()

    def look() -> bool:
        seen.add(signal.getsignal(signal.SIGTERM))
        return False

    before = signal.getsignal(signal.SIGTERM)
    train_pack(job([make_cell(n_latents=32, k=2, tokens=2048)], sparse_store, run_url), should_stop=look)
    assert seen == {before}
    assert signal.getsignal(signal.SIGTERM) == before


def test_finished_cells_are_not_trained_again(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    request = job([make_cell()], sparse_store, run_url)
    first = train_pack(request)
    again = train_pack(request, report=lambda progress: pytest.fail("it trained again"))
    # Read back, a result says besides which turn wrote it.
    assert not again.stopped
    assert [{name: row[name] for name in first.results[0]} for row in again.results] == first.results


def test_nothing_random_that_a_checkpoint_would_have_to_hold(
    sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    cell, outcomes = make_cell(tokens=8_192, k_aux=8, dead_after_tokens=1_024), []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        run = str(tmp_path / f"run{seed}")
        outcome = train_pack(job([cell], sparse_store, run))
        outcomes.append((comparable(outcome), {name: t.tolist() for name, t in weights(run, cell).items()}))
    assert outcomes[0] == outcomes[1]


def test_an_error_in_one_cell_fails_that_cell_alone(
    sparse_store: ActivationStore, make_cell: MakeCell, run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TopKStep.measure

    def broken(self: TopKStep, params: dict[str, torch.Tensor], *rest: Any) -> Any:
        if len(params["W_enc"]) == 128:
            raise ValueError("no such latent")
        return real(self, params, *rest)

    monkeypatch.setattr(TopKStep, "measure", broken)
    good, bad = make_cell(n_latents=64), make_cell(n_latents=128)
    results = {row["cell_id"]: row for row in train_pack(job([good, bad], sparse_store, run_url)).results}
    assert results[good.cell_id]["status"] == "done"
    assert results[bad.cell_id]["status"] == "failed"
    assert results[bad.cell_id]["error"] == "at step 1: ValueError: no such latent"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=["python", "torch", "thread"],
)
def test_memory_that_runs_out_is_no_cells_fault(
    sparse_store: ActivationStore,
    make_cell: MakeCell,
    run_url: str,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(TopKStep, "measure", full)
    two = job([make_cell(n_latents=64), make_cell(n_latents=128)], sparse_store, run_url)
    with pytest.raises(OutOfMemory, match="2 cells did not fit into memory"):
        train_pack(two)
    assert RunDirectory(run_url).cells_with_results() == set()


def test_a_worker_whose_run_was_taken_over_writes_nothing(
    sparse_store: ActivationStore, make_cell: MakeCell, run_url: str
) -> None:
    late = job([make_cell()], sparse_store, run_url).model_copy(update={"driver": "the one before"})
    with Lease(run_url), pytest.raises(Superseded):
        train_pack(late)
    assert {name for names in RunDirectory(run_url).cell_files().values() for name in names} <= {"curve.parquet"}


def test_nan_activations_are_named(make_cell: MakeCell, tmp_path: Path) -> None:
    """A store damaged after it was written: its values are checked when a row group is first read."""
    good = sparse_rows(4_096, seed=0)
    url = write_store(str(tmp_path / "store"), good, sparse_rows(2_048, seed=1))
    shard = tmp_path / "store" / "train-00000.parquet"
    data = shard.read_bytes()
    position = data.index(good[2_000].tobytes())
    shard.write_bytes(data[:position] + np.full(1, np.nan, np.float16).tobytes() + data[position + 2 :])
    store = ActivationStore.open(url)
    with pytest.raises(SaescaleError, match=r"train-00000\.parquet.*row group 1"):
        train_pack(job([make_cell(store=store.fingerprint)], store, str(tmp_path / "run")))


def test_another_store_is_refused(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    with pytest.raises(SaescaleError, match="not the store that these cells were planned for"):
        train_pack(job([make_cell(store="0" * 16)], sparse_store, run_url))


def test_held_out_nmse_is_global_and_exact(sparse_store: ActivationStore) -> None:
    sae = new_sae(D_MODEL, 64, 3)
    got = HeldOut(sparse_store, 2_000).evaluate([lambda: sae], torch.zeros(D_MODEL))[0]
    x = normalise(torch.from_numpy(sparse_store.read_split("heldout", 2_000))).double()
    error = x - in_float64(sae).forward(x).x_hat
    wanted = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    assert got.nmse == pytest.approx(float(wanted), rel=1e-6)


def test_held_out_rows_that_do_not_vary_are_refused(tmp_path: Path) -> None:
    same = np.repeat(sparse_rows(1, seed=0), 63, axis=0)
    store = ActivationStore.open(write_store(str(tmp_path / "flat"), sparse_rows(64, seed=1), same))
    for tokens in (1, 63):
        with pytest.raises(SaescaleError, match=rf"flat: the first {tokens} held-out rows have a total variation of"):
            HeldOut(store, tokens, where=store.url)


def test_preprocessing_and_geometric_median() -> None:
    x = normalise(torch.randn(100, 16) * 50 + 3)
    assert torch.allclose(x.mean(dim=1), torch.zeros(100), atol=1e-6)
    assert torch.allclose(x.norm(dim=1), torch.ones(100), atol=1e-6)
    # An outlier moves the mean and hardly the median.
    points = torch.cat([torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.full((10, 4), 1e3)])
    median = geometric_median(points)
    assert median.norm() < 1.0 < points.mean(dim=0).norm()
    distance = lambda at: float((points - at).norm(dim=1).sum())  # noqa: E731
    assert all(distance(median) <= distance(median + 0.05 * torch.randn(4)) + 1e-2 for _ in range(20))
    assert measure_centre(x).variance == pytest.approx(float((x - x.mean(dim=0)).square().mean()), rel=1e-5)


def test_nmse_of_a_trained_cell_in_plain_numpy(
    sparse_store: ActivationStore, make_cell: MakeCell, run_url: str
) -> None:
    """From the files alone, the store's and the cell's, without a line of the product: to 1e-7."""
    cell = make_cell(n_latents=96, k=3)
    result = train_pack(job([cell], sparse_store, run_url)).results[0]
    raw = b"".join(
        b"".join(pq.read_table(path)["act"].to_pylist())
        for path in sorted(Path(sparse_store.url).rglob("*heldout*.parquet"))
    )
    x = np.frombuffer(raw, dtype=np.float16).reshape(-1, D_MODEL)[: job([cell], sparse_store, run_url).eval.tokens]
    x = x.astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    file = Path(run_url, "cells", cell.cell_id, "sae.safetensors")
    sae = {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
    scores = (x - sae["b_pre"]) @ sae["W_enc"].T + sae["b_enc"]
    latents = np.zeros_like(scores)
    top = np.argsort(-scores, axis=1)[:, :3]
    np.put_along_axis(latents, top, np.maximum(np.take_along_axis(scores, top, axis=1), 0), axis=1)
    x_hat = latents @ sae["W_dec"] + sae["b_pre"]
    nmse = ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert result["nmse"] == pytest.approx(nmse, abs=1e-7)
