"""Where a sweep stands, as its driver tells it: what the workers say of their packs, and what that comes to."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from saescale.cluster.crew.train_worker import WorkerInfo, WorkerState
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.packing import cost
from saescale.storage.lease import RunningCell, RunningWorker, Standing
from saescale.trainers.cell import Cell
from saescale.trainers.training.report import Progress

ANSWER_S = 0.2  # that workers get to say where they stand


class Pack(NamedTuple):
    """Cells that wait for a worker to train them together."""

    cells: list[Cell]
    bytes: float  # that it takes of a worker's memory
    cost: float  # FLOPs
    reached: int  # sum of the checkpointed steps of its cells when the attempt began
    attempt: int = 1  # since the pack last got further
    due: float = 0.0  # not to be begun before, in time.monotonic()


@dataclass
class Attempt:
    """A pack that a worker trains."""

    worker: Any  # Ray's handle of a train_worker.Worker
    pack: Pack
    number: int  # of this attempt, for Worker.part
    heard: float  # when it last got something done
    progress: Progress | None = None  # what it last said
    moved: bool = False  # whether it made a step between the last two answers
    parting: bool = False  # asked to stop, to be split
    question: Any = None  # the reference of `state`, until it is answered
    killed: float | None = None  # when


class Work(NamedTuple):
    """What a call has to do: `cells`, which cost `total` FLOPs, of which `before` were done before it."""

    cells: list[Cell]
    total: float
    before: float


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
    done = sum(cost(cell) for cell in work.cells if cell.cell_id in ledger.results)
    statuses = [result["status"] for result in ledger.results.values()]
    standing = Standing(cells=len(ledger.cells), done=statuses.count("done"), failed=statuses.count("failed"))
    for attempt in running:
        if (progress := attempt.progress) is None:
            continue
        name = ready[attempt.worker].name
        cells = [cell for cell in attempt.pack.cells if cell.cell_id not in ledger.results]
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
    standing.fraction = min(1.0, max(0.0, done - work.before) / max(1.0, work.total - work.before))
    return standing
