"""The memory that the planner counts with, held to the peak that a process really reaches."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.train import PackJob
from tests.trainers.peak_memory import COUNTABLE, measure
from tests.trainers.synthetic import write_store

D_MODEL, ROWS, HELD_OUT, ROW_GROUP = 512, 32_768, 8_192, 4_096
# What an allocator hands back between two steps, and how far ahead a busy machine reads, differ between machines.
LOWEST = 1 / 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    rng = np.random.default_rng(0)
    act = [rng.normal(size=(rows, D_MODEL)).astype(np.float16) for rows in (ROWS, HELD_OUT)]
    return ActivationStore.open(write_store(str(tmp_path_factory.mktemp("memory") / "store"), *act, ROW_GROUP))


def cell(store: ActivationStore, n_latents: int, k: int, **fields: object) -> Cell:
    defaults = {
        "store": store.fingerprint, "d_model": D_MODEL, "n_latents": n_latents, "k": k, "tokens": 16_384,
        "batch_tokens": 2_048, "lr": 1e-3, "settings": {"k_aux": 64}, "dead_after_tokens": 4_096,
    }  # fmt: skip
    return Cell.model_validate(defaults | fields)


def predicted(cells: list[Cell]) -> float:
    return pack_memory(cells, HELD_OUT, StreamSize(ROW_GROUP, ROWS)).total


@pytest.mark.skipif(not COUNTABLE, reason="counts memory as Linux does")
@pytest.mark.slow
def test_the_prediction_is_close_above_the_peak(store: ActivationStore, tmp_path: Path) -> None:
    tiny = [cell(store, 128, 4, tokens=1_024, batch_tokens=512)]
    large = [cell(store, 16_384, 32)]
    several = [cell(store, n, k, precision="bf16") for n, k in ((16_384, 64), (8_192, 16), (4_096, 32))]
    # One process after another pack, as in a pool: a pack must not leave its memory to the next.
    jobs = [
        PackJob(
            cells=cells, store=store.url, run=str(tmp_path / name), sweep="test", threads=2,
            eval=EvalSpec(tokens=HELD_OUT, every_tokens=4_096), checkpoint_every_s=0.3,
        )
        for name, cells in (("tiny", tiny), ("large", large), ("large", large), ("several", several))
    ]  # fmt: skip
    warm_up, *packs = jobs
    expected = [predicted(job.cells) for job in packs]
    highest = [0.0, 0.0]
    # Alone peaks are 0.75 to 0.97 of the predictions, as freed memory is kept or not. Beside other work a checkpoint
    # may never fall together with the largest moment of a step (0.71 was seen): then they are measured again.
    for _ in range(3):
        for job in (warm_up, *packs):
            shutil.rmtree(job.run, ignore_errors=True)
        peaks = measure(warm_up, packs, stopped=1)  # so that the second has to resume
        stopped, *finished = [peak / prediction for peak, prediction in zip(peaks, expected, strict=True)]
        assert max(stopped, *finished) <= 1, [stopped, *finished]
        highest = [max(pair) for pair in zip(highest, finished, strict=True)]
        if min(highest) >= 0.6:
            return
    pytest.fail(f"the peaks of three measurements stayed below 0.6 of the predictions: {highest}")


def ratios(
    store: ActivationStore, tmp_path: Path, architecture: str, sizes: Sequence[tuple[int, int, int]]
) -> list[float]:
    """Of each N, k and batch but the first, which warms the process up: the peak over what was predicted."""
    cells = [
        cell(store, n_latents, k, tokens=4 * batch, batch_tokens=batch, architecture=architecture, settings={})
        for n_latents, k, batch in sizes
    ]
    warm_up, *jobs = [
        PackJob(
            cells=[one], store=store.url, run=str(tmp_path / str(one.n_latents)), sweep="test", threads=2,
            eval=EvalSpec(tokens=HELD_OUT, every_tokens=4_096),
        )
        for one in cells
    ]  # fmt: skip
    return [peak / predicted([one]) for peak, one in zip(measure(warm_up, jobs), cells[1:], strict=True)]


@pytest.mark.skipif(not COUNTABLE, reason="counts memory as Linux does")
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "hierarchical_topk", "switch"])
def test_a_sparse_path_takes_no_more_than_predicted(architecture: str, store: ActivationStore, tmp_path: Path) -> None:
    measured = ratios(store, tmp_path, architecture, [(128, 4, 512), (8_192, 32, 2_048), (16_384, 8, 512)])
    assert all(LOWEST < ratio <= 1 for ratio in measured), measured


@pytest.mark.skipif(not COUNTABLE, reason="counts memory as Linux does")
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["toy", "relu"])
def test_a_dense_path_takes_no_more_than_predicted(
    architecture: str, toy: str, store: ActivationStore, tmp_path: Path
) -> None:
    """Training is the larger part of one of them, evaluation of the other; relu begins with dense steps."""
    measured = ratios(store, tmp_path, architecture, [(128, 4, 512), (8_192, 4, 1_024), (16_384, 4, 128)])
    assert all(LOWEST < ratio <= 1 for ratio in measured), measured


@pytest.mark.skipif(not COUNTABLE, reason="counts memory as Linux does")
@pytest.mark.slow
def test_a_process_of_a_mesh_takes_little_less_than_predicted(tmp_path: Path) -> None:
    """Of two shards, whose tensors are larger than what an allocator keeps, and windows small beside them."""
    rng = np.random.default_rng(0)
    rows, held_out, group, n_latents = 8_192, 4_096, 512, 36_864
    act = [rng.normal(size=(count, D_MODEL)).astype(np.float16) for count in (rows, held_out)]
    store = ActivationStore.open(write_store(str(tmp_path / "store"), *act, group))
    small, large = (
        cell(store, n, k, tokens=4 * batch, batch_tokens=batch, dead_after_tokens=batch)
        for n, k, batch in ((128, 4, 256), (n_latents, 8, 512))
    )
    warm_up, job = (
        PackJob(
            cells=[one], store=store.url, run=str(tmp_path / str(one.n_latents)), sweep="test", threads=1,
            eval=EvalSpec(tokens=held_out, every_tokens=2 * one.batch_tokens),
        )
        for one in (small, large)
    )  # fmt: skip
    layout = Layout(2)
    (peak,) = measure(warm_up, [job], layout=layout)
    expected = pack_memory([large], held_out, StreamSize(group, rows), layout=layout).total
    assert 0.5 < peak / expected <= 1, peak / expected


def test_every_part_of_a_cell_counts(store: ActivationStore) -> None:
    base = cell(store, 16_384, 16)
    known = StreamSize(ROW_GROUP, ROWS)
    before = pack_memory([base], HELD_OUT, known)
    for larger, part in (
        ({"n_latents": 32_768}, "held"), ({"precision": "bf16"}, "held"), ({"k": 1_024}, "training"),
        ({"batch_tokens": 16_384}, "training"), ({"settings": {"k_aux": 64, "multi_topk": True}}, "training"),
        ({"settings": {"k_aux": 2_048}}, "training"),
        ({"k": 4_096}, "evaluation"),
    ):  # fmt: skip
        more = Cell.model_validate(base.model_dump() | larger)
        assert getattr(pack_memory([more], HELD_OUT, known), part) > getattr(before, part), larger
    assert pack_memory([base], HELD_OUT, known, remote_run=True).checkpoint > before.held / 2
    assert predicted([base, base]) > predicted([base]) + 4 * 4 * 2 * base.n_latents * D_MODEL
