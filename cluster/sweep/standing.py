"""Where a sweep stands, as its driver tells it: what the workers say of their packs, and what that comes to."""

import time
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from saescale.cluster.crew.train_worker import WorkerInfo, WorkerState
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.packing import cost
from saescale.scaling.words import counted
from saescale.storage.errors import Unavailable
from saescale.storage.lease import LiveStanding, RunningCell, RunningWorker, Standing
from saescale.storage.live import LiveSource, read_making
from saescale.storage.waiting import SAY_AFTER_S, Wait
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.report import Progress

ANSWER_S = 0.2  # that workers get to say where they stand
ASK_S = 5.0  # between two looks at what producers of live sources say


class Pack(NamedTuple):
    """Cells that wait for a worker to train them together."""

    cells: list[Cell]
    bytes: float  # that it takes of a worker's memory
    cost: float  # FLOPs
    reached: int  # sum of the checkpointed steps of its cells when the attempt began
    attempt: int = 1  # since the pack last got further
    due: float = 0.0  # not to be begun before, in time.monotonic()
    why: str = ""  # what kept it from going on at once
    layout: Layout = Layout()  # of the workers that it takes

    @property
    def store(self) -> str:
        """The fingerprint of the one that its cells are trained on."""
        return self.cells[0].store


@dataclass
class Attempt:
    """A pack that a worker trains, or the first of those that share it."""

    worker: Any  # Ray's handle of a train_worker.Worker
    pack: Pack
    number: int  # of this attempt, for Worker.part
    heard: float  # when it last got something done
    progress: Progress | None = None  # what it last said
    moved: bool = False  # whether it made a step between the last two answers
    parting: bool = False  # asked to stop, to be split
    waits: tuple[Wait, ...] = ()  # what it said that it waits for
    question: Any = None  # the reference of `state`, until it is answered
    killed: float | None = None  # when
    company: dict[Any, Any] = field(default_factory=dict)  # the others of a mesh, by the references of their `train`
    left: set[Any] = field(default_factory=set)  # of these those that have ended
    broken: float | None = None  # since when one of them has failed


class Work:
    """What a call has to do: `cells`, what each costs in FLOPs, and how far each is by what was last heard of it.

    newest: the steps that are behind the checkpoints of cells, which is done, but not by this call.
    """

    def __init__(self, cells: list[Cell], newest: Mapping[str, int]) -> None:
        self.cells, self.steps = cells, dict(newest)
        self._costs = {cell.cell_id: cost(cell) for cell in cells}
        self._total, self._before = sum(self._costs.values()), self._done({})

    def heard(self, cells: Iterable[Cell], step: int) -> None:
        """Cells of a pack are at `step` of the stream; a pack that begins again somewhere may be further back."""
        self.steps |= {cell.cell_id: step for cell in cells}

    def fraction(self, results: Container[str]) -> float:
        """Of the FLOPs that this call found undone, those that are done, where `results` have ended."""
        done = self._done(results) - self._before
        return min(1.0, max(0.0, done) / max(1.0, self._total - self._before))

    def _done(self, results: Container[str]) -> float:
        return sum(
            self._costs[cell.cell_id] * (1.0 if cell.cell_id in results else self._share(cell)) for cell in self.cells
        )

    def _share(self, cell: Cell) -> float:
        return min(1.0, self.steps.get(cell.cell_id, 0) / cell.steps)


def ask(running: Collection[Attempt]) -> list[str]:
    """Asks every worker where it stands, and returns what its pack has warned of.

    Of one that is too busy to answer at once, what it last said counts.
    """
    for attempt in running:
        attempt.moved = False
        attempt.question = attempt.question or attempt.worker.state.remote()
    asked = {attempt.question: attempt for attempt in running}
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    now = time.monotonic()
    notes: list[str] = []
    for answer in answers:
        attempt = asked[answer]
        attempt.question = None
        try:
            state: WorkerState = ray.get(answer)
        except ray.exceptions.RayError:
            continue  # the worker just died: its pack's reference will say so
        notes += state.notes
        attempt.waits = state.waits
        attempt.heard = max(attempt.heard, now - state.quiet_s)
        if state.progress is not None:
            attempt.moved = attempt.progress is None or state.progress.step > attempt.progress.step
            attempt.progress = state.progress
    return notes


def standing_of(
    ledger: Ledger,
    running: Collection[Attempt],
    ready: Mapping[Any, WorkerInfo],
    work: Work,
) -> Standing:
    """How far the sweep is."""
    statuses = [result["status"] for result in ledger.results.values()]
    standing = Standing(cells=len(ledger.cells), done=statuses.count("done"), failed=statuses.count("failed"))
    for attempt in running:
        if (progress := attempt.progress) is None:
            continue
        name = ready[attempt.worker].name
        work.heard(attempt.pack.cells, progress.step)
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
    standing.fraction = work.fraction(ledger.results)
    return standing


def waits_of(running: Collection[Attempt], ready: Mapping[Any, WorkerInfo], stalled_after_s: float) -> list[Wait]:
    """What workers wait for, as they say; of one that says nothing and gets nothing done, that."""
    late = time.monotonic() - SAY_AFTER_S
    found: dict[str, list[Wait]] = defaultdict(list)
    for attempt in running:
        name, heard = ready[attempt.worker].name, time.time() - (time.monotonic() - attempt.heard)
        for wait in attempt.waits:
            found[wait.what].append(wait)
        if not attempt.waits and attempt.heard < late:
            what = f"worker {name} to get a batch done"
            found[what].append(Wait(what, heard, heard + stalled_after_s))
    return [_together(what, several, len(running)) for what, several in found.items()]


def next_tries(waiting: Collection[Pack], moved: float, outage_s: float) -> list[Wait]:
    """Where no worker works: which packs' next try is waited for, and why; a sweep ends where nothing `moved`, in
    time.monotonic(), for so long."""
    tried = [pack for pack in waiting if pack.why]
    quiet = time.time() - (time.monotonic() - moved)
    packs = counted(len(tried), "pack")
    return [Wait(f"the next try of {packs} ({tried[0].why})", quiet, quiet + outage_s)] if tried else []


class Producers:
    """Those of a sweep's live sources."""

    def __init__(self, ledger: Ledger) -> None:
        self._live = [store for store in ledger.stores.values() if isinstance(store, LiveSource)]
        self._asked, self._said = 0.0, list[LiveStanding]()

    def standing(self) -> list[LiveStanding]:
        """What they say, asked for at times."""
        if time.monotonic() - self._asked > ASK_S:
            self._asked = time.monotonic()
            with suppress(Unavailable):
                said = [(store.fingerprint, read_making(store.url)) for store in self._live]
                self._said = [
                    LiveStanding(source=name, **making.model_dump(include=set(LiveStanding.model_fields)))
                    for name, making in said
                    if making is not None
                ]
        return self._said


def _together(what: str, waits: Sequence[Wait], workers: int) -> Wait:
    of = f" ({len(waits)} of {workers} workers)" if workers > 1 and not what.startswith("worker ") else ""
    return Wait(what + of, min(wait.since for wait in waits), waits[0].until)
