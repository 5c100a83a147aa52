"""Saves a pack so that it can go on from there after it was killed at any moment."""

import time
from typing import Any

import lightning.pytorch as L
from saescale.storage import checkpoint
from saescale.storage.lease import require_owner
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Batches
from saescale.trainers.training.pack import Pack


class Checkpoint(L.Callback):
    """Saves every running cell each `every_s` seconds, and at once when the pack is asked to stop."""

    def __init__(self, run: RunDirectory, every_s: float, stream: Batches, driver: str | None, start: int) -> None:
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
