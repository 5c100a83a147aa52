"""A pool of long-lived Ray actors, one device each, that train packs.

A pool costs less than a Ray Tune trial or a TorchTrainer for each pack: imports and start-up are paid once.
"""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import ray
import torch

from cluster.metrics import WorkerMetrics
from cluster.plan import Needs
from storage.activations import ActivationStore
from storage.errors import SaescaleError, SaescaleWarning, one_line
from storage.rundir import RunDirectory
from trainers.callbacks import Progress
from trainers.cell import Precision
from trainers.device import default_device, fast_precision
from trainers.memory import PROCESS_BYTES, StreamSize, pack_memory
from trainers.sparse import KernelKind, kernel_kind
from trainers.train import PackJob, train_pack

_START_TIMEOUT_S = 300.0


class WorkerInfo(NamedTuple):
    """What a worker has for a pack."""

    kernels: KernelKind  # what it trains with
    precision: Precision  # the faster one on its device
    memory: float  # bytes


class WorkerState(NamedTuple):
    """How far a worker's pack is, and the warnings that came up so far."""

    progress: Progress | None
    notes: tuple[str, ...]


class Trained(NamedTuple):
    """What became of a pack: rows of results.parquet, and every warning that came up on the way."""

    results: list[dict[str, Any]]
    notes: tuple[str, ...]


class Worker:
    """Runs in its own process and trains one pack at a time; the other methods answer while it does."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._progress: Progress | None = None
        self._stop = threading.Event()
        self._notes: list[str] = []
        warnings.showwarning = self._note
        self._metrics = WorkerMetrics()

    def describe(self) -> WorkerInfo:
        """Answers as soon as the worker is up. Its memory is its GPU's, else its share of the cluster's."""
        device = default_device()
        memory = float(torch.cuda.mem_get_info()[0]) if device.type == "cuda" else self._memory
        return WorkerInfo(kernel_kind(device), fast_precision(device), memory)

    def train(self, job: PackJob) -> Trained:
        """`train_pack` in this process. Raises what it raises, and SaescaleError where this node lacks the run."""
        self._metrics.start(job)
        if RunDirectory(job.run).read_spec() is None:
            raise SaescaleError(
                f"the node {socket.gethostname()} does not see the run directory {job.run}; "
                "give a folder that all nodes share, or an object store (s3://...)"
            )
        try:
            outcome = train_pack(job, report=self._report, should_stop=self._stop.is_set)
        finally:
            self._progress = None  # or it would be taken for the next pack's
            self._metrics.end()
        return Trained(outcome.results, tuple(self._notes))

    def state(self) -> WorkerState:
        """Where the pack stands; None before its first step."""
        return WorkerState(self._progress, tuple(self._notes))

    def stop(self) -> None:
        """Asks the pack, and any that may follow, to save its checkpoint and return."""
        self._stop.set()

    def _report(self, progress: Progress) -> None:
        self._metrics.update(progress)
        self._progress = progress

    def _note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, SaescaleWarning):
            self._notes.append(str(message))


class Pool:
    """Connects to Ray (a cluster at `address`, else a local one of its own) and starts `workers` actors.

    `ready` are the workers that came up; `starting` maps the reference of `describe()` to those that did not yet.
    threads: CPU threads of each worker. One apiece when there are as many workers as cores: two processes of two
    threads on two cores collapse. Raises SaescaleError when Ray cannot be reached or no worker comes up.
    """

    def __init__(
        self, cells: int, workers: int | str = "auto", gpus_per_worker: float | str = "auto", address: str | None = None
    ) -> None:
        self._workers: list[Any] = []
        self._owns_ray = not ray.is_initialized()
        try:
            if self._owns_ray:
                _connect(address)
            count = self._size(cells, workers, gpus_per_worker)
            described = [self.start_worker() for _ in range(count)]
            self.starting = {reference: worker for worker, reference in described}
            self.ready: list[Any] = []
            self._infos: list[WorkerInfo] = []
            self._wait(count)
        except BaseException:
            self.close()
            raise

    def _size(self, cells: int, workers: int | str, gpus_per_worker: float | str) -> int:
        """How many workers, and what each claims."""
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0.0)
        self._gpus = (1.0 if gpus else 0.0) if isinstance(gpus_per_worker, str) else gpus_per_worker
        slots = int(gpus / self._gpus) if self._gpus else cpus
        count = max(1, min(cells, slots)) if isinstance(workers, str) else workers
        if self._gpus and count * self._gpus > gpus:
            raise SaescaleError(
                f"{count} workers with {self._gpus:g} GPUs each, but the cluster has {gpus:g} GPUs; "
                "ask for fewer (resources.workers) or a smaller share (resources.gpus_per_worker)"
            )
        self.threads = threads_for([int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]], count)
        # Claimed in full, so that Ray spreads the workers over the nodes.
        self._cpus = float(self.threads) if count <= cpus else cpus / count
        self._memory = 0.8 * resources.get("memory", 4 * 2**30) / count
        return count

    def _wait(self, count: int) -> None:
        """Until all workers are up, or some are and the rest takes too long."""
        references = list(self.starting)
        up, _ = ray.wait(references, num_returns=count, timeout=_START_TIMEOUT_S)
        failure = "the cluster has no free CPUs or GPUs for one"
        for reference in up:
            worker = self.starting.pop(reference)
            try:
                self._infos.append(ray.get(reference))
                self.ready.append(worker)
            except ray.exceptions.RayError as error:
                failure = one_line(error)[:300]
        if not self.ready:
            raise SaescaleError(
                f"none of {count} workers came up on the Ray cluster within {_START_TIMEOUT_S:.0f} s: {failure}; "
                "look at `ray status`, or ask for fewer (resources.workers)"
            )

    def start_worker(self) -> tuple[Any, Any]:
        """A new actor, and the reference of its `describe()`, which is ready when the actor is."""
        # Four threads: one trains, the others answer state, stop and describe meanwhile.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4}
        worker: Any = ray.remote(Worker).options(**options).remote(self._memory)
        self._workers.append(worker)
        return worker, worker.describe.remote()

    @property
    def precision(self) -> Precision:
        """The precision that is fast on every worker."""
        return "bf16" if all(info.precision == "bf16" for info in self._infos) else "fp32"

    @property
    def memory(self) -> float:
        """Bytes that the smallest worker has."""
        return min(info.memory for info in self._infos)

    def needs(self, store: ActivationStore, eval_tokens: int, remote_run: bool) -> Needs:
        """What a pack over `store` takes of the memory of whichever worker needs the most for it, the process itself
        included where that shares it."""
        kinds = sorted({info.kernels for info in self._infos})
        stream = StreamSize(store.manifest.row_group_rows, store.rows("train"))
        return lambda cells: max(
            pack_memory(cells, eval_tokens, stream, kind, remote_run).total + (PROCESS_BYTES if kind == "cpu" else 0)
            for kind in kinds
        )

    def close(self) -> None:
        """Ends the workers, and Ray where this pool started or joined it."""
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
            if self._owns_ray:
                ray.shutdown()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def threads_for(cores: list[int], workers: int) -> int:
    """The most threads that each of `workers` can have on nodes with so many `cores`; at least 1."""
    return next((t for t in range(max(cores), 1, -1) if sum(c // t for c in cores) >= workers), 1)


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    # Checkpoints and results go through the run directory, so the object store carries next to nothing.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    started, at_terminate = time.monotonic(), signal.getsignal(signal.SIGTERM)
    try:
        # Without an address Ray would join any cluster that happens to run on this machine.
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise SaescaleError(
            f"could not reach {where} after {time.monotonic() - started:.0f} s: {one_line(error)}; "
            "check the address and that the cluster is up (`ray status`)"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would leave at once, before the workers have saved their checkpoints.
        signal.signal(signal.SIGTERM, at_terminate)
