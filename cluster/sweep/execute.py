"""Trains the pending cells of a ledger with a crew: hands out packs, watches them, and deals with what goes wrong.

- A worker or its node dies: its pack goes on from its checkpoints, elsewhere and after a pause that grows.
- It dies again and again: the pack is split, until the cell that does it is alone; that one is marked failed.
- Memory runs out: the pack is split.
- A worker gets nothing done: it is killed, and the rest is as above.
- A store does not answer: the pack waits and is tried again; the sweep ends when nothing moves for OUTAGE_S.
- A node lacks the run or the store: it gets no more packs; the sweep ends when no other one is left.
- A store of several is gone or damaged: its packs are set aside, and end the sweep when those of the others are done.
- A cell is shared by several workers: they are handed it together, as soon as so many are free. Whichever is lost, or
  hangs, the others break off, and the pack goes on from its checkpoint as soon as there are so many again.
- A worker has nothing to do: the pack that has most to do is split, as when nodes have joined; where that is not worth
  it, and the number of workers was left open, the worker is ended.
- A pack waits for a server's files that have no room beside those which are kept for one without a worker: they take
  turns (turns.py).
"""

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray

from saescale.cluster.crew.claims import Needs
from saescale.cluster.crew.head import node_ids
from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.crew.train_worker import Trained, Unfit
from saescale.cluster.sweep import gang
from saescale.cluster.sweep.cautions import diverged, missed
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.packs import Packs
from saescale.cluster.sweep.spec import SweepSpec
from saescale.cluster.sweep.standing import Attempt, Pack, Producers, Work, ask, next_tries, standing_of, waits_of
from saescale.cluster.sweep.stop import stop
from saescale.cluster.sweep.turns import Turns, wait_is_for_rows
from saescale.cluster.sweep.watcher import SweepDisplay
from saescale.scaling.words import counted
from saescale.storage import files
from saescale.storage.errors import SaescaleError, Superseded, Unavailable, one_line
from saescale.storage.lease import Lease
from saescale.storage.live import LiveSource
from saescale.storage.store import ActivationStore
from saescale.storage.waiting import hear
from saescale.trainers.cell import Cell, axes_of
from saescale.trainers.device import OutOfMemory
from saescale.trainers.mesh.layout import MeshBroken
from saescale.trainers.training.job import PackJob

MAX_ATTEMPTS = 4  # of a pack that dies again and again without reaching a further checkpoint
MAX_FRUITLESS = 3 * MAX_ATTEMPTS  # failures one after another, without one step in between: it is not the cells
OUTAGE_S = 900.0  # without one step of any pack, while stores do not answer
DEAD_S = 60.0  # after it was killed, a worker that is not heard of is taken for dead
BUSY_S = 2.5  # a turn of this process that took longer is not the workers' silence
LOOK_S = 5.0  # between two looks for workers with nothing to do
WORTH_S = 60.0  # a pack with less left to do is not split for them
DEADLINE_S = 300.0  # that a worker of a mesh may keep the others waiting


_NO_MESHES = gang.Meshes()


class Execution:
    """The packs of one call: those that wait, those that a worker trains, and what becomes of them."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        crew: TrainCrew,
        needs: Needs,
        packs: Sequence[list[Cell]],
        steps: Mapping[str, Sequence[int]],  # ledger.checkpoint_steps()
        lease: Lease,
        display: SweepDisplay,
        turns: Turns,
        meshes: gang.Meshes = _NO_MESHES,
    ) -> None:
        self.spec, self.ledger, self.crew = spec, ledger, crew
        self.lease, self.display = lease, display
        self.producers = Producers(ledger)
        self.axes = (*_differ(ledger.stores.values()), *axes_of(ledger.cells))
        newest = {cell_id: found[0] for cell_id, found in steps.items()}
        self.work = Work(ledger.pending, newest)
        self.packs, self.turns = Packs(ledger, needs, meshes, turns), turns
        self.running: dict[Any, Attempt] = {}  # by the reference of `train`
        self.company = gang.Company(crew)
        for cells in packs:
            self.packs.put(cells, reached=sum(newest.get(cell.cell_id, 0) for cell in cells))
        self.begun = 0  # attempts
        self.fruitless = 0  # failures since any pack made a step
        self.interrupted = 0  # packs whose worker was lost
        self.began = self.looked = self.moved = time.monotonic()

    def run(self) -> None:
        """Returns when every cell has its result. Whatever ends it early, what the workers have done is saved.

        Raises SaescaleError for what no other worker could do better, Superseded when another driver has taken the
        run over, and KeyboardInterrupt.
        """
        cells, packs = counted(len(self.work.cells), "cell"), counted(len(self.packs.waiting), "pack")
        layouts = Counter(str(pack.layout) for pack in self.packs.waiting if pack.layout.ranks > 1)
        shared = "; ".join(f"{number} shared by {layout}" for layout, number in layouts.items())
        self.display.stage(f"training {cells} in {packs}{f', {shared}' if shared else ''}")
        try:
            while self.packs.waiting or self.running:
                turn = time.monotonic()
                self._hand_out()
                for reference in self.crew.watch([*self.running, *self._company()]):
                    self._ended(reference)
                self._share_out()
                self._give_way()
                self._show()
                self.lease.require()
                if self.packs.unusable and not self._trainable():
                    break
                if (busy := time.monotonic() - turn) > BUSY_S:
                    # It was this process that did not listen.
                    for running in self.running.values():
                        running.heard += busy
            if self.packs.unusable:
                raise self.packs.left_over(self.work.cells)
        except BaseException:
            answered = stop(self.running, self.ledger, self.crew, self.lease, self.display)
            if answered and not self.lease.lost:  # else the tables are another driver's
                with suppress(SaescaleError):  # what ended the sweep is what has to be told
                    self.ledger.settle()
            raise
        finally:
            for source in ("workers", "packs", "company"):
                hear(source, [])

    # --- packs and workers

    def _hand_out(self) -> None:
        due, short, kept = self.packs.due(), None, False
        for shared in [pack for pack in due if pack.layout.ranks > 1]:
            due.remove(shared)
            fit = gang.fit(shared, self.crew)
            free = [worker for worker in self.crew.idle if worker in fit]
            if len(free) >= shared.layout.ranks:
                self._take(shared, gang.nearest(free, shared.layout, lambda worker: self.crew.ready[worker].node_id))
                continue
            if len(fit) < shared.layout.ranks:
                short = short or shared  # more have to come up first, and others need not wait for that
            elif not any(running.company for running in self.running.values()):
                kept = True  # whoever is free, or it would wait for ever beside small packs
                break
            # Else it gets their workers when they end.
        for worker in [] if kept else list(self.crew.idle):
            memory = self.crew.ready[worker].memory
            small = next((pack for pack in due if pack.bytes <= memory), None)
            if small is not None:
                due.remove(small)
                self._take(small, [worker])
        if due and not kept and self.crew.idle and not self.running:
            self._fit(due[0])
        if short is not None and not self.running:
            gang.require_company(short, self.crew)
        self.company.look(short, bool(self.running))

    def _take(self, pack: Pack, workers: Sequence[Any]) -> None:
        self.packs.waiting.remove(pack)
        for worker in workers:
            self.crew.idle.remove(worker)
        self._start(workers, pack)

    def _fit(self, pack: Pack) -> None:
        """Splits a pack that fits none of the workers that are left: the one that it was planned for is gone."""
        try:
            self.packs.put_parts(pack.cells, 2, max(info.memory for info in self.crew.ready.values()))
        except SaescaleError as error:
            if not self.crew.starting:
                raise
            self.crew.warn(f"{error}; waiting for one to come up")
            return
        self.packs.waiting.remove(pack)

    def _start(self, workers: Sequence[Any], pack: Pack) -> None:
        store = self.ledger.stores[pack.store].url
        job = PackJob(
            cells=pack.cells,
            # A relative path would mean another folder in the worker.
            store=files.local_path(store) or store,
            run=files.local_path(self.spec.out) or self.spec.out,
            sweep=self.spec.name,
            eval=self.spec.eval,
            wandb=self.spec.wandb,
            checkpoint_every_s=self.spec.resources.checkpoint_every_s,
            threads=self.crew.threads,
            architectures=self.ledger.architectures,
            axes=self.axes,
            driver=self.lease.driver,
        )
        self.begun += 1
        deadline_s = min(DEADLINE_S, self.spec.resources.stalled_after_s / 2)
        reference, company = gang.begin(workers, job, self.begun, pack.layout, deadline_s)
        self.running[reference] = Attempt(workers[0], pack, self.begun, time.monotonic(), company=company)

    def _share_out(self) -> None:
        """Finds work for workers that have none, and workers for a cluster that has grown."""
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        self.crew.replace_stranded()
        running = [r for r in self.running.values() if r.progress is not None and r.progress.running > 1]
        longest = max(running, key=_seconds_left, default=None)
        worth = longest is not None and _seconds_left(longest) > WORTH_S
        waiting = self.packs.waiting
        if waiting or (longest is not None and worth):
            self.crew.grow(sum(pack.layout.ranks for pack in waiting) or 1)
        elif self.running and all(running.progress is not None for running in self.running.values()):
            self.crew.spare()
        parting = any(running.parting for running in self.running.values())
        if longest is not None and worth and self.crew.idle and not waiting and not parting:
            longest.parting = True
            longest.worker.part.remote(longest.number)

    def _give_way(self) -> None:
        """Where packs take turns, and no worker is free for one that waits."""
        if (ahead := self.turns.gives_way(self.running.values(), self.packs.waiting)) is not None:
            ahead.parting = True
            ahead.worker.part.remote(ahead.number)

    # --- what becomes of a pack

    def _company(self) -> list[Any]:
        """The references of those that share a pack with the first of its workers, and have not ended."""
        return [
            reference
            for running in self.running.values()
            if running.broken is None
            for reference in running.company
            if reference not in running.left
        ]

    def _ended(self, reference: Any) -> None:
        if reference in self.running:
            self._finish(reference)
            return
        for running in self.running.values():
            if reference in running.company:
                running.left.add(reference)
                if gang.failed(reference):
                    running.broken = time.monotonic()

    def _finish(self, reference: Any) -> None:
        running = self.running.pop(reference)
        worker, pack = running.worker, running.pack
        if running.company:
            worker, reference, lost = gang.part(running, reference, self.crew)
            self.interrupted += lost
        try:
            trained: Trained = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._failed(worker, pack, error.cause)
        except ray.exceptions.RayError as error:
            self._died(worker, pack, error)
        else:
            self._moves()
            self.ledger.record(trained.results)
            for note in (*trained.notes, *diverged(trained.results), *missed(pack.cells, trained.results)):
                self.crew.warn(note)
            self.crew.idle.append(worker)
            left = [cell for cell in pack.cells if cell.cell_id not in self.ledger.results]
            if left:
                several = 1 if self.turns.has(left) else min(len(self.crew.idle), len(left))
                self.packs.put_parts(left, several)

    def _failed(self, worker: Any, pack: Pack, cause: Exception) -> None:
        """The pack raised `cause` in a worker that lives."""
        if isinstance(cause, Unavailable | MeshBroken):
            self.crew.idle.append(worker)
            self._again(pack, cause, one_line(cause))
        elif isinstance(cause, OutOfMemory):
            # What is left of the pack in that process is best ended with it.
            self.crew.replace(worker)
            self._smaller(pack, one_line(cause))
        elif isinstance(cause, Unfit) and self.packs.is_gone(pack.store):
            self.crew.idle.append(worker)
            self._set_aside(pack.store, cause)
        elif isinstance(cause, Unfit):
            self.crew.lost(worker)
            self.crew.stay()
            if not self.crew.ready and not self.crew.starting:
                raise cause
            self.crew.warn(f"{cause}; going on without it")
            self.packs.put(pack.cells, pack.reached)
        elif isinstance(cause, SaescaleError):
            self.crew.idle.append(worker)
            if isinstance(cause, Superseded):
                raise cause
            self._set_aside(pack.store, cause)
        else:
            self.crew.replace(worker)
            self._again(pack, cause, f"the worker failed with {type(cause).__name__}: {one_line(cause)[:300]}")

    def _set_aside(self, store: str, cause: SaescaleError) -> None:
        self.packs.set_aside(store, cause)
        if self._trainable():
            self.crew.warn(f"{cause}; its cells wait, those of other stores go on")

    def _trainable(self) -> bool:
        """Whether anything is left to do over a store that can be used."""
        usable = (running.pack.store not in self.packs.unusable for running in self.running.values())
        return bool(self.packs.waiting) or any(usable)

    def _died(self, worker: Any, pack: Pack, error: Exception) -> None:
        info = self.crew.replace(worker, error)
        self.interrupted += 1
        if isinstance(error, ray.exceptions.OutOfMemoryError):  # by Ray's memory monitor
            self._smaller(pack, f"a worker on {info.host} was killed because its node ran out of memory")
            return
        alone = info.node_id in node_ids()
        what = f"a worker died ({info.name})" if alone else f"a worker was lost with its node {info.host}"
        self._again(pack, error, what, blamed=alone)

    def _again(self, pack: Pack, error: Exception, what: str, blamed: bool = True) -> None:
        """Queues a pack once more, after a pause unless it got further; splits it when that has not helped.

        `blamed`: what happened may be the pack's doing.
        """
        left, reached = self.packs.left(pack)
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
            self.crew.warn(f"{what}; its {len(left)} cells {_how(reached, outage)}")
            self.packs.put(left, reached, attempt, what)

    def _smaller(self, pack: Pack, why: str) -> None:
        """Splits a pack, or gives up its only cell after several attempts."""
        left, reached = self.packs.left(pack)
        attempt = 1 if reached > pack.reached else pack.attempt + 1
        if len(left) > 1:
            self.crew.warn(f"{why}; its {len(left)} cells go on as two packs")
            self.packs.put_parts(left, 2)
        elif left and attempt > MAX_ATTEMPTS and self._give_up(left[0], why):
            self.crew.warn(f"cell {left[0].cell_id} failed: {why}")
        elif left:
            self.packs.put(left, reached, attempt)

    def _give_up(self, cell: Cell, why: str) -> bool:
        with suppress(Unavailable):  # then it is tried once more, and given up when that can be written
            self.ledger.fail(cell, why)
        return cell.cell_id in self.ledger.results

    # --- what is seen of it

    def _show(self) -> None:
        for note in ask(self.running.values()):
            self.crew.warn(note)
        if any(attempt.moved for attempt in self.running.values()):
            self._moves()
        self._end_stalled()
        hear("workers", waits_of(self.running.values(), self.crew.ready, self.spec.resources.stalled_after_s))
        held_up = not self.running and self.crew.ready
        hear("packs", next_tries(self.packs.waiting, self.moved, OUTAGE_S) if held_up else [])
        standing = standing_of(self.ledger, self.running.values(), self.crew.ready, self.work)
        standing.interrupted = self.interrupted
        # A few seconds of a pack's start say nothing about its speed.
        if standing.fraction > 0.01:
            standing.left_s = (time.monotonic() - self.began) * (1 - standing.fraction) / standing.fraction
        standing.live = self.producers.standing()
        self.display.sweep(standing)
        self.lease.standing = standing

    def _end_stalled(self) -> None:
        """Kills workers that get nothing done, and takes those for dead that cannot even be killed."""
        now = time.monotonic()
        for reference, running in list(self.running.items()):
            if self._waits_for_blocks(running):
                running.heard = now
            quiet = now - running.heard
            name = self.crew.ready[running.worker].name
            if running.killed is None and quiet > self.spec.resources.stalled_after_s:
                self.crew.warn(f"worker {name} got nothing done for {quiet:.0f} s and is ended")
                running.killed = now
                self.crew.kill(running.worker)
            elif running.killed is None and running.broken is not None and now - running.broken > gang.COMPANY_S:
                self.crew.warn(f"worker {name} does not leave its broken mesh and is ended")
                running.killed = now
                self.crew.kill(running.worker)
            elif running.killed is not None and now - running.killed > DEAD_S:
                # Not even its node answers.
                del self.running[reference]
                if running.company:
                    self.interrupted += gang.part(running, reference, self.crew)[2]
                self._died(running.worker, running.pack, TimeoutError(f"worker {name} cannot be ended"))

    def _waits_for_blocks(self, running: Attempt) -> bool:
        """Whether its worker has just said that it waits for a live source, which may take as long as it takes."""
        live = isinstance(self.ledger.stores[running.pack.store], LiveSource)
        return live and running.question is None and any(wait_is_for_rows(wait.what) for wait in running.waits)

    def _moves(self) -> None:
        """Something was trained: whatever fails now and then, it is not everything."""
        self.fruitless, self.moved = 0, time.monotonic()


def _differ(stores: Collection[ActivationStore]) -> list[str]:
    """Which of subject and site the stores of a sweep differ in."""
    told = {"subject": {store.subject for store in stores}, "site": {store.site.name for store in stores}}
    return [name for name, values in told.items() if len(values) > 1]


def _how(reached: int, outage: bool) -> str:
    """How the cells of a pack go on."""
    if outage:
        return "go on when it answers"
    return "go on from their checkpoints" if reached else "begin again"


def _seconds_left(running: Attempt) -> float:
    progress = running.progress
    assert progress is not None
    tokens = (progress.steps - progress.step) * running.pack.cells[0].batch_tokens
    return tokens / max(1e-9, progress.tokens_per_s)
