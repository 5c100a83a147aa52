"""Trains the pending cells of a ledger on a pool: hands out packs, watches them, and deals with what goes wrong.

- A worker or its node dies: its pack goes on from its checkpoints, elsewhere and after a pause that grows.
- It dies again and again: the pack is split, until the cell that does it is alone; that one is marked failed.
- Memory runs out: the pack is split.
- A worker gets nothing done: it is killed, and the rest is as above.
- A store does not answer: the pack waits and is tried again; the sweep ends when nothing moves for OUTAGE_S.
- A node lacks the run or the store: it gets no more packs; the sweep ends when no other one is left.
- A worker has nothing to do: the pack that has most to do is split, as when nodes have joined.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from saescale.cluster.crew.train_crew import MAX_STARTS, Pool, Trained, Unfit, WorkerState
from saescale.cluster.front.display import SweepDisplay
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.packing import Needs, cost, split
from saescale.cluster.sweep.spec import SweepSpec
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning, Unavailable, one_line
from saescale.storage.lease import Lease, RunningCell, RunningWorker, Standing
from saescale.trainers.cell import Cell
from saescale.trainers.device import OutOfMemory
from saescale.trainers.training.report import Progress
from saescale.trainers.training.train import PackJob

MAX_ATTEMPTS = 4  # of a pack that dies again and again without reaching a further checkpoint
MAX_FRUITLESS = 3 * MAX_ATTEMPTS  # failures one after another, without one step in between: it is not the cells
LONGEST_PAUSE_S = 60.0
OUTAGE_S = 900.0  # without one step of any pack, while stores do not answer
DEAD_S = 60.0  # after it was killed, a worker that is not heard of is taken for dead
POLL_S = 0.5
ANSWER_S = 0.2  # that workers get to say where they stand
STOP_TIMEOUT_S = 45.0  # less than a job that is stopped gets (service.STOP_WAIT_S)
PATIENCE_S = 60.0  # until a worker that does not come up is mentioned
LOOK_S = 5.0  # between two looks for workers with nothing to do
WORTH_S = 60.0  # a pack with less left to do is not split for them


class _Pack(NamedTuple):
    cells: list[Cell]
    bytes: float  # that it takes of a worker's memory
    cost: float  # FLOPs
    reached: int  # sum of the checkpointed steps of its cells when the attempt began
    attempt: int = 1  # since the pack last got further
    due: float = 0.0  # not to be begun before, in time.monotonic()


@dataclass
class _Running:
    worker: Any  # Ray's handle of a pool.Worker
    pack: _Pack
    number: int  # of this attempt, for Worker.part
    heard: float  # when it last got something done
    progress: Progress | None = None  # what it last said
    parting: bool = False  # asked to stop, to be split
    question: Any = None  # the reference of `state`, until it is answered
    killed: float | None = None  # when


class Execution:
    """The packs of one call: those that wait, those that a worker trains, and what becomes of them."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        pool: Pool,
        needs: Needs,
        packs: Sequence[list[Cell]],
        steps: Mapping[str, Sequence[int]],  # ledger.checkpoint_steps()
        lease: Lease,
        display: SweepDisplay,
    ) -> None:
        self.spec, self.ledger, self.pool, self.needs = spec, ledger, pool, needs
        self.lease, self.display = lease, display
        self.asked = ledger.pending
        self.total = sum(cost(cell) for cell in self.asked)
        newest = {cell_id: found[0] for cell_id, found in steps.items()}
        # What is behind the checkpoints is done, but not by this call.
        self.before = sum(cost(cell) * newest.get(cell.cell_id, 0) / cell.steps for cell in self.asked)
        self.waiting: list[_Pack] = []
        self.running: dict[Any, _Running] = {}  # by the reference of `train`
        self.idle: list[Any] = list(pool.ready)
        for cells in packs:
            self._queue(cells, reached=sum(newest.get(cell.cell_id, 0) for cell in cells))
        self.begun = 0  # attempts
        self.fruitless = 0  # failures since any pack made a step
        self.interrupted = 0  # packs whose worker was lost
        self.warned: set[str] = set()
        self.failed_starts = 0  # of workers, one after another
        self.starts_due: list[float] = []  # when others are to be started in their place
        self.began = self.looked = self.last_worker = self.moved = time.monotonic()

    def run(self) -> None:
        """Returns when every cell has its result. Whatever ends it early, what the workers have done is saved.

        Raises SaescaleError for what no other worker could do better, Superseded when another driver has taken the
        run over, and KeyboardInterrupt.
        """
        self.display.stage(f"training {len(self.asked)} cells in {len(self.waiting)} packs")
        try:
            while self.waiting or self.running:
                turn = time.monotonic()
                self._hand_out()
                self._watch()
                self._share_out()
                self._show()
                self.lease.require()
                if (busy := time.monotonic() - turn) > 5 * POLL_S:
                    # It was this process that did not listen.
                    for running in self.running.values():
                        running.heard += busy
        except BaseException:
            self._stop()
            if not self.lease.lost:  # else the tables are another driver's
                with suppress(SaescaleError):  # what ended the sweep is what has to be told
                    self.ledger.settle()
            raise

    # --- packs and workers

    def _queue(self, cells: list[Cell], reached: int, attempt: int = 1) -> None:
        pause = _pause(attempt)
        total = sum(cost(cell) for cell in cells)
        self.waiting.append(_Pack(cells, self.needs(cells), total, reached, attempt, time.monotonic() + pause))
        self.waiting.sort(key=lambda pack: -pack.cost)  # longest first

    def _hand_out(self) -> None:
        now = time.monotonic()
        due = [pack for pack in self.waiting if pack.due <= now]
        for worker in list(self.idle):
            memory = self.pool.ready[worker].memory
            pack = next((pack for pack in due if pack.bytes <= memory), None)
            if pack is not None:
                due.remove(pack)
                self.waiting.remove(pack)
                self.idle.remove(worker)
                self._start(worker, pack)
        if due and self.idle and not self.running:
            self._fit(due[0])

    def _fit(self, pack: _Pack) -> None:
        """Splits a pack that fits none of the workers that are left: the one that it was planned for is gone."""
        try:
            parts = split(pack.cells, 2, max(info.memory for info in self.pool.ready.values()), self.needs)
        except SaescaleError as error:
            if not self.pool.starting:
                raise
            self._warn(f"{error}; waiting for one to come up")
            return
        self.waiting.remove(pack)
        for cells in parts:
            self._queue(cells, self._reached(cells))

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
            driver=self.lease.driver,
        )
        self.begun += 1
        reference = worker.train.remote(job, self.begun)
        self.running[reference] = _Running(worker, pack, self.begun, time.monotonic())

    def _watch(self) -> None:
        """Waits for a pack to end or a worker to come up."""
        now = time.monotonic()
        for due in [due for due in self.starts_due if due <= now]:
            self.starts_due.remove(due)
            self.pool.replace_worker()
        watched = [*self.running, *self.pool.starting]
        if watched:
            ready, _ = ray.wait(watched, num_returns=1, timeout=POLL_S)
            ready, _ = ray.wait(watched, num_returns=len(watched), timeout=0) if ready else ([], [])
        else:
            time.sleep(POLL_S)  # until a pack is due again
            ready = []
        for reference in ready:
            if reference in self.running:
                self._finish(reference)
            else:
                self._join(reference)
        if self.running or self.idle:
            self.last_worker = time.monotonic()
        elif time.monotonic() - self.last_worker > PATIENCE_S:
            self._warn("no worker comes up: the cluster has no free CPUs or GPUs for one (`ray status`); still waiting")

    def _join(self, described: Any) -> None:
        try:
            self.idle.append(self.pool.joined(described))
            self.failed_starts = 0
        except ray.exceptions.RayError as error:
            self.failed_starts += 1
            # Without what Ray says of its identifiers, or it would be another warning each time.
            kind = type(getattr(error, "cause", None) or error).__name__
            if self.failed_starts < MAX_STARTS:
                self._warn(f"a worker did not come up ({kind}); another one is started")
                self.starts_due.append(time.monotonic() + _pause(self.failed_starts + 1))
            elif self.pool.ready or self.pool.starting or self.starts_due:
                self._warn(f"workers do not come up ({kind}); going on with fewer")
            else:
                raise SaescaleError(
                    f"{MAX_STARTS} workers in a row did not come up: {one_line(error)[:300]}; look at the cluster "
                    "(`ray status`), then run the same command again"
                ) from error

    def _replace(self, worker: Any) -> None:
        self.pool.lost(worker)
        self.pool.replace_worker()

    def _share_out(self) -> None:
        """Finds work for workers that have none, and workers for a cluster that has grown."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for worker in [worker for worker in self.idle if self.pool.ready[worker].node_id not in alive]:
            self.idle.remove(worker)
            self._replace(worker)
        running = [r for r in self.running.values() if r.progress is not None and r.progress.running > 1]
        longest = max(running, key=_seconds_left, default=None)
        worth = longest is not None and _seconds_left(longest) > WORTH_S
        if self.waiting or (longest is not None and worth):
            self.pool.grow(len(self.waiting) or 1)
        parting = any(running.parting for running in self.running.values())
        if longest is not None and worth and self.idle and not self.waiting and not parting:
            longest.parting = True
            longest.worker.part.remote(longest.number)

    # --- what becomes of a pack

    def _finish(self, reference: Any) -> None:
        running = self.running.pop(reference)
        worker, pack = running.worker, running.pack
        try:
            trained: Trained = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._failed(worker, pack, error.cause)
        except ray.exceptions.RayError as error:
            self._died(worker, pack, error)
        else:
            self._moves()
            self.ledger.record(trained.results)
            for note in trained.notes:
                self._warn(note)
            self.idle.append(worker)
            left = [cell for cell in pack.cells if cell.cell_id not in self.ledger.results]
            if left:
                self._queue_parts(left, min(len(self.idle), len(left)))

    def _failed(self, worker: Any, pack: _Pack, cause: Exception) -> None:
        """The pack raised `cause` in a worker that lives."""
        if isinstance(cause, Unavailable):
            self.idle.append(worker)
            self._again(pack, cause, one_line(cause))
        elif isinstance(cause, OutOfMemory):
            # What is left of the pack in that process is best ended with it.
            self._replace(worker)
            self._smaller(pack, one_line(cause))
        elif isinstance(cause, Unfit):
            self.pool.lost(worker)
            self.pool.stay()
            if not self.pool.ready and not self.pool.starting:
                raise cause
            self._warn(f"{cause}; going on without it")
            self._queue(pack.cells, pack.reached)
        elif isinstance(cause, SaescaleError):
            self.idle.append(worker)
            raise cause
        else:
            self._replace(worker)
            self._again(pack, cause, f"the worker failed with {type(cause).__name__}: {one_line(cause)[:300]}")

    def _died(self, worker: Any, pack: _Pack, error: Exception) -> None:
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            self.pool.kill(worker)  # it may live, out of reach, and must not write beside the next one
        info = self.pool.lost(worker)
        self.pool.replace_worker()
        self.interrupted += 1
        if isinstance(error, ray.exceptions.OutOfMemoryError):  # by Ray's memory monitor
            self._smaller(pack, f"a worker on {info.host} was killed because its node ran out of memory")
            return
        node_lives = any(node["Alive"] for node in ray.nodes() if node["NodeID"] == info.node_id)
        what = f"a worker died ({info.name})" if node_lives else f"a worker was lost with its node {info.host}"
        self._again(pack, error, what, blamed=node_lives)

    def _again(self, pack: _Pack, error: Exception, what: str, blamed: bool = True) -> None:
        """Queues a pack once more, after a pause unless it got further; splits it when that has not helped.

        `blamed`: what happened may be the pack's doing.
        """
        left, reached = self._left(pack)
        further, outage = reached > pack.reached, isinstance(error, Unavailable)
        if not further and blamed and not outage:
            self.fruitless += 1
        attempt = 1 if further or not blamed else pack.attempt + 1
        if self.fruitless > MAX_FRUITLESS or (outage and time.monotonic() - self.moved > OUTAGE_S):
            raise SaescaleError(f"{what}; gave up, since no pack gets anything done any more") from error
        if attempt > MAX_ATTEMPTS and not outage:
            self._smaller(
                pack._replace(cells=left, reached=reached, attempt=attempt), f"{what}, {MAX_ATTEMPTS} times in a row"
            )
        elif left:
            self._warn(f"{what}; its {len(left)} cells go on from their checkpoints")
            self._queue(left, reached, attempt)

    def _smaller(self, pack: _Pack, why: str) -> None:
        """Splits a pack, or gives up its only cell after several attempts."""
        left, reached = self._left(pack)
        attempt = 1 if reached > pack.reached else pack.attempt + 1
        if len(left) > 1:
            self._warn(f"{why}; its {len(left)} cells go on as two packs")
            self._queue_parts(left, 2)
        elif left and attempt > MAX_ATTEMPTS and self._give_up(left[0], why):
            self._warn(f"cell {left[0].cell_id} failed: {why}")
        elif left:
            self._queue(left, reached, attempt)

    def _give_up(self, cell: Cell, why: str) -> bool:
        with suppress(Unavailable):  # then it is tried once more, and given up when that can be written
            self.ledger.fail(cell, why)
        return cell.cell_id in self.ledger.results

    def _queue_parts(self, cells: list[Cell], count: int) -> None:
        for part in split(cells, count, float("inf"), self.needs):
            self._queue(part, self._reached(part))

    def _left(self, pack: _Pack) -> tuple[list[Cell], int]:
        """The cells without a result, and how far those of the pack are for good."""
        with suppress(Unavailable):  # the next worker will find what this did not
            self.ledger.take_up(pack.cells)
        left = [cell for cell in pack.cells if cell.cell_id not in self.ledger.results]
        return left, self._reached(pack.cells, otherwise=pack.reached)

    def _reached(self, cells: Sequence[Cell], otherwise: int = 0) -> int:
        """Steps that no kill can undo; `otherwise` while the run directory does not answer."""
        try:
            return self.ledger.steps_reached(cells)
        except Unavailable:
            return otherwise

    # --- what is seen of it

    def _show(self) -> None:
        self._ask()
        standing = self._standing()
        self.display.sweep(standing)
        self.lease.standing = standing

    def _ask(self) -> None:
        """Asks every worker where it stands; of one that is too busy to answer at once, what it last said counts."""
        for running in self.running.values():
            running.question = running.question or running.worker.state.remote()
        asked = {running.question: running for running in self.running.values()}
        answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        now = time.monotonic()
        for answer in answers:
            running = asked[answer]
            running.question = None
            try:
                state: WorkerState = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # the worker just died: its pack's reference will say so
            for note in state.notes:
                self._warn(note)
            running.heard = max(running.heard, now - state.quiet_s)
            if state.progress is not None:
                if running.progress is None or state.progress.step > running.progress.step:
                    self._moves()
                running.progress = state.progress
        for reference, running in list(self.running.items()):
            quiet = now - running.heard
            name = self.pool.ready[running.worker].name
            if running.killed is None and quiet > self.spec.resources.stalled_after_s:
                self._warn(f"worker {name} got nothing done for {quiet:.0f} s and is ended")
                running.killed = now
                self.pool.kill(running.worker)
            elif running.killed is not None and now - running.killed > DEAD_S:
                # Not even its node answers.
                del self.running[reference]
                self._died(running.worker, running.pack, TimeoutError(f"worker {name} cannot be ended"))

    def _moves(self) -> None:
        """Something was trained: whatever fails now and then, it is not everything."""
        self.fruitless, self.moved = 0, time.monotonic()

    def _standing(self) -> Standing:
        done = sum(cost(cell) for cell in self.asked if cell.cell_id in self.ledger.results)
        statuses = [result["status"] for result in self.ledger.results.values()]
        standing = Standing(
            cells=len(self.ledger.cells),
            done=statuses.count("done"),
            failed=statuses.count("failed"),
            interrupted=self.interrupted,
        )
        for running in self.running.values():
            if (progress := running.progress) is None:
                continue
            name = self.pool.ready[running.worker].name
            cells = [cell for cell in running.pack.cells if cell.cell_id not in self.ledger.results]
            done += sum(cost(cell) * min(1.0, progress.step / cell.steps) for cell in cells)
            standing.tokens_per_s += progress.tokens_per_s * progress.running
            standing.done += progress.done
            standing.failed += progress.failed
            standing.running += [RunningCell(worker=name, **cell._asdict()) for cell in progress.cells]
            standing.workers.append(
                RunningWorker(
                    name=name,
                    cells=progress.running,
                    tokens_per_s=progress.tokens_per_s,
                    stream_wait=progress.stream_wait,
                )
            )
        fraction = min(1.0, max(0.0, done - self.before) / max(1.0, self.total - self.before))
        standing.fraction = fraction
        # A few seconds of a pack's start say nothing about its speed.
        if fraction > 0.01:
            standing.left_s = (time.monotonic() - self.began) * (1 - fraction) / fraction
        return standing

    def _stop(self) -> None:
        """Lets the workers save their checkpoints before they are ended."""
        if not self.running:
            return
        for running in self.running.values():
            running.worker.stop.remote()
        self.display.stage("stopping: the workers save their checkpoints")
        ready, late = ray.wait(list(self.running), num_returns=len(self.running), timeout=STOP_TIMEOUT_S)
        for reference in ready:
            try:
                trained: Trained = ray.get(reference)
                if not self.lease.lost:
                    self.ledger.record(trained.results)
            except (ray.exceptions.RayError, SaescaleError) as error:
                self._warn(f"a worker failed while stopping: {one_line(getattr(error, 'cause', None) or error)[:300]}")
        if late:
            self._warn(f"{len(late)} workers did not save within {STOP_TIMEOUT_S:.0f} s; they go on from what they had")

    def _warn(self, text: str) -> None:
        """Shows a warning, the workers' too, once however often it comes."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, SaescaleWarning, stacklevel=3)


def _pause(attempt: int) -> float:
    """Seconds before an attempt, which counts from 1."""
    return min(LONGEST_PAUSE_S, 2.0 ** min(10, attempt - 1)) if attempt > 1 else 0.0


def _seconds_left(running: _Running) -> float:
    progress = running.progress
    assert progress is not None
    tokens = (progress.steps - progress.step) * running.pack.cells[0].batch_tokens
    return tokens / max(1e-9, progress.tokens_per_s)
