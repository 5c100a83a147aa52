"""Where a pack stands, for whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from saescale.storage.source import Batches
from saescale.trainers.training.training_cell import TrainingCell

if TYPE_CHECKING:  # those who watch a pack in another process need no Lightning
    from saescale.trainers.training.pack import Pack


class CellProgress(NamedTuple):
    """Where one cell of a pack stands; nmse and dead_fraction are those of its last evaluation."""

    cell_id: str
    step: int
    steps: int
    nmse: float | None
    dead_fraction: float | None


class Progress(NamedTuple):
    """Where a pack stands, for whoever watches it."""

    step: int  # batches of the stream consumed, those of a former life included
    steps: int  # of the longest cell
    tokens_per_s: float  # of the stream; every cell of the pack trains on each token
    running: int
    done: int
    failed: int
    stream_wait: float  # share of the time since the last report that the pack waited for the stream, 0 to 1
    cells: tuple[CellProgress, ...]  # those still running
    ended: tuple[CellProgress, ...]  # those that finished or failed since the last report
    trained_tokens: int  # by this call of train_pack, summed over the cells


class Reporter:
    """Tells `report` where the pack stands about twice a second, and when it ends. `start`: the step it began at."""

    def __init__(self, report: Callable[[Progress], None], start: int, stream: Batches) -> None:
        self.report, self.stream = report, stream
        self._start = start
        self._began = self._last = time.monotonic()
        self._waited = 0.0
        self._running: list[TrainingCell] = []
        self._trained_before = 0
        self._told = 0  # batches of the pack

    def begin(self, pack: Pack) -> None:
        self._began = self._last = time.monotonic()
        self._waited = self.stream.wait_seconds
        self._running = pack.running
        self._trained_before = _trained_tokens(pack)

    def tell(self, pack: Pack) -> None:
        now = time.monotonic()
        if now - self._last >= 0.5 or not pack.running:
            self._say(pack, now)

    def _say(self, pack: Pack, now: float) -> None:
        self.report(self._progress(pack, now))
        self._last, self._waited, self._running = now, self.stream.wait_seconds, pack.running
        self._told = pack.batches

    def tell_rest(self, pack: Pack) -> None:
        """What was done since, where something was, before a wait of any length."""
        if pack.batches != self._told:
            self._say(pack, time.monotonic())

    def _progress(self, pack: Pack, now: float) -> Progress:
        cells = pack.training_cells
        return Progress(
            step=self._start + pack.batches,
            steps=max(cell.cell.steps for cell in cells),
            tokens_per_s=pack.batches * cells[0].cell.batch_tokens / max(1e-9, now - self._began),
            running=len(pack.running),
            done=sum(cell.step == cell.cell.steps for cell in cells),
            failed=sum(cell.error is not None for cell in cells),
            stream_wait=min(1.0, (self.stream.wait_seconds - self._waited) / max(1e-9, now - self._last)),
            cells=tuple(_cell_progress(cell) for cell in pack.running),
            ended=tuple(_cell_progress(cell) for cell in self._running if not cell.running),
            trained_tokens=_trained_tokens(pack) - self._trained_before,
        )


def _trained_tokens(pack: Pack) -> int:
    return sum(cell.tokens for cell in pack.training_cells)


def _cell_progress(cell: TrainingCell) -> CellProgress:
    last = cell.curve[-1] if cell.curve else None
    return CellProgress(
        cell_id=cell.cell.cell_id,
        step=cell.step,
        steps=cell.cell.steps,
        nmse=last.nmse if last else None,
        dead_fraction=last.dead_fraction if last else None,
    )
