"""What happens around a pack's steps, in this order after each batch: evaluate, finish, report, checkpoint."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np

from storage import checkpoint
from storage.activations import ActivationStore
from storage.files import join, remove
from storage.lease import require_owner
from storage.rundir import RunDirectory
from storage.stream import Stream
from trainers.evaluate import HeldOut
from trainers.loggers import CellLogger
from trainers.pack import Pack, TrainingCell
from trainers.results import result_row
from trainers.trained import save_trained


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


class Evaluate(L.Callback):
    """Held-out nmse of every cell that is due, for all of them from one reading; finished cells get their result."""

    def __init__(
        self,
        held_out: HeldOut,
        every_tokens: int,
        run: RunDirectory,
        store: ActivationStore,
        logger: CellLogger,
        driver: str | None,
    ) -> None:
        self.held_out, self.every_tokens = held_out, every_tokens
        self.run, self.store, self.logger, self.driver = run, store, logger, driver
        self.results: dict[str, dict[str, Any]] = {}
        self._last = (time.monotonic(), 0)

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        self._last = (time.monotonic(), 0)

    def on_train_batch_end(self, trainer: L.Trainer, pack: L.LightningModule, *_: Any) -> None:
        assert isinstance(pack, Pack)
        cells = [cell for cell in pack.training_cells if cell.cell.cell_id not in self.results]
        due = [cell for cell in cells if cell.error is None and self._due(cell)]
        if due:
            then, batches = self._last
            elapsed = max(1e-9, time.monotonic() - then)
            rate = (pack.batches - batches) * due[0].cell.batch_tokens / elapsed
            evaluations = self.held_out.evaluate([cell.optimiser for cell in due], pack.centre)
            for cell, evaluation in zip(due, evaluations, strict=True):
                if not np.isfinite(evaluation.nmse):
                    cell.diverge(f"held-out nmse {evaluation.nmse}")
                    continue
                self.logger.log(cell.cell, cell.record(evaluation.nmse, evaluation.l0, rate))
                require_owner(self.run.url, self.driver)
                self.run.write_cell_curve(cell.cell.cell_id, [row._asdict() for row in cell.curve])
            self._last = (time.monotonic(), pack.batches)
        for cell in cells:
            if not cell.running:
                self._finish(cell)

    def _due(self, cell: TrainingCell) -> bool:
        """Whether the last step crossed a multiple of `every_tokens` or was the cell's last."""
        before = cell.tokens - cell.cell.batch_tokens
        return cell.step == cell.cell.steps or cell.tokens // self.every_tokens > before // self.every_tokens

    def _finish(self, cell: TrainingCell) -> None:
        """The weights, then the result: a cell counts as finished when its result.json is there."""
        name, folder = cell.cell.cell_id, self.run.cell_url(cell.cell.cell_id)
        last = cell.curve[-1] if cell.curve else None
        result = result_row(cell.cell, self.store.manifest, cell.tokens, cell.wall_s, last, cell.error)
        require_owner(self.run.url, self.driver)
        if cell.error is None:
            save_trained(join(folder, "sae.safetensors"), cell.optimiser.averaged(), cell.cell)
        self.run.write_cell_result(name, result)
        remove(self.run.checkpoint_url(name))
        self.results[name] = result
        self.logger.finish(cell.cell, result)


class Checkpoint(L.Callback):
    """Saves every running cell each `every_s` seconds, and at once when the pack is asked to stop."""

    def __init__(self, run: RunDirectory, every_s: float, stream: Stream, driver: str | None, start: int) -> None:
        self.run, self.every_s, self.stream, self.driver = run, every_s, stream, driver
        self._whole = start  # the last step that the whole pack has
        self._last = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pack: L.LightningModule, *_: Any) -> None:
        if trainer.should_stop or time.monotonic() - self._last >= self.every_s:
            assert isinstance(pack, Pack)
            self.save(pack)
            self._last = time.monotonic()

    def save(self, pack: Pack) -> None:
        """All running cells at the same step; each keeps the one before that all of them have.

        Raises SaescaleError, which names the file, where one cannot be written; what was saved before stays good.
        """
        # A worker whose driver was lost may live on for a moment beside that of the next driver.
        require_owner(self.run.url, self.driver)
        for cell in pack.running:
            # Not the stream's own index: Lightning has fetched a batch ahead of the step.
            position = self.stream.state() | {"batch": cell.step}
            checkpoint.save(
                self.run.checkpoint_url(cell.cell.cell_id),
                cell.step,
                cell.tensors() | {"centre": pack.centre.b_pre.cpu().numpy()},
                cell.state() | {"variance": pack.centre.variance, "stream": position},
                keep=self._whole,
            )
        self._whole = max((cell.step for cell in pack.running), default=self._whole)


class Report(L.Callback):
    """Tells `report` where the pack stands about twice a second, and stops it when `should_stop` says so."""

    def __init__(
        self, report: Callable[[Progress], None], should_stop: Callable[[], bool], start: int, stream: Stream
    ) -> None:
        self.report, self.should_stop, self.stream = report, should_stop, stream
        self._start = start
        self._began = self._last = time.monotonic()
        self._waited = 0.0
        self._running: list[TrainingCell] = []
        self._trained_before = 0

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        assert isinstance(pack, Pack)
        self._began = self._last = time.monotonic()
        self._waited = self.stream.wait_seconds
        self._running = pack.running
        self._trained_before = _trained_tokens(pack)

    def on_train_batch_end(self, trainer: L.Trainer, pack: L.LightningModule, *_: Any) -> None:
        assert isinstance(pack, Pack)
        # Has to come before the checkpoint callback, which saves when a stop was asked for.
        if self.should_stop() or not pack.running:
            trainer.should_stop = True
        now = time.monotonic()
        if now - self._last >= 0.5 or not pack.running:
            self.report(self._progress(pack, now))
            self._last, self._waited, self._running = now, self.stream.wait_seconds, pack.running

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
