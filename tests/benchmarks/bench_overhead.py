"""What Ray and Lightning cost a sweep, and whether its driver's memory grows with tokens.

    python -m tests.benchmarks.bench_overhead           (store: `quickstart --recipe full`)

Two ways to train the same cells as one pack, in turns, each in a process of its own and with all cores: `run_sweep`,
with a local Ray, one worker and Lightning's loop; and a plain loop over the same stream, steps, evaluations and
checkpoints, with neither. Compared are the seconds between the first batch that could be asked for and the last result;
what starting Ray and a worker takes is told apart, since it does not grow with the sweep.

Then the resident memory of the driver is read while it drives two sweeps, the second of sixteen times the tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import lightning.pytorch as L
import psutil

from saescale.cluster.front.quickstart import full_sweep
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from saescale.trainers.device import default_device, fast_precision, set_threads
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.loggers.interface import NoLogger
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.training.after_batch import AfterBatch
from saescale.trainers.training.checkpoints import Checkpoints
from saescale.trainers.training.evaluate import Evaluator
from saescale.trainers.training.pack import Pack, RawBatch
from saescale.trainers.training.report import Reporter
from saescale.trainers.training.results import Provenance, Records
from saescale.trainers.training.train import measured_centre
from tests.benchmarks.harness import ROOT, BenchmarkError, console, machine, quartiles, run, show_table, write_result
from tests.trainers.synthetic import sparse_rows, write_store

GRID = {"n_latents": [1024, 2048, 4096], "k": [16, 32]}
CHECKPOINT_S = 60.0


def main() -> None:
    arguments = _arguments()
    if arguments.turn:
        print(json.dumps(_TURNS[arguments.turn](parse_spec(json.loads(arguments.spec), "the benchmark"))))
        return
    where = machine()
    spec = _spec(arguments.store, arguments.tokens)
    found: dict[str, list[dict[str, float]]] = {"sweep": [], "plain": []}
    for _ in range(arguments.rounds):
        for turn, outcomes in found.items():
            outcomes.append(_turn(turn, spec))
            console.print(f"{turn}: " + ", ".join(f"{name} {value:,.1f}" for name, value in outcomes[-1].items()))
    ratios = [s["training_s"] / p["training_s"] for s, p in zip(found["sweep"], found["plain"], strict=True)]
    memory = _memory(arguments.memory_tokens)
    starting = quartiles([s["starting_s"] for s in found["sweep"]])[1]
    show_table(
        f"{len(GRID['n_latents']) * len(GRID['k'])} cells, {arguments.tokens:,} tokens each, as one pack",
        ["", "seconds of training", "of the plain loop"],
        [
            [name, f"{quartiles([o['training_s'] for o in outcomes])[1]:.1f}", f"{ratio:.3f}"]
            for (name, outcomes), ratio in zip(found.items(), (quartiles(ratios)[1], 1.0), strict=True)
        ],
        f"medians of {arguments.rounds} rounds; starting Ray and the worker: {starting:.1f} s more",
    )
    show_table(
        "Resident memory of the driver",
        ["tokens a cell", "at the first progress, MB", "at the last, MB"],
        [[f"{m['tokens']:,}", f"{m['first_mb']:.0f}", f"{m['last_mb']:.0f}"] for m in memory],
    )
    result = {
        "machine": where,
        "tokens": arguments.tokens,
        "grid": GRID,
        "turns": found,
        "ratio": ratios,
        "memory": memory,
    }
    console.print(f"wrote {os.path.relpath(write_result('overhead', result, arguments.out))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", default=full_sweep().store, help="default: the quickstart's")
    parser.add_argument("--tokens", type=int, default=524_288, help="that each cell trains on (default: 524,288)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--memory-tokens", type=int, default=65_536, help="of the smaller of two (default: 65,536)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/overhead.json)")
    parser.add_argument("--turn", choices=list(_TURNS), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    return parser.parse_args()


def _spec(store: str, tokens: int) -> dict[str, Any]:
    spec = full_sweep().model_dump(mode="json") | {"store": str(Path(store).absolute())}
    spec["grid"] = GRID
    spec["train"]["tokens"] = tokens
    spec["eval"]["every_tokens"] = tokens // 4
    spec["resources"] = {"workers": 1, "checkpoint_every_s": CHECKPOINT_S}
    return spec


def _turn(turn: str, spec: dict[str, Any]) -> dict[str, float]:
    """The outcome of one turn, made in a process of its own and a run directory that is not kept."""
    with tempfile.TemporaryDirectory(prefix="saescale-") as folder:
        given = json.dumps(spec | {"out": str(Path(folder, "run"))})
        command = [sys.executable, "-m", "tests.benchmarks.bench_overhead", "--turn", turn, "--spec", given]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": ""}, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{turn} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    # Ray may have something to say as well.
    outcome: dict[str, float] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return outcome


class _Clock:
    """A display that notes when the training began and ended, and how much memory this process had."""

    def __init__(self) -> None:
        self.began = self.first = self.last = time.perf_counter()
        self.memory: list[float] = []

    def stage(self, text: str) -> None:
        if text.startswith("training"):
            self.first = time.perf_counter()

    def sweep(self, standing: Standing) -> None:
        self.last = time.perf_counter()  # the last time is when the last result is in
        if standing.workers:
            self.memory.append(psutil.Process().memory_info().rss / 1e6)

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None:
        """Not a part of what is timed here."""


class _Sweep(NamedTuple):
    starting_s: float
    training_s: float
    first_mb: float
    last_mb: float


def _sweep(spec: SweepSpec) -> dict[str, float]:
    clock = _Clock()
    run_sweep(spec, clock, settings=FitSettings(0))
    return _Sweep(clock.first - clock.began, clock.last - clock.first, clock.memory[0], clock.memory[-1])._asdict()


def _plain(spec: SweepSpec) -> dict[str, float]:
    """train_pack without Lightning, in this process: the same parts, called one after another."""
    set_threads(os.cpu_count() or 1)
    store, device, out = ActivationStore.open(spec.store), default_device(), RunDirectory(spec.out)
    cells = spec.cells(store, fast_precision(device))
    began = time.perf_counter()
    with measured_centre(store, cells[0]) as centre:
        pack = Pack(cells, centre, device)
    steps = max(cell.steps for cell in cells)
    trainer = cast(L.Trainer, SimpleNamespace(should_stop=False))
    with Stream(store, batch_tokens=cells[0].batch_tokens, seed=cells[0].stream_seed, batches=steps) as stream:
        held_out = HeldOut(store, spec.eval.tokens, device)
        after = AfterBatch(
            Evaluator(held_out, spec.eval.every_tokens),
            Records(out, Provenance.of(store, spec.eval.tokens), NoLogger()),
            Reporter(lambda progress: None, 0, stream),
            Checkpoints(out, spec.resources.checkpoint_every_s, stream, 0),
            lambda: False,
        )
        after.on_train_start(trainer, pack)
        for index, batch in enumerate(stream):
            pack.training_step(RawBatch(to_tensor(batch.x, store.dtype)), index)
            after.on_train_batch_end(trainer, pack)
    return {"training_s": time.perf_counter() - began}


def _memory(tokens: int) -> list[dict[str, float]]:
    """Of a driver while it drives a sweep of small cells on `tokens` tokens each, and one on sixteen times as many."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="saescale-") as folder:
        url = write_store(str(Path(folder, "store")), sparse_rows(16_384, seed=0), sparse_rows(2_048, seed=1))
        for times in (1, 16):
            spec = {
                "name": "memory", "store": url, "out": "", "wandb": {"mode": "off"},
                "grid": {"n_latents": [64, 128, 256], "k": [2, 4, 8]},
                "train": {"tokens": tokens * times, "batch_tokens": 256, "lr": 1e-3},
                "eval": {"tokens": 2_048, "every_tokens": tokens * times // 8},
                "resources": {"workers": 1},
            }  # fmt: skip
            outcome = _turn("sweep", spec)
            outcomes.append({"tokens": tokens * times} | {n: outcome[n] for n in ("first_mb", "last_mb")})
    return outcomes


_TURNS = {"sweep": _sweep, "plain": _plain}


if __name__ == "__main__":
    run(main)
