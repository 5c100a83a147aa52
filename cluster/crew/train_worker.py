"""What trains packs: a process with one device that takes one pack at a time and answers while it works."""

import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import torch

from saescale.cluster.crew.claims import CPU_SHARE, GPU_SHARE
from saescale.cluster.crew.metrics import WorkerMetrics
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.files import exists, join
from saescale.storage.live import is_source
from saescale.storage.waiting import Wait, waits
from saescale.trainers.device import default_device, fast_precision
from saescale.trainers.kernels.choose import KernelKind, kernel_kind
from saescale.trainers.mesh.distributed import joined
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.mesh.network import meeting_at
from saescale.trainers.precision import Precision
from saescale.trainers.training.job import PackJob
from saescale.trainers.training.report import Progress


class WorkerInfo(NamedTuple):
    """What a worker has for a pack, and where it is."""

    kernels: KernelKind  # what it trains with
    precision: Precision  # what its device is made for
    memory: float  # bytes
    host: str
    pid: int
    node_id: str  # Ray's, hex

    @property
    def name(self) -> str:
        return f"{self.host}/{self.pid}"


class WorkerState(NamedTuple):
    """How far a worker's pack is, the warnings that came up so far, for how long nothing has moved, and what has been
    waited for since some seconds."""

    progress: Progress | None
    notes: tuple[str, ...]
    quiet_s: float
    waits: tuple[Wait, ...] = ()


class Trained(NamedTuple):
    """What became of a pack: rows of results.parquet, and every warning that came up on the way."""

    results: list[dict[str, Any]]
    notes: tuple[str, ...]


class Place(NamedTuple):
    """Of a worker that shares a pack with others: which of them it is."""

    layout: Layout
    rank: int
    deadline_s: float  # that one may keep the others waiting


class Unfit(SaescaleError):
    """The node of a worker lacks what every pack needs; another one may have it."""


class Worker:
    """Runs in its own process and trains one pack at a time; the other methods answer while it does.

    cpus, gpus: what it claims of its node, and with that its share of the node's memory.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        # Only here: the driver, which knows this class too, does without Lightning. And not later: it is up when it can
        # train.
        from saescale.trainers.training.train import train_pack

        self._train_pack = train_pack
        self._cpus, self._gpus = cpus, gpus
        self._progress: Progress | None = None
        self._moved = time.monotonic()
        self._stop = threading.Event()
        self._parted: set[int] = set()
        self._notes: list[str] = []
        warnings.showwarning = self._note
        self._metrics = WorkerMetrics()

    def describe(self) -> WorkerInfo:
        """Answers as soon as the worker is up. Its memory is its GPU's, else its share of its node's."""
        device = default_device()
        node_id = ray.get_runtime_context().get_node_id()
        memory = GPU_SHARE * torch.cuda.mem_get_info()[1] * min(1.0, self._gpus) if device.type == "cuda" else 0.0
        return WorkerInfo(
            kernel_kind(device),
            fast_precision(device),
            memory or self._share(node_id),
            socket.gethostname(),
            os.getpid(),
            node_id,
        )

    def meeting(self) -> str:
        """Where others can meet this worker: tcp://HOST:PORT."""
        return meeting_at(ray.util.get_node_ip_address())

    def train(self, job: PackJob, number: int, place: Place | None = None, meeting: str = "") -> Trained:
        """`train_pack` in this process, or its part of it in this `place` of a mesh whose workers meet at `meeting`.

        Raises what that raises, MeshBroken where another one was lost or hangs, and Unfit where this node lacks the run
        or the store.
        """
        self._metrics.start(job)
        for what, url, there in (
            ("run directory", job.run, exists(join(job.run, "sweep.yaml"))),
            ("activation store", job.store, is_source(job.store)),
        ):
            if not there:
                raise Unfit(
                    f"the node {socket.gethostname()} does not see the {what} {url}; "
                    "give a folder that all nodes share, or an object store (s3://...)"
                )
        self._moved = time.monotonic()
        try:
            with self._group(place, meeting) as group:
                outcome = self._train_pack(
                    job, self._report, lambda: self._stop.is_set() or number in self._parted, group
                )  # fmt: skip
        finally:
            self._progress = None  # or it would be taken for the next pack's
            self._metrics.end()
        return Trained(outcome.results, tuple(self._notes))

    @contextmanager
    def _group(self, place: Place | None, meeting: str) -> Iterator[Group]:
        if place is None:
            yield ONE
            return
        device = default_device()
        own_gpu = device.type == "cuda" and self._gpus >= 1
        with joined(
            place.layout, place.rank, meeting, "nccl" if own_gpu else "gloo", device, place.deadline_s
        ) as group:  # fmt: skip
            yield group

    def state(self) -> WorkerState:
        """Where the pack stands; None before its first step."""
        return WorkerState(self._progress, tuple(self._notes), time.monotonic() - self._moved, tuple(waits()))

    def part(self, number: int) -> None:
        """Asks the pack that `train` was called for with `number` to save its checkpoint and return."""
        self._parted.add(number)

    def stop(self) -> None:
        """Asks the pack, and any that may follow, to save its checkpoint and return."""
        self._stop.set()

    def _share(self, node_id: str) -> float:
        resources: dict[str, float] = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == node_id), {})
        kind, claimed = ("GPU", self._gpus) if self._gpus else ("CPU", self._cpus)
        return CPU_SHARE * resources.get("memory", 4 * 2**30) * min(1.0, claimed / max(1.0, resources.get(kind, 1.0)))

    def _report(self, progress: Progress) -> None:
        self._progress, self._moved = progress, time.monotonic()
        self._metrics.update(progress)

    def _note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, SaescaleWarning) and str(message) not in self._notes:
            self._notes.append(str(message))
