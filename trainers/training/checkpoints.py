"""Saves a pack so that it can go on from there after it was killed at any moment, and takes it up again."""

import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from saescale.storage import checkpoint
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Batches
from saescale.trainers.cell import Cell
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.pack import Pack


class Checkpoints:
    """Saves every running cell each `every_s` seconds; `start` is the step that the pack started from."""

    def __init__(self, run: RunDirectory, every_s: float, stream: Batches, start: int) -> None:
        self.run, self.every_s, self.stream = run, every_s, stream
        self._whole = start  # the last step that the whole pack has
        self._last = time.monotonic()

    def begin(self) -> None:
        self._last = time.monotonic()

    def save_if_due(self, pack: Pack, at_once: bool) -> None:
        if at_once or time.monotonic() - self._last >= self.every_s:
            self.save(pack)
            self._last = time.monotonic()

    def save(self, pack: Pack) -> None:
        """All running cells at the same step; each keeps the one before that all of them have.

        Raises SaescaleError, which names the file, where one cannot be written, and Superseded (lease.py); what was
        saved before stays good.
        """
        for cell in pack.running:
            # Not the stream's own index: Lightning has fetched a batch ahead of the step.
            position = self.stream.state() | {"batch": cell.step}
            self.run.save_checkpoint(
                cell.cell.cell_id,
                cell.step,
                cell.tensors() | {"pack.centre": pack.centre.b_pre.cpu().numpy()},
                cell.state() | {"variance": pack.centre.variance, "stream": position},
                keep=self._whole,
            )
        self.stream.passed(self._whole)  # to which one that is damaged would go back
        self._whole = max((cell.step for cell in pack.running), default=self._whole)


class Resumed(NamedTuple):
    pack: Pack
    step: int
    position: dict[str, Any]  # of the stream


def resume(run: RunDirectory, cells: Sequence[Cell], device: torch.device) -> Resumed | None:
    """The pack at the last step that all cells have a good checkpoint of; None where there is no such step.

    Good means undamaged and, for all cells, from the same order of the stream.
    """
    urls = [run.checkpoint_url(cell.cell_id) for cell in cells]
    steps = [set(checkpoint.steps(url)) for url in urls]
    common = set.intersection(*steps)
    if not common and all(steps):
        text = f"the {len(cells)} cells of a pack have no checkpoint at a common step and start from the beginning"
        warnings.warn(text, SaescaleWarning, stacklevel=2)
    for step in sorted(common, reverse=True):
        try:
            return _restore(urls, cells, step, device)
        except SaescaleError as error:
            text = f"checkpoint at step {step} cannot be used, going back to the one before or to the start: {error}"
            warnings.warn(text, SaescaleWarning, stacklevel=2)
    return None


def _restore(urls: Sequence[str], cells: Sequence[Cell], step: int, device: torch.device) -> Resumed:
    """Cell by cell, so that the states of two are never in memory beside the pack. Raises SaescaleError."""
    tensors, state, _ = checkpoint.load(urls[0], step)
    position = state.get("stream", {})
    if not position or "variance" not in state:
        raise SaescaleError(f"{urls[0]} does not say the order of its data or the scale of its loss")
    # The centre too comes from the checkpoint, so that the pack goes on with the same bits.
    pack = Pack(cells, Centre(torch.from_numpy(tensors["pack.centre"]), state["variance"]), device)
    for training_cell, url in zip(pack.training_cells, urls, strict=True):
        tensors, state, _ = checkpoint.load(url, step)
        if state.get("stream") != position:
            raise SaescaleError(f"{url} names another order of its data than the rest of the pack, or none")
        try:
            training_cell.restore(tensors, state)
        except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or has another shape
            raise SaescaleError(f"{url} holds no checkpoint of this cell ({one_line(error)})") from error
    return Resumed(pack, step, position)
