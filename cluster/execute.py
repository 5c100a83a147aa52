"""Trains the pending cells of a ledger on a pool: hands out packs, watches them, and queues again what died."""

import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray

from cluster.display import SweepDisplay, SweepProgress
from cluster.ledger import Ledger
from cluster.plan import cost
from cluster.pool import Pool, Trained, WorkerState
from cluster.spec import SweepSpec
from storage import files
from storage.errors import SaescaleError, SaescaleWarning, one_line
from trainers.callbacks import Progress
from trainers.cell import Cell
from trainers.train import PackJob

MAX_ATTEMPTS = 4  # of a pack that dies again and again without reaching a further checkpoint
POLL_S = 0.5
STOP_TIMEOUT_S = 30.0
PATIENCE_S = 60.0  # until a worker that does not come up is mentioned


class _Pack(NamedTuple):
    cells: list[Cell]
    attempt: int  # since the pack last got further
    reached: int  # sum of the checkpointed steps of its cells when the attempt began


class _Running(NamedTuple):
    worker: Any  # Ray's handle of a pool.Worker
    pack: _Pack


class Execution:
    """The packs of one call: those that wait, those that a worker trains, and what becomes of them."""

    def __init__(
        self, spec: SweepSpec, ledger: Ledger, pool: Pool, packs: Sequence[list[Cell]], display: SweepDisplay
    ) -> None:
        self.spec, self.ledger, self.pool, self.display = spec, ledger, pool, display
        self.waiting = deque(_Pack(cells, 1, ledger.steps_reached(cells)) for cells in packs)
        self.running: dict[Any, _Running] = {}
        self.seen: dict[Any, Progress] = {}  # what each running pack last said
        self.starting: dict[Any, Any] = dict(pool.starting)  # reference of describe() -> worker
        self.idle: deque[Any] = deque(pool.ready)
        self.asked = {cell.cell_id: cell for cell in ledger.pending}
        self.total = sum(cost(cell) for cell in ledger.pending)
        # What is behind the checkpoints is done, but not by this call.
        steps = ledger.checkpoint_steps()
        self.before = sum(cost(cell) * steps.get(cell.cell_id, 0) / cell.steps for cell in ledger.pending)
        self.warned: set[str] = set()
        self._last_worker = time.monotonic()

    def run(self) -> None:
        """Returns when every cell has its result. Whatever ends it early, what the workers have done is saved.

        Raises SaescaleError for what no other worker could do better, and KeyboardInterrupt.
        """
        self.display.stage(f"training {len(self.ledger.pending)} cells in {len(self.waiting)} packs")
        try:
            while self.waiting or self.running:
                while self.waiting and self.idle:
                    self._start(self.idle.popleft(), self.waiting.popleft())
                self._watch()
                self.display.sweep(self._progress())
        except BaseException:
            self._stop()
            raise

    def _watch(self) -> None:
        """Waits for a pack to end or a worker to come up."""
        ready, _ = ray.wait([*self.running, *self.starting], num_returns=1, timeout=POLL_S)
        for reference in ready:
            if reference in self.running:
                self._finish(reference)
            else:
                self._join(reference)
        if self.running or self.idle:
            self._last_worker = time.monotonic()
        elif time.monotonic() - self._last_worker > PATIENCE_S:
            self._warn("no worker comes up: the cluster has no free CPUs or GPUs for one (`ray status`); still waiting")

    def _join(self, reference: Any) -> None:
        worker = self.starting.pop(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self._warn(f"a worker died while it started ({one_line(error)[:200]}); another one is started")
            self._replace()
        else:
            self.idle.append(worker)

    def _replace(self) -> None:
        worker, described = self.pool.start_worker()
        self.starting[described] = worker

    def _start(self, worker: Any, pack: _Pack) -> None:
        job = PackJob(
            cells=pack.cells,
            # A relative path would mean another folder in the worker.
            store=files.local_path(self.spec.store) or self.spec.store,
            run=files.local_path(self.spec.out) or self.spec.out,
            sweep=self.spec.name,
            eval=self.spec.eval,
            wandb=self.spec.wandb,
            checkpoint_every_s=self.spec.resources.checkpoint_every_s,
            threads=self.pool.threads,
        )
        self.running[worker.train.remote(job)] = _Running(worker, pack)

    def _finish(self, reference: Any) -> None:
        """Records what a pack gave, or queues it again when its worker died."""
        worker, pack = self.running.pop(reference)
        self.seen.pop(reference, None)
        try:
            trained: Trained = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from (None if isinstance(error.cause, SaescaleError) else error)
        except ray.exceptions.RayActorError as error:
            self._again(pack, error)
            return
        self.ledger.record(trained.results)
        for note in trained.notes:
            self._warn(note)
        self.idle.append(worker)

    def _again(self, pack: _Pack, error: Exception) -> None:
        self.ledger.remove_leftovers(pack.cells)
        reached = self.ledger.steps_reached(pack.cells)
        attempt = 1 if reached > pack.reached else pack.attempt + 1
        if attempt > MAX_ATTEMPTS:
            names = ", ".join(cell.cell_id for cell in pack.cells)
            raise SaescaleError(
                f"the worker died {MAX_ATTEMPTS} times training {names}: {one_line(error)[:300]}; if it ran out of "
                "memory use fewer workers (resources.workers), then run the same command again"
            ) from error
        self._warn(f"a worker died; its {len(pack.cells)} cells go on from their checkpoints")
        self.waiting.append(_Pack(pack.cells, attempt, reached))
        self._replace()

    def _progress(self) -> SweepProgress:
        self._ask()
        done = sum(cost(cell) for cell_id, cell in self.asked.items() if cell_id in self.ledger.results)
        rate, finished, failed = 0.0, 0, 0
        for reference, running in self.running.items():
            if (progress := self.seen.get(reference)) is None:
                continue
            done += sum(cost(cell) * min(1.0, progress.step / cell.steps) for cell in running.pack.cells)
            rate += progress.tokens_per_s * progress.running
            finished += progress.done
            failed += progress.failed
        statuses = [result["status"] for result in self.ledger.results.values()]
        return SweepProgress(
            cells=len(self.ledger.cells),
            done=statuses.count("done") + finished,
            failed=statuses.count("failed") + failed,
            fraction=min(1.0, max(0.0, done - self.before) / max(1.0, self.total - self.before)),
            tokens_per_s=rate,
        )

    def _ask(self) -> None:
        """Asks every worker where it stands; of one that is too busy to answer at once, what it last said counts."""
        asked = {running.worker.state.remote(): reference for reference, running in self.running.items()}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_S) if asked else ([], [])
        for answer in ready:
            try:
                state: WorkerState = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # the worker just died: its pack's reference will say so
            for note in state.notes:
                self._warn(note)
            if state.progress is not None:
                self.seen[asked[answer]] = state.progress

    def _stop(self) -> None:
        """Lets the workers save their checkpoints before they are ended."""
        if not self.running:
            return
        for running in self.running.values():
            running.worker.stop.remote()
        self.display.stage("stopping: the workers save their checkpoints")
        ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=STOP_TIMEOUT_S)
        for reference in ready:
            try:
                self.ledger.record(ray.get(reference).results)
            except ray.exceptions.RayError as error:
                self._warn(f"a worker failed while stopping: {one_line(getattr(error, 'cause', None) or error)[:300]}")

    def _warn(self, text: str) -> None:
        """Shows a warning, the workers' too, once however often it comes."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, SaescaleWarning, stacklevel=3)
