"""A pool of long-lived Ray actors, one device each, that train packs.

Measured: a pooled actor costs 0.07 s a pack where a Tune trial costs 2-5 s and a TorchTrainer 13-30 s.
"""

import logging
import os
import threading
import time
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import ray

from storage.errors import SaescaleError, SaescaleWarning
from trainers.callbacks import Progress
from trainers.device import Precision
from trainers.train import PackJob, PackOutcome

_START_TIMEOUT_S = 300.0


class WorkerInfo(NamedTuple):
    """What a worker has for a pack."""

    device: str
    precision: Precision  # the faster one on its device
    memory: float  # bytes


class WorkerState(NamedTuple):
    """How far a worker's pack is, and the warnings that came up so far."""

    progress: Progress | None
    notes: tuple[str, ...]


class Worker:
    """Runs in its own process and trains one pack at a time; the other methods answer while it does."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._progress: Progress | None = None
        self._stop = threading.Event()
        self._notes: list[str] = []
        warnings.showwarning = self._note

    def describe(self) -> WorkerInfo:
        import torch

        from trainers.device import default_device, fast_precision

        device = default_device()
        memory = float(torch.cuda.mem_get_info()[0]) if device.type == "cuda" else self._memory
        return WorkerInfo(str(device), fast_precision(device), memory)

    def train(self, job: PackJob) -> PackOutcome:
        from trainers.train import train_pack

        self._progress = None
        self._stop.clear()
        return train_pack(job, report=self._report, should_stop=self._stop.is_set)

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    def _note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, SaescaleWarning):
            self._notes.append(str(message))

    def state(self) -> WorkerState:
        return WorkerState(self._progress, tuple(self._notes))

    def stop(self) -> None:
        """Asks the pack to save its checkpoint and return."""
        self._stop.set()


class Pool:
    """Connects to Ray (a cluster at `address`, else a local one of its own) and keeps `workers` actors.

    threads: CPU threads of each worker. One apiece when there are as many workers as cores: two processes of two
    threads on two cores collapse.
    """

    def __init__(
        self, cells: int, workers: int | str = "auto", gpus_per_worker: float | str = "auto", address: str | None = None
    ) -> None:
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(address)
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
        self.threads = threads_for(
            [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]], count
        )
        # Claimed in full, so that Ray spreads the workers over the nodes.
        self._cpus = float(self.threads) if count <= cpus else cpus / count
        self._memory = 0.8 * resources.get("memory", 4 * 2**30) / count
        self.workers: list[Any] = [self.start_worker() for _ in range(count)]
        try:
            self.infos: list[WorkerInfo] = ray.get(
                [worker.describe.remote() for worker in self.workers], timeout=_START_TIMEOUT_S
            )
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            self.close()
            raise SaescaleError(
                f"no {count} workers came up on the Ray cluster within {_START_TIMEOUT_S:.0f} s ({error}); "
                "check its free CPUs and GPUs (`ray status`) or ask for fewer (resources.workers)"
            ) from error

    def start_worker(self) -> Any:
        """A new actor, in place of one that died or at the start."""
        # Four threads: one trains, the others answer state, stop and describe meanwhile.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4}
        return ray.remote(Worker).options(**options).remote(self._memory)

    @property
    def precision(self) -> Precision:
        """The precision that is fast on every worker."""
        return "bf16" if all(info.precision == "bf16" for info in self.infos) else "fp32"

    @property
    def memory(self) -> float:
        """Bytes that the smallest worker has."""
        return min(info.memory for info in self.infos)

    @property
    def dense(self) -> bool:
        """Whether any worker trains by the dense reference: the sparse path runs on CPUs."""
        return any(info.device != "cpu" for info in self.infos)

    def close(self) -> None:
        """Ends the workers, and Ray where this pool started or joined it."""
        for worker in getattr(self, "workers", []):
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
    # Without an address Ray would join any cluster that happens to run on this machine.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    started = time.monotonic()
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SaescaleError(
            f"could not reach {where} after {time.monotonic() - started:.0f} s: {reason}; "
            "check the address and that the cluster is up (`ray status`)"
        ) from error
