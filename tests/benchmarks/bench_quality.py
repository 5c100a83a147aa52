"""Benchmark (b), the other half: held-out nmse after the same tokens, saescale beside the fastest peer and fp32.

    python -m tests.benchmarks.bench_quality --store stores/smollm2-135m-l22    (of `quickstart --recipe full`)

One cell of the quickstart's grid is trained by saescale in bf16 and fp32, by the dense reference in fp32 (autograd;
tests/trainers/dense_training.py), and by sparsify's own trainer with Adam, on the same rows in four passes: at its
default learning rate, which is meant for longer training, and at multiples of it. All are judged alike: dense float32
evaluation of the final weights (saescale's are averaged ones, as in a sweep) on all held-out rows.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saescale.cluster.front.quickstart import full_sweep
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import set_threads
from saescale.trainers.exchange import native
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.training.train import PackJob, train_pack
from tests.benchmarks.environment import peers_python
from tests.benchmarks.harness import (
    ALIKE,
    NO_GPU,
    QUIET,
    ROOT,
    console,
    machine,
    run,
    show_table,
    slow_bf16,
    write_result,
)
from tests.trainers.dense_training import dense_nmse, train_dense


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", default=full_sweep().store, help="default: the quickstart's")
    parser.add_argument("--n-latents", type=int, default=1024, help="default: 1024")
    parser.add_argument("--k", type=int, default=32, help="default: 32")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 6, 24], help="multiples of sparsify's default")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--peers-venv", type=Path, help="an environment that has the peers' libraries")
    parser.add_argument("--out", type=Path, help="JSON to write (default: tests/benchmarks/results/quality.json)")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    reason = slow_bf16()
    left_out = {"saescale bf16": reason} if reason else {}
    for name in left_out:
        console.print(f"{name} is left out: {reason}")
    where, store = machine(), ActivationStore.open(arguments.store)
    spec = full_sweep()
    spec.grid.n_latents, spec.grid.k = [arguments.n_latents], [arguments.k]
    cell, held_out = spec.cells(store, "fp32")[0], spec.eval.tokens
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        precisions: tuple[Precision, ...] = ("fp32",) if left_out else ("bf16", "fp32")
        for precision in precisions:
            found[f"saescale {precision}"] = _ours(store, cell, precision, held_out, f"{folder}/{precision}")
            console.print(found)
        dense = train_dense(store, cell, held_out)
        found["dense reference fp32"] = {"nmse": dense.nmse, "dead_fraction": dense.dead_fraction}
        _write_rows(store, cell, f"{folder}/rows.npy")
        for times in arguments.rates:
            found[f"sparsify, lr x {times:g}"] = _peer(store, cell, times, held_out, folder, arguments)
            console.print(found)
    base = found["dense reference fp32"]["nmse"]
    show_table(
        f"{cell.cell_id}: {cell.tokens:,} tokens in batches of {cell.batch_tokens:,}, {held_out:,} rows held out",
        ["trained by", "nmse", "against dense fp32", "dead"],
        [
            [name, f"{f['nmse']:.4f}", f"{f['nmse'] / base - 1:+.2%}",
             f"{f['dead_fraction']:.2%}" if "dead_fraction" in f else "-"]
            for name, f in found.items()
        ],
    )  # fmt: skip
    path = write_result(
        "quality", {"machine": where, "cell": cell.model_dump(), "left_out": left_out, "found": found}, arguments.out
    )
    console.print(f"wrote {os.path.relpath(path)}")


def _ours(store: ActivationStore, cell: Cell, precision: Precision, held_out: int, folder: str) -> dict[str, Any]:
    cell = Cell.model_validate(cell.model_dump() | {"precision": precision})
    settings = EvalSpec(tokens=held_out, every_tokens=cell.tokens)
    result = train_pack(PackJob(cells=[cell], store=store.url, run=folder, sweep="bench", eval=settings)).results[0]
    sae = native.read(RunDirectory(folder).cell_url(cell.cell_id)).sae
    return {
        "nmse": dense_nmse(sae, store, held_out), "nmse_reported": result["nmse"],
        "dead_fraction": result["dead_fraction"],
    }  # fmt: skip


def _write_rows(store: ActivationStore, cell: Cell, path: str) -> None:
    """One pass over the training rows in the stream's order, preprocessed."""
    batches = store.rows("train") // cell.batch_tokens
    with Stream(store, batch_tokens=cell.batch_tokens, seed=cell.stream_seed, batches=batches) as stream:
        np.save(path, np.concatenate([normalise(to_tensor(batch.x, store.dtype)).numpy() for batch in stream]))


def _peer(
    store: ActivationStore, cell: Cell, times: float, held_out: int, folder: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    lr = times * 2e-4 / (cell.n_latents / 2**14) ** 0.5  # sparsify's rule for Adam
    size = (cell.batch_tokens, cell.n_latents, cell.k, cell.steps, lr)
    subprocess.run(
        [peers_python(arguments.peers_venv), "-m", "tests.benchmarks.peers_train", f"{folder}/rows.npy",
         *map(str, size), f"{folder}/peer.npz", "--threads", str(arguments.threads)],
        cwd=folder, env=os.environ | QUIET | ALIKE | NO_GPU | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True,
    )  # fmt: skip
    with np.load(f"{folder}/peer.npz") as trained:
        params = {name: torch.from_numpy(trained[name]) for name in trained}
    sae = SAE("topk", Shape(cell.d_model, cell.n_latents), cell.whole_settings, params)
    return {"nmse": dense_nmse(sae, store, held_out), "lr": lr}


if __name__ == "__main__":
    run(main)
