"""A pool of long-lived Ray actors, one device each, that train packs.

A pool costs less than a Ray Tune trial or a TorchTrainer for each pack: imports and start-up are paid once.
"""

import os
import signal
import socket
import threading
import time
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from saescale.cluster.crew.connect import connect
from saescale.cluster.crew.metrics import WorkerMetrics
from saescale.cluster.crew.shares import cpus_each
from saescale.cluster.sweep.packing import Needs
from saescale.cluster.sweep.spec import Resources
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.files import exists, join
from saescale.storage.manifest import MANIFEST
from saescale.storage.store import ActivationStore
from saescale.trainers.device import default_device, fast_precision
from saescale.trainers.kernels.choose import KernelKind, kernel_kind
from saescale.trainers.precision import Precision
from saescale.trainers.training.memory import PROCESS_BYTES, StreamSize, pack_memory
from saescale.trainers.training.report import Progress
from saescale.trainers.training.train import PackJob, train_pack

_GPU_SHARE = 0.95  # of a GPU's memory; the rest is CUDA's own
_START_TIMEOUT_S = 900.0  # until the first worker is up; an autoscaler may have to find a machine for it
MAX_STARTS = 4  # that fail one after another before fewer workers have to do
_COMPANY_S = 15.0  # more, for those that start with it


class WorkerInfo(NamedTuple):
    """What a worker has for a pack, and where it is."""

    kernels: KernelKind  # what it trains with
    precision: Precision  # the faster one on its device
    memory: float  # bytes
    host: str
    pid: int
    node_id: str  # Ray's, hex

    @property
    def name(self) -> str:
        return f"{self.host}/{self.pid}"


class WorkerState(NamedTuple):
    """How far a worker's pack is, the warnings that came up so far, and for how long nothing has moved."""

    progress: Progress | None
    notes: tuple[str, ...]
    quiet_s: float


class Trained(NamedTuple):
    """What became of a pack: rows of results.parquet, and every warning that came up on the way."""

    results: list[dict[str, Any]]
    notes: tuple[str, ...]


class Unfit(SaescaleError):
    """The node of a worker lacks what every pack needs; another one may have it."""


class Worker:
    """Runs in its own process and trains one pack at a time; the other methods answer while it does.

    cpus, gpus: what it claims of its node, and with that its share of the node's memory.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
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
        memory = _GPU_SHARE * torch.cuda.mem_get_info()[1] * min(1.0, self._gpus) if device.type == "cuda" else 0.0
        return WorkerInfo(
            kernel_kind(device),
            fast_precision(device),
            memory or self._share(node_id),
            socket.gethostname(),
            os.getpid(),
            node_id,
        )

    def train(self, job: PackJob, number: int) -> Trained:
        """`train_pack` in this process. Raises what it raises, and Unfit where this node lacks the run or the store."""
        self._metrics.start(job)
        for what, url, file in (("run directory", job.run, "sweep.yaml"), ("activation store", job.store, MANIFEST)):
            if not exists(join(url, file)):
                raise Unfit(
                    f"the node {socket.gethostname()} does not see the {what} {url}; "
                    "give a folder that all nodes share, or an object store (s3://...)"
                )
        self._moved = time.monotonic()
        try:
            outcome = train_pack(job, self._report, lambda: self._stop.is_set() or number in self._parted)
        finally:
            self._progress = None  # or it would be taken for the next pack's
            self._metrics.end()
        return Trained(outcome.results, tuple(self._notes))

    def state(self) -> WorkerState:
        """Where the pack stands; None before its first step."""
        return WorkerState(self._progress, tuple(self._notes), time.monotonic() - self._moved)

    def part(self, number: int) -> None:
        """Asks the pack that `train` was called for with `number` to save its checkpoint and return."""
        self._parted.add(number)

    def stop(self) -> None:
        """Asks the pack, and any that may follow, to save its checkpoint and return."""
        self._stop.set()

    def _share(self, node_id: str) -> float:
        resources: dict[str, float] = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == node_id), {})
        kind, claimed = ("GPU", self._gpus) if self._gpus else ("CPU", self._cpus)
        return 0.8 * resources.get("memory", 4 * 2**30) * min(1.0, claimed / max(1.0, resources.get(kind, 1.0)))

    def _report(self, progress: Progress) -> None:
        self._progress, self._moved = progress, time.monotonic()
        self._metrics.update(progress)

    def _note(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, SaescaleWarning) and str(message) not in self._notes:
            self._notes.append(str(message))


class Pool:
    """Connects to Ray (a cluster at `address`, else a local one of its own) and starts worker actors.

    Workers that find no room yet stay queued in Ray, where an autoscaler sees what they ask for. `ready` are the
    workers that are up; `starting` maps the reference of `describe()` to those that are not. threads: CPU threads of
    each worker. One apiece when there are as many workers as cores: two processes of two threads on two cores collapse.
    Raises SaescaleError when Ray cannot be reached or no worker comes up.
    """

    def __init__(self, cells: int, resources: Resources, address: str | None = None) -> None:
        self._workers: list[Any] = []
        self._owns_ray = not ray.is_initialized()
        self._grows = resources.workers == "auto"
        self._local = self._owns_ray and not (address or os.environ.get("RAY_ADDRESS"))
        self._cells = cells
        try:
            if self._owns_ray:
                connect(address)
            self.count = self._size(resources)
            described = [self.start_worker() for _ in range(self.count)]
            self.starting = {reference: worker for worker, reference in described}
            self.ready: dict[Any, WorkerInfo] = {}
            self._wait()
        except BaseException:
            self.close()
            raise

    def _size(self, asked: Resources) -> int:
        """How many workers, and what each claims."""
        resources = ray.cluster_resources()
        cpus, gpus = max(1, int(resources.get("CPU", 1))), resources.get("GPU", 0.0)
        self._gpus = (1.0 if gpus else 0.0) if isinstance(asked.gpus_per_worker, str) else asked.gpus_per_worker
        given = 0.0 if isinstance(asked.cpus_per_worker, str) else asked.cpus_per_worker
        room = int(gpus / self._gpus) if self._gpus else int(cpus / (given or 1.0))
        count = max(1, min(self._cells, room)) if isinstance(asked.workers, str) else asked.workers
        if count > room and (self._gpus or given):
            self._no_room(count, room)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._cpus = given or cpus_each(nodes, count, self._gpus)
        self.threads = max(1, int(self._cpus))
        return count

    def _no_room(self, count: int, room: int) -> None:
        """More workers than there is room for: on a cluster they wait for it, on this machine it never comes."""
        claim = f"{self._gpus:g} GPUs each" if self._gpus else "that many CPUs each"
        text = f"{count} workers with {claim}, but there is room for {room}"
        if self._local:
            raise SaescaleError(
                f"{text}; ask for fewer (resources.workers) or for less each (gpus_per_worker, cpus_per_worker)"
            )
        warnings.warn(f"{text} now; the others start when there is more", SaescaleWarning, stacklevel=5)

    def _wait(self) -> None:
        """Until all workers are up, or some are and the others take longer; SaescaleError when none comes up."""
        failure = "the cluster has no free CPUs or GPUs for one"
        began = time.monotonic()
        first, failures = None, 0
        while self.starting:
            limit = _START_TIMEOUT_S if first is None else _COMPANY_S - (time.monotonic() - first)
            up, _ = ray.wait(list(self.starting), num_returns=1, timeout=max(0.0, limit))
            if not up:
                break
            try:
                self.joined(up[0])
                first = first or time.monotonic()
            except ray.exceptions.RayError as error:
                failure, failures = one_line(error)[:300], failures + 1
                if failures < MAX_STARTS:
                    self.replace_worker()
        if not self.ready:
            raise SaescaleError(
                f"none of {self.count} workers came up on the Ray cluster within {time.monotonic() - began:.0f} s: "
                f"{failure}; look at `ray status`, or ask for fewer (resources.workers)"
            )

    def start_worker(self) -> tuple[Any, Any]:
        """A new actor, and the reference of its `describe()`, which is ready when the actor is."""
        # Four threads: one trains, the others answer state, stop and describe meanwhile.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4}
        worker: Any = ray.remote(Worker).options(**options).remote(self._cpus, self._gpus)
        self._workers.append(worker)
        return worker, worker.describe.remote()

    def replace_worker(self) -> None:
        """Queues a worker for one that was lost."""
        worker, described = self.start_worker()
        self.starting[described] = worker

    def joined(self, described: Any) -> Any:
        """The worker of a finished reference in `starting`, now `ready`. Raises RayError where it did not come up."""
        worker = self.starting.pop(described)
        try:
            self.ready[worker] = ray.get(described)
        except ray.exceptions.RayError:
            # One whose `describe` failed lives on otherwise, with the device that it claimed.
            self._end(worker)
            raise
        return worker

    def lost(self, worker: Any) -> WorkerInfo:
        """Forgets a worker that died, or ends one that is of no more use; returns what it was."""
        self._end(worker)
        return self.ready.pop(worker)

    def _end(self, worker: Any) -> None:
        ray.kill(worker)
        self._workers.remove(worker)

    def kill(self, worker: Any) -> None:
        """Kills the process of a worker that does not answer, from its own node: `ray.kill` only asks it to end."""
        info = self.ready[worker]
        where = NodeAffinitySchedulingStrategy(info.node_id, soft=False)
        ray.remote(_kill).options(num_cpus=0, scheduling_strategy=where, max_retries=0).remote(info.pid)

    def stay(self) -> None:
        """No more workers than there are: some nodes are of no use."""
        self._grows = False

    def grow(self, most: int) -> None:
        """Starts up to `most` workers where nodes have joined and the number of workers was left open."""
        if not self._grows:
            return
        resources = ray.cluster_resources()
        room = resources.get("GPU", 0.0) / self._gpus if self._gpus else resources.get("CPU", 0.0) / self._cpus
        new = min(self._cells, int(room)) - len(self.ready) - len(self.starting)
        for _ in range(min(new, most - len(self.starting))):
            self.replace_worker()

    @property
    def precision(self) -> Precision:
        """The precision that is fast on every worker."""
        return "bf16" if all(info.precision == "bf16" for info in self.ready.values()) else "fp32"

    @property
    def memory(self) -> float:
        """Bytes that the smallest worker has."""
        return min(info.memory for info in self.ready.values())

    def needs(self, store: ActivationStore, eval_tokens: int, remote_run: bool) -> Needs:
        """What a pack over `store` takes of the memory of whichever worker needs the most for it, the process itself
        included where that shares it."""
        kinds = sorted({info.kernels for info in self.ready.values()})
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


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
