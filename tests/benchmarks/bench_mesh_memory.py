"""Benchmark (o): the memory of processes that share one cell on CPUs; no Ray.

    python -m tests.benchmarks.bench_mesh_memory
    python -m tests.benchmarks.bench_mesh_memory --architectures topk matryoshka --sizes latents batch

Of each process of several meshes the peak of its resident memory in `train_pack`, from a store to the weights, beyond
what it had after a small training, and what the planner counts with (training/memory.py). Of a mesh the process is
shown that has the most. Each has one thread. Rows lie in few directions, so that most latents die: that is what a plan
counts with, since the dead ones take AuxK's memory.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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

SIZES = {
    "latents": Size(512, 512, 32_768, 8),
    "batch": Size(2_048, 512, 16_384, 32),
    "width": Size(1_024, 2_048, 8_192, 32),
}
ROWS, HELD_OUT = 16_384, 4_096
GROUP_NUMBERS = 2**18  # of a row group: windows are small beside tensors
DIRECTIONS = 8  # that rows are made of, two of them each
EVERY = [Layout(shards, replicas) for replicas in (1, 2) for shards in (1, 2, 4) if shards * replicas > 1]
# What topk says of a mesh of many processes goes for the others too.
SOME = [Layout(2, 1), Layout(1, 2), Layout(2, 2)]
ARCHITECTURES = ["topk", "batchtopk", "matryoshka", "hierarchical_topk"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_mesh_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architectures", nargs="+", metavar="ARCHITECTURE", default=ARCHITECTURES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, help="JSON file (default: tests/benchmarks/results/mesh-memory.json)")
    arguments = parser.parse_args()
    where, found = machine(), []
    for each in _memory(arguments.architectures, arguments.sizes):
        found.append(each)
        path = write_result("mesh-memory", {"machine": where, "meshes": found}, arguments.out)
    for name in arguments.sizes:
        rows = [
            [each["architecture"], str(Layout(each["shards"], each["replicas"])), f"{each['peak'] / 2**20:,.0f}",
             f"{each['predicted'] / 2**20:,.0f}", f"{each['ratio']:.2f}"]
            for each in found if each["size"] == name
        ]  # fmt: skip
        columns = ["", "", "highest peak", "predicted", "peak / predicted"]
        show_table(f"memory of {SIZES[name]}, fp32, MiB", columns, rows)
    console.print(f"{where['cpu']}; wrote {os.path.relpath(path)}")


def _memory(architectures: Sequence[str], sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of each mesh the process whose peak is the highest, and what is predicted, in bytes."""
    with tempfile.TemporaryDirectory(prefix="saescale-memory-") as folder:
        for name in sizes:
            size = SIZES[name]
            group, warm_up = GROUP_NUMBERS // size.d_model, Size(512, size.d_model, 256, 4)
            rng = np.random.default_rng(0)
            directions = rng.normal(size=(DIRECTIONS, size.d_model))
            act = [_rows(rng, count, directions) for count in (ROWS, HELD_OUT)]
            store = write_store(f"{folder}/{name}", *act, group)
            for architecture in architectures:
                for layout in EVERY if architecture == "topk" else SOME:
                    small, job = (_job(folder, store, _cell(store, architecture, of)) for of in (warm_up, size))
                    (peak,) = measure(small, [job], layout=layout)
                    for each in (small, job):
                        shutil.rmtree(each.run)
                    predicted = pack_memory(job.cells, HELD_OUT, StreamSize(group, ROWS), layout=layout).total
                    yield {
                        "architecture": architecture, "size": name, **layout._asdict(), **size._asdict(),
                        "predicted": round(predicted), "peak": peak, "ratio": round(peak / predicted, 3),
                        "load": round(os.getloadavg()[0], 1),
                    }  # fmt: skip


def _rows(rng: np.random.Generator, count: int, directions: np.ndarray) -> np.ndarray:
    """float16 [count, d_model]: two directions each, and a little noise."""
    weights = rng.uniform(0.5, 1.0, size=(count, DIRECTIONS))
    weights *= rng.random((count, DIRECTIONS)).argsort(axis=1) < 2
    return (weights @ directions + 0.05 * rng.normal(size=(count, directions.shape[1]))).astype(np.float16)


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
