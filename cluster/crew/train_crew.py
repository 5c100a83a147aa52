"""The crew that trains: long-lived workers, one device each, to which packs are handed out (sweep/execute.py).

It costs less than a Ray Tune trial or a TorchTrainer for each pack: imports and start-up are paid once.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saescale.cluster.crew.claims import MeshShape, Needs, NeedsOnMesh, Resources
from saescale.cluster.crew.connect import wanted_address
from saescale.cluster.crew.crew import Crew, Words, back_off
from saescale.cluster.crew.head import nodes, resources
from saescale.cluster.crew.shares import cpus_each, without
from saescale.cluster.crew.train_worker import Worker, WorkerInfo
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.precision import Precision
from saescale.trainers.training.memory import PROCESS_BYTES, StreamSize, pack_memory

_START_TIMEOUT_S = 900.0  # until the first worker is up; an autoscaler may have to find a machine for it
_COMPANY_S = 15.0  # more, for those that start with it
IDLE_S = 60.0  # without work, after which a worker of an open number is ended; another start takes ten
MAX_STARTS = 4  # that fail one after another before fewer workers have to do
BACKOFF_S = (2.0, 60.0)  # after the first failure, and at most


class TrainCrew(Crew[WorkerInfo]):
    """As many workers as `resources` ask for, with what they ask for each; there is one up at least.

    threads: CPU threads of each worker. One apiece when there are as many workers as cores: two processes of two
    threads on two cores collapse. auto: what `precision: auto` came to, None where the sweep names one; workers whose
    device is made for another say so. Raises SaescaleError when Ray cannot be reached or no worker comes up.
    """

    words = Words(
        again="a worker did not come up ({kind}); another one is started",
        fewer="workers do not come up ({kind}); going on with fewer",
        one="a worker",
    )

    def __init__(
        self,
        cells: int,
        resources: Resources,
        address: str | None = None,
        auto: Precision | None = None,
        taken: Mapping[str, float] | None = None,
    ) -> None:
        self._taken = dict(taken or {})  # of the cluster, by others of this sweep
        self._began, self._once_up, self._auto = time.monotonic(), False, auto
        super().__init__(address)
        self._grows = resources.workers == "auto"
        self._spare_since: dict[Any, float] = {}  # workers for which there has been nothing to do since then
        self._useful = cells  # workers for which there is something to do
        try:
            self.connect()
            self._local = self.owns_ray and wanted_address(address) is None
            self.count = self._size(resources)
            for _ in range(self.count):
                self.start()
            self.come_up(_START_TIMEOUT_S, _COMPANY_S)
            self._once_up = True
        except BaseException:
            self.close()
            raise

    def _there(self) -> dict[str, float]:
        there = resources()
        return there | {name: max(0.0, there.get(name, 0.0) - share) for name, share in self._taken.items()}

    def _size(self, asked: Resources) -> int:
        """How many workers, and what each claims."""
        there = self._there()
        cpus, gpus = max(1, int(there.get("CPU", 1))), there.get("GPU", 0.0)
        self._gpus = min(1.0, gpus) if isinstance(asked.gpus_per_worker, str) else asked.gpus_per_worker
        given = 0.0 if isinstance(asked.cpus_per_worker, str) else asked.cpus_per_worker
        room = int(gpus / self._gpus) if self._gpus else int(cpus / (given or 1.0))
        together = asked.mesh.layout.ranks if isinstance(asked.mesh, MeshShape) else 1
        self._useful *= together
        # Who asks for GPUs where there are none has an autoscaler that brings them: a whole mesh is asked for.
        least = together if self._gpus and not gpus else 1
        count = max(least, min(self._useful, room)) if isinstance(asked.workers, str) else asked.workers
        if count < together:
            raise SaescaleError(
                f"resources.mesh asks for {together} workers at a time, and the cluster has room for {room} "
                f"({there.get('CPU', 0):g} CPUs, {gpus:g} GPUs); ask for a smaller mesh, or for resources.workers: "
                f"{together} where an autoscaler can add them"
            )
        if count > room and (self._gpus or given):
            self._no_room(count, room)
        self._cpus = given or cpus_each(without(nodes(), self._taken), count, self._gpus)
        self.threads = max(1, int(self._cpus))
        self.claim = {"CPU": self._cpus, "GPU": self._gpus}
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

    def _create(self) -> tuple[Any, Any]:
        # Four threads: one trains, the others answer state, stop and describe meanwhile.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4}
        worker = self._actor(Worker, options, self._cpus, self._gpus)
        return worker, worker.describe.remote()

    def _joined(self, actor: Any, info: WorkerInfo) -> None:
        super()._joined(actor, info)
        if self._auto not in (None, info.precision):
            self.warn(
                f"precision: auto is {self._auto} for all cells of this sweep, and there are workers whose devices are "
                f"made for {info.precision}; they are slower, and the numbers are the same. train.precision chooses it"
            )

    def _most_starts(self) -> int:
        return MAX_STARTS

    def _pause(self, failures: int) -> float:
        return back_off(failures, *BACKOFF_S)

    def _nobody(self, why: str) -> SaescaleError:
        if self._once_up:
            return SaescaleError(
                f"{MAX_STARTS} workers in a row did not come up: {why}; look at the cluster (`ray status`), then run "
                "the same command again"
            )
        return SaescaleError(
            f"none of {self.count} workers came up on the Ray cluster within {time.monotonic() - self._began:.0f} s: "
            f"{why}; look at `ray status`, or ask for fewer (resources.workers)"
        )

    def stay(self) -> None:
        """No more workers than there are: some nodes are of no use."""
        self._grows = False
        self.withdraw()

    def grow(self, most: int) -> None:
        """Up to `most` more workers, where their number was left open: starts those for which nodes have joined, and
        wishes for the others, as which an autoscaler sees them."""
        self._spare_since.clear()
        if not self._grows or self._due:  # first those that are to be started anyway
            return
        # A wish takes the room of a node that has come for it.
        room, asked = self._room_for(), len(self.ready) + len(self.starting) + len(self.wished)
        more = min(self._useful - asked, most - len(self.starting) - len(self.wished))
        for number in range(more):
            if number < room - asked:
                self.start()
            elif not self._local:
                self.wish()

    def widen(self, workers: int) -> None:
        """There is something to do for so many, since several share a cell."""
        self._useful = max(self._useful, workers)
        self.grow(workers - len(self.ready))

    @property
    def most(self) -> int:
        """How many workers the cluster as it is can have: those that were asked for, or all for which there is room."""
        return max(self.count, self._room_for()) if self._grows else self.count

    def _room_for(self) -> int:
        there = self._there()
        return int(there.get("GPU", 0.0) / self._gpus if self._gpus else there.get("CPU", 0.0) / self._cpus)

    def spare(self) -> None:
        """There is no more work than for those who have some: wishes for nothing, and ends workers that have been idle
        for a while, so that an autoscaler can take their nodes back."""
        self.withdraw()
        if not self._grows or self._local:
            return
        now = time.monotonic()
        self._spare_since = {worker: self._spare_since.get(worker, now) for worker in self.idle}
        for worker in [worker for worker, since in self._spare_since.items() if now - since > IDLE_S]:
            del self._spare_since[worker]
            self.lost(worker)

    @property
    def memory(self) -> float:
        """Bytes that the smallest worker has."""
        return min(info.memory for info in self.ready.values())

    @property
    def on_gpu(self) -> bool:
        """Whether every worker computes on one."""
        return all(info.kernels != "cpu" for info in self.ready.values())

    def needs(self, stores: Sequence[ActivationStore], eval_tokens: int, remote_run: bool) -> Needs:
        """What a pack over one of `stores` takes of the memory of whichever worker needs the most for it, the process
        itself included where that shares it."""
        taken = self._taken_by(stores, eval_tokens, remote_run)
        return lambda cells: taken(cells, Layout())

    def needs_on_mesh(self, stores: Sequence[ActivationStore], eval_tokens: int, remote_run: bool) -> NeedsOnMesh:
        """As `needs`, of each worker that shares a cell with others."""
        taken = self._taken_by(stores, eval_tokens, remote_run)
        return lambda cell, layout: taken([cell], layout)

    def _taken_by(
        self, stores: Sequence[ActivationStore], eval_tokens: int, remote_run: bool
    ) -> Callable[[Sequence[Cell], Layout], float]:
        kinds = sorted({info.kernels for info in self.ready.values()})
        streams = {s.fingerprint: StreamSize(s.manifest.row_group_rows, s.rows("train"), s.mixed_rows) for s in stores}
        return lambda cells, layout: max(
            pack_memory(cells, eval_tokens, streams[cells[0].store], kind, remote_run, layout).total
            + (PROCESS_BYTES if kind == "cpu" else 0)
            for kind in kinds
        )
