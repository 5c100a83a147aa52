"""Benchmark (b): the quickstart's grid as one pack, the same cells one by one, and the fastest peer cell by cell.

    python -m tests.benchmarks.bench_pack --store stores/smollm2-135m-l22       (of `quickstart --recipe full`)

The first two are train_pack as a sweep runs it, on fewer tokens: reading the store, preprocessing, all steps, one
evaluation on all held-out rows, results written; they take turns. The peer's time is that of its training steps alone,
on inputs that lie preprocessed in memory: the median step of each (N, k) times the number of steps. Of each cell one
saescale step is timed in turn with the peer's, on the same inputs.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saescale.cluster.front.quickstart import full_sweep
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import fast_precision, set_threads
from saescale.trainers.training.train import PackJob, train_pack
from tests.benchmarks.environment import peers_python
from tests.benchmarks.harness import Contender, alternate, console, machine, run, show_table, write_result
from tests.benchmarks.protocol import Size

PEER = "sparsify-adam"  # the fastest of them at every size of bench_step.py


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", default=full_sweep().store, help="default: the quickstart's")
    parser.add_argument("--tokens", type=int, default=32_768, help="that each cell trains on (default: 32,768)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--peers-venv", type=Path, help="an environment that has the peers' libraries")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/pack.json)")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    where, store = machine(), ActivationStore.open(arguments.store)
    cells = _cells(store, arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        pack, alone = (
            _Grid("one pack", [cells], store, folder),
            _Grid("one by one", [[c] for c in cells], store, folder),
        )
        timings = alternate([pack, alone], arguments.rounds, warmup=1)
    steps = _steps(cells, arguments)
    ours = {name: timing.median for name, timing in timings.items()}
    peer = sum(entry[PEER] * cells[0].steps for entry in steps)
    seconds = {**ours, f"{PEER}, cell by cell": peer}
    show_table(
        f"{len(cells)} cells, {arguments.tokens:,} tokens each, {cells[0].precision}",
        ["the quickstart's grid", "seconds", "tokens/s a cell", "one pack is faster by"],
        [
            [name, f"{s:,.1f}", f"{arguments.tokens * len(cells) / s:,.0f}", f"{s / seconds['one pack']:.2f}x"]
            for name, s in seconds.items()
        ],
        "peer: training steps alone, no reading, no evaluation",
    )
    result = {
        "machine": where, "threads": arguments.threads, "tokens": arguments.tokens, "cells": len(cells),
        "precision": cells[0].precision, "seconds": seconds, "steps": steps,
        "rounds": {name: timing.seconds for name, timing in timings.items()},
    }  # fmt: skip
    path = write_result("pack", result, arguments.out)
    console.print(f"wrote {os.path.relpath(path)}")


def _cells(store: ActivationStore, tokens: int) -> list[Cell]:
    """The quickstart's, on fewer tokens."""
    spec = full_sweep()
    spec.train.tokens = tokens
    return spec.cells(store, fast_precision(torch.device("cpu")))


class _Grid(NamedTuple):
    """A way to train the grid: its packs, one after another."""

    name: str
    packs: list[list[Cell]]
    store: ActivationStore
    folder: str

    def step(self) -> float:
        run_folder = f"{self.folder}/{self.name}"
        shutil.rmtree(run_folder, ignore_errors=True)
        began = time.perf_counter()
        for cells in self.packs:
            settings = EvalSpec(every_tokens=cells[0].tokens)
            train_pack(PackJob(cells=cells, store=self.store.url, run=run_folder, sweep="bench", eval=settings))
        return time.perf_counter() - began


def _steps(cells: list[Cell], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each cell the median seconds of saescale's step and of the peer's."""
    python, entries = peers_python(arguments.peers_venv), []
    for cell in cells:
        size = Size(cell.batch_tokens, cell.d_model, cell.n_latents, cell.k)
        ours = f"saescale-{cell.precision}"
        with ExitStack() as stack:
            contenders = [
                stack.enter_context(Contender(name, f"tests.benchmarks.{module}", size, arguments.threads, path))
                for name, module, path in ((ours, "ours", Path(sys.executable)), (PEER, "peers", python))
            ]
            timings = alternate(contenders, arguments.rounds, warmup=2)
        entries.append({"n_latents": cell.n_latents, "k": cell.k} | {n: t.median for n, t in timings.items()})
        console.print(f"{size}: {timings[ours].median * 1e3:,.1f} ms, {PEER} {timings[PEER].median * 1e3:,.1f} ms")
    return entries


if __name__ == "__main__":
    run(main)
