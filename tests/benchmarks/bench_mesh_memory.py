"""Benchmark (o): the memory of processes that share one cell on CPUs; no Ray.

    python -m tests.benchmarks.bench_mesh_memory
    python -m tests.benchmarks.bench_mesh_memory --architectures topk matryoshka

Of each process of several meshes the peak of its resident memory in `train_pack`, from a store to the weights, beyond
what it had after a small training, and what the planner counts with (training/memory.py). Of a mesh the process is
shown that has the most. Each has one thread.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.job import PackJob
from saescale.trainers.training.memory import StreamSize, pack_memory
from tests.benchmarks.harness import console, machine, run, show_table, write_result
from tests.benchmarks.protocol import Size
from tests.trainers.peak_memory import measure
from tests.trainers.synthetic import write_store

# Windows are small beside tensors, and most latents die.
SIZE, WARM_UP = Size(512, 512, 32_768, 8), Size(512, 512, 128, 4)
ROWS, HELD_OUT, ROW_GROUP = 16_384, 4_096, 512
MESHES = [Layout(shards, replicas) for replicas in (1, 2) for shards in (1, 2, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_mesh_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architectures", nargs="+", metavar="ARCHITECTURE", default=["topk"])
    parser.add_argument("--out", type=Path, help="JSON file (default: tests/benchmarks/results/mesh-memory.json)")
    arguments = parser.parse_args()
    where, found = machine(), []
    for each in _memory(arguments.architectures):
        found.append(each)
        path = write_result("mesh-memory", {"machine": where, "meshes": found}, arguments.out)
    rows = [
        [each["architecture"], str(Layout(each["shards"], each["replicas"])), f"{each['peak'] / 2**20:,.0f}",
         f"{each['predicted'] / 2**20:,.0f}", f"{each['ratio']:.2f}"]
        for each in found
    ]  # fmt: skip
    show_table(f"memory of {SIZE}, fp32, MiB", ["", "", "highest peak", "predicted", "peak / predicted"], rows)
    console.print(f"{where['cpu']}; wrote {os.path.relpath(path)}")


def _memory(architectures: list[str]) -> Iterator[dict[str, Any]]:
    """Of each mesh the process whose peak is the highest, and what is predicted, in bytes."""
    with tempfile.TemporaryDirectory(prefix="saescale-memory-") as folder:
        rng = np.random.default_rng(0)
        act = [rng.normal(size=(count, SIZE.d_model)).astype(np.float16) for count in (ROWS, HELD_OUT)]
        store = write_store(f"{folder}/store", *act, ROW_GROUP)
        for architecture in architectures:
            for layout in MESHES:
                small, job = (_job(folder, store, _cell(store, architecture, size)) for size in (WARM_UP, SIZE))
                (peak,) = measure(small, [job], layout=layout)
                for each in (small, job):
                    shutil.rmtree(each.run)
                predicted = pack_memory(job.cells, HELD_OUT, StreamSize(ROW_GROUP, ROWS), layout=layout).total
                yield {
                    "architecture": architecture, **layout._asdict(), **SIZE._asdict(), "predicted": predicted,
                    "peak": peak, "ratio": peak / predicted, "load": os.getloadavg()[0],
                }  # fmt: skip


def _job(folder: str, store: str, cell: Cell) -> PackJob:
    return PackJob(
        cells=[cell], store=store, run=f"{folder}/{cell.n_latents}", sweep="memory", threads=1,
        eval=EvalSpec(tokens=HELD_OUT, every_tokens=2 * cell.batch_tokens), checkpoint_every_s=0.3,
    )  # fmt: skip


def _cell(store: str, architecture: str, size: Size) -> Cell:
    return Cell(
        store=ActivationStore.open(store).identity, d_model=size.d_model, n_latents=size.n_latents, k=size.k,
        tokens=5 * size.batch_tokens, batch_tokens=size.batch_tokens, lr=1e-3, settings={"k_aux": 64},
        dead_after_tokens=2 * size.batch_tokens, architecture=architecture,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
