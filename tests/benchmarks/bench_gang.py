"""Benchmark (n): what starts the processes of a mesh and starts them again: the crew's actors as a gang, or Ray Train.

    pip install "ray[train]"
    python -m tests.benchmarks.bench_gang

One small cell of two shards on a Ray of its own, trained by the same `train_pack` in both. Seconds until the first step
lies in a checkpoint: with new processes; with those that are up already, as the crew keeps them and Ray Train does not;
and from the SIGKILL of one process to the first step beyond what there was. Both are seen from outside, by their files.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

import numpy as np
import ray
import torch

from saescale.cluster.crew.train_worker import Place, Worker
from saescale.storage import checkpoint
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.mesh.distributed import joined
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.train import PackJob, train_pack
from tests.benchmarks.harness import BenchmarkError, console, machine, run, show_table, write_result
from tests.trainers.synthetic import write_store

LAYOUT, DEADLINE_S = Layout(2), 60.0
BATCH, D_MODEL, N, K = 256, 64, 512, 8
STEPS = 10**6  # more than it will ever make
POLL_S, PATIENCE_S = 0.02, 180.0


class Starter(Protocol):
    """Trains a job by two processes, and goes on when one was lost."""

    def begin(self, job: PackJob) -> None: ...
    def pid(self) -> int: ...
    def end(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_gang",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file (default: tests/benchmarks/results/gang.json)")
    arguments = parser.parse_args()
    try:
        import ray.train
    except ImportError as error:
        raise BenchmarkError('Ray Train lacks what it needs: pip install "ray[train]"') from error
    where, seconds = machine() | {"ray": ray.__version__}, {}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory(prefix="saescale-gang-") as folder:
            store = _store(folder)
            for number in range(arguments.rounds):
                for name, starter in (("gang", Gang()), ("ray_train", Train(f"{folder}/train-{number}"))):
                    for what, took in _round(starter, store, f"{folder}/{name}-{number}").items():
                        seconds.setdefault(name, {}).setdefault(what, []).append(took)
    finally:
        ray.shutdown()
    path = write_result("gang", {"machine": where, "seconds": seconds}, arguments.out)
    names = list(seconds["gang"])
    rows = [
        [name, *(_spread(seconds[name].get(what)) for what in names)] for name in seconds
    ]  # fmt: skip
    show_table("seconds to the first step, median (least to most)", ["", *names], rows)
    console.print(f"{where['cpu']}; wrote {os.path.relpath(path)}")


def _spread(took: list[float] | None) -> str:
    return f"{statistics.median(took):.1f} ({min(took):.1f} to {max(took):.1f})" if took else "-"


def _round(starter: Starter, store: str, folder: str) -> dict[str, float]:
    found = {}
    try:
        job = _job(store, f"{folder}-new")
        found["new processes"] = _until(lambda: starter.begin(job), job, 1)
        reached = _reached(job)
        found["after SIGKILL of one"] = _until(lambda: os.kill(starter.pid(), signal.SIGKILL), job, reached + 1)
        if isinstance(starter, Gang):
            starter.rest()
            job = _job(store, f"{folder}-again")
            found["processes that are up"] = _until(lambda: starter.begin(job), job, 1)
    finally:
        starter.end()
    return found


def _until(begin: Callable[[], None], job: PackJob, step: int) -> float:
    began = time.monotonic()
    begin()
    while _reached(job) < step:
        if time.monotonic() - began > PATIENCE_S:
            raise BenchmarkError(f"no step {step} within {PATIENCE_S} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


def _reached(job: PackJob) -> int:
    """The newest step that lies in a checkpoint."""
    folder = RunDirectory(job.run).checkpoint_url(job.cells[0].cell_id)
    return max(checkpoint.steps(folder), default=0)


def _store(folder: str) -> str:
    rng = np.random.default_rng(0)
    act = [rng.normal(size=(rows, D_MODEL)).astype(np.float16) for rows in (8_192, 512)]
    return write_store(f"{folder}/store", *act)


def _job(store: str, folder: str) -> PackJob:
    cell = Cell(
        store=ActivationStore.open(store).identity, d_model=D_MODEL, n_latents=N, k=K, tokens=STEPS * BATCH,
        batch_tokens=BATCH, lr=1e-3, dead_after_tokens=BATCH,
    )  # fmt: skip
    RunDirectory(folder).write_spec({"name": "gang", "grid": {}})
    return PackJob(
        cells=[cell], store=store, run=folder, sweep="gang", threads=1, checkpoint_every_s=1e-6,
        eval=EvalSpec(tokens=512, every_tokens=STEPS * BATCH),
    )  # fmt: skip


class Gang:
    """As the driver has it: actors of the crew, and a new one in the place of one that was lost."""

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self._ended, self._thread, self._number = threading.Event(), threading.Thread(), 0

    def begin(self, job: PackJob) -> None:
        self._ended, self._number = threading.Event(), self._number + 1
        self._thread = threading.Thread(target=self._drive, args=(job,), daemon=True)
        self._thread.start()

    def _drive(self, job: PackJob) -> None:
        while not self._ended.is_set():
            while len(self.workers) < LAYOUT.ranks:
                self.workers.append(_actor())
            ray.get([worker.describe.remote() for worker in self.workers])
            meeting = self.workers[0].meeting.remote()
            running = {
                worker.train.remote(job, self._number, Place(LAYOUT, rank, DEADLINE_S), meeting): worker
                for rank, worker in enumerate(self.workers)
            }
            while running:
                (ended,), _ = ray.wait(list(running), num_returns=1)
                worker = running.pop(ended)
                try:
                    ray.get(ended)
                except ray.exceptions.RayActorError:
                    if self._ended.is_set():
                        return
                    self.workers.remove(worker)
                    # At once, while the others find out.
                    self.workers.append(_actor())
                except ray.exceptions.RayTaskError:
                    pass

    def pid(self) -> int:
        return int(ray.get(self.workers[1].describe.remote()).pid)

    def rest(self) -> None:
        """Ends the training; the processes stay."""
        self._ended.set()
        for worker in self.workers:
            worker.part.remote(self._number)
        self._thread.join(PATIENCE_S)

    def end(self) -> None:
        self._ended.set()
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []


def _actor() -> Any:
    # Threads beside the one that trains: it is asked things meanwhile.
    return ray.remote(Worker).options(num_cpus=1, max_concurrency=4).remote(1, 0)


class Train:
    """Ray Train V2, which starts a group of workers again when one is lost."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        Path(folder).mkdir(parents=True)
        self._thread = threading.Thread()

    def begin(self, job: PackJob) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        trainer = DataParallelTrainer(
            _loop,
            train_loop_config={"job": job.model_dump(), "folder": self.folder},
            scaling_config=ScalingConfig(num_workers=LAYOUT.ranks, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="gang", storage_path=self.folder, failure_config=FailureConfig(max_failures=3)
            ),
        )  # fmt: skip
        self._thread = threading.Thread(target=trainer.fit, daemon=True)
        self._thread.start()

    def pid(self) -> int:
        return int(Path(self.folder, "pid-1").read_text())

    def end(self) -> None:
        Path(self.folder, "stop").touch()
        self._thread.join(PATIENCE_S)


def _loop(config: dict[str, Any]) -> None:
    """What each of its workers does."""
    import socket

    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    folder, rank = Path(config["folder"]), get_context().get_world_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    with socket.socket() as free:
        free.bind(("", 0))
        own = f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    meeting = broadcast_from_rank_zero(own)
    with joined(LAYOUT, rank, meeting, "gloo", torch.device("cpu"), DEADLINE_S) as group:
        train_pack(PackJob.model_validate(config["job"]), should_stop=(folder / "stop").exists, group=group)


if __name__ == "__main__":
    run(main)
