"""The memory that the planner counts with, held to the peak that a process really reaches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from storage.activations import ActivationStore
from tests.trainers.synthetic import write_store
from trainers.cell import Cell, EvalSpec
from trainers.memory import StreamSize, pack_memory
from trainers.train import PackJob

D_MODEL, ROWS, HELD_OUT, ROW_GROUP = 512, 32_768, 8_192, 4_096

MEASURE = """
import json, sys
from trainers.train import PackJob, train_pack

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

warm_up, *jobs = (PackJob.model_validate(job) for job in json.loads(sys.argv[1]))
train_pack(warm_up)  # compiled kernels and the allocator's habits belong to the process, not to a pack
before, peaks = memory("VmRSS"), []
for job in jobs:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    batches = iter(range(10**6))
    # The first call is stopped half-way, so that the second has to resume.
    train_pack(job, should_stop=lambda: not peaks and next(batches) > 2)
    peaks.append(memory("VmHWM") - before)
print("peaks", json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    rng = np.random.default_rng(0)
    act = [rng.normal(size=(rows, D_MODEL)).astype(np.float16) for rows in (ROWS, HELD_OUT)]
    return ActivationStore.open(write_store(str(tmp_path_factory.mktemp("memory") / "store"), *act, ROW_GROUP))


def cell(store: ActivationStore, n_latents: int, k: int, **fields: object) -> Cell:
    defaults = {
        "store": store.fingerprint, "d_model": D_MODEL, "n_latents": n_latents, "k": k, "tokens": 16_384,
        "batch_tokens": 2_048, "lr": 1e-3, "k_aux": 64, "dead_after_tokens": 4_096,
    }  # fmt: skip
    return Cell.model_validate(defaults | fields)


def predicted(cells: list[Cell]) -> float:
    return pack_memory(cells, HELD_OUT, StreamSize(ROW_GROUP, ROWS)).total


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
def test_the_prediction_is_within_15_percent_of_the_peak(store: ActivationStore, tmp_path: Path) -> None:
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
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([job.model_dump() for job in jobs])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    peaks = json.loads(done.stdout.split("peaks ")[-1])
    expected = [predicted(job.cells) for job in jobs[1:]]
    stopped, *finished = [peak / prediction for peak, prediction in zip(peaks, expected, strict=True)]
    assert stopped <= 1
    assert finished == pytest.approx([1, 1], abs=0.15), finished
    assert max(finished) <= 1, finished


def test_every_part_of_a_cell_counts(store: ActivationStore) -> None:
    base = cell(store, 16_384, 16)
    for larger in (
        {"n_latents": 8_192}, {"k": 1_024}, {"batch_tokens": 16_384}, {"precision": "bf16"}, {"multi_topk": True},
        {"k_aux": 2_048},
    ):  # fmt: skip
        more = Cell.model_validate(base.model_dump() | larger)
        known = StreamSize(ROW_GROUP, ROWS)
        assert pack_memory([more], HELD_OUT, known) != pack_memory([base], HELD_OUT, known), larger
    assert predicted([base, base]) > predicted([base]) + 4 * 4 * 2 * base.n_latents * D_MODEL
