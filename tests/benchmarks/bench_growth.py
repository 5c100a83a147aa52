"""Benchmark (d): how the time of a training step, and the memory of a pack, grow.

Time: one saescale step on the CPU while one of N, k, batch and the share of dead latents changes and the rest stays.
Settings take turns, so that a disturbance of the machine meets all of an axis.
Memory: a process of its own trains a pack while N, k, batch, tokens or the number of cells changes, and says by how
much it grew at most; beside it what the planner predicts (trainers/training/memory.py).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import fast_precision, set_threads
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import measure_centre
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.train import PackJob
from tests.benchmarks.harness import alternate, console, machine, run, show_table, write_result
from tests.benchmarks.ours import training_cell
from tests.benchmarks.protocol import Size, unit_rows
from tests.trainers.peak_memory import measure
from tests.trainers.synthetic import write_store

BASE = Size(2048, 768, 8192, 32)
K_AUX = 256
AXES: dict[str, list[int | float]] = {
    "n_latents": [2048, 4096, 8192, 16384, 32768],
    "k": [8, 32, 128, 512],
    "batch_tokens": [512, 1024, 2048, 4096, 8192],
    "dead": [0.0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.9],
}
MEMORY_AXES: dict[str, list[int]] = {
    "n_latents": [4096, 8192, 16384],
    "k": [8, 64, 256],
    "batch_tokens": [1024, 4096, 8192],
    "tokens": [16_384, 65_536, 131_072],
    "cells": [1, 2, 4],
}
ROWS, HELD_OUT, ROW_GROUP = 32_768, 8_192, 4_096


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each setting that count (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/growth.json)")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    where, precision = machine(), fast_precision(torch.device("cpu"))
    result = {
        "machine": where, "precision": precision, "threads": arguments.threads, "rounds": arguments.rounds,
        "time": _times(precision, arguments.rounds), "memory": _memories(precision, arguments.threads),
    }  # fmt: skip
    path = write_result("growth", result, arguments.out)
    console.print(f"wrote {os.path.relpath(path)}")


class _Step(NamedTuple):
    """A setting that takes its turn: one training step of one cell."""

    name: str
    train: Callable[[], object]

    def step(self) -> float:
        began = time.perf_counter()
        self.train()
        return time.perf_counter() - began


def _setting(size: Size, dead_share: float, precision: Precision) -> Callable[[], object]:
    x = unit_rows(size)[0]
    centre = measure_centre(x)
    cell = training_cell(size, centre, precision, K_AUX)
    never = torch.arange(size.n_latents) < dead_share * size.n_latents
    # Latents that are dead for good: AuxK sees their pre-activations, and they never win a place.
    cell.sae.params["b_enc"][never] = -10.0

    def train() -> None:
        cell.dead.tokens_since[never] = 10**9
        cell.train_on(Batch.of(x, centre.b_pre, precision == "bf16"))

    return train


def _times(precision: Precision, rounds: int) -> list[dict[str, Any]]:
    entries = []
    for axis, values in AXES.items():
        steps = []
        for value in values:
            size = BASE if axis == "dead" else BASE._replace(**{axis: int(value)})
            steps.append(_Step(f"{value:,}", _setting(size, value if axis == "dead" else 0.0, precision)))
        timings = alternate(steps, rounds, warmup=2)
        found = [timings[s.name].median * 1e3 for s in steps]
        base = found[values.index(0.0 if axis == "dead" else getattr(BASE, axis))]
        rows = [[s.name, f"{ms:,.1f}", f"{ms / base:.2f}"] for s, ms in zip(steps, found, strict=True)]
        show_table(f"{axis} ({BASE} otherwise)", [axis, "median ms", "against the base"], rows)
        entries += [
            {"axis": axis, "value": value, "median_ms": ms, "seconds": timings[s.name].seconds}
            for s, value, ms in zip(steps, values, found, strict=True)
        ]
    return entries


def _memories(precision: Precision, threads: int) -> list[dict[str, Any]]:
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        train, held_out = (rng.normal(size=(rows, BASE.d_model)).astype(np.float16) for rows in (ROWS, HELD_OUT))
        store = ActivationStore.open(write_store(f"{folder}/store", train, held_out, ROW_GROUP))
        for axis, values in MEMORY_AXES.items():
            rows = []
            for value in values:
                fields = {} if axis == "cells" else {axis: value}
                cells = [
                    Cell.model_validate({
                        "store": store.fingerprint, "d_model": BASE.d_model, "n_latents": BASE.n_latents,
                        "k": BASE.k, "tokens": 16_384, "batch_tokens": BASE.batch_tokens, "lr": 1e-3, "seed": seed,
                        "settings": {"k_aux": K_AUX}, "dead_after_tokens": 8_192, "precision": precision,
                    } | fields)
                    for seed in range(value if axis == "cells" else 1)
                ]  # fmt: skip
                predicted = pack_memory(cells, HELD_OUT, StreamSize(ROW_GROUP, ROWS)).total
                measured = _peak(cells, store, f"{folder}/{axis}-{value}", threads)
                rows.append([f"{value:,}", *(f"{n / 2**20:,.0f}" for n in (measured, predicted)),
                             f"{measured / predicted:.2f}"])  # fmt: skip
                entries.append({"axis": axis, "value": value, "measured": measured, "predicted": predicted})
            show_table(f"{axis} ({BASE} otherwise)", [axis, "peak MiB", "predicted MiB", "ratio"], rows)
    return entries


def _peak(cells: list[Cell], store: ActivationStore, folder: str, threads: int) -> int:
    """Bytes by which a process grows at most while it trains `cells`, after a tiny pack warmed it up."""
    tiny = cells[0].model_copy(update={"n_latents": 128, "k": 4, "tokens": 1_024, "batch_tokens": 512})
    jobs = [
        PackJob(
            cells=pack, store=store.url, run=f"{folder}/{len(pack)}-{pack[0].n_latents}", sweep="growth",
            eval=EvalSpec(tokens=HELD_OUT, every_tokens=pack[0].tokens), threads=threads, checkpoint_every_s=0.5,
        )
        for pack in ([tiny], cells)
    ]  # fmt: skip
    warm_up, job = jobs
    return measure(warm_up, [job])[0]


if __name__ == "__main__":
    run(main)
