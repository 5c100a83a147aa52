"""Saves a pack so that it can go on from there after it was killed at any moment, and takes it up again."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saescale.storage import checkpoint
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Batches
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.mesh import ONE, Group, Mesh
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.pack import Pack
from saescale.trainers.training.training_cell import TrainingCell


class Checkpoints:
    """Saves every running cell each `every_s` seconds; `start` is the step that the pack started from."""

    def __init__(
        self, run: RunDirectory, every_s: float, stream: Batches, start: int, group: Group = ONE
    ) -> None:  # fmt: skip
        self.run, self.every_s, self.stream, self.group = run, every_s, stream, group
        self._whole = start  # the last step that the whole pack has
        self._last = time.monotonic()

    def begin(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every_s

    def save(self, pack: Pack) -> None:
        """All running cells at the same step; each keeps the one before that all of them have.

        Raises SaescaleError, which names the file, where one cannot be written, and Superseded (lease.py); what was
        saved before stays good.
        """
        for cell in pack.running:
            # Not the stream's own index: Lightning has fetched a batch ahead of the step.
            position = self.stream.state() | {"batch": cell.step}
            centre: dict[str, np.ndarray] = {"pack.centre": pack.centre.b_pre.cpu().numpy()}
            state = cell.state() | {"variance": pack.centre.variance, "stream": position}
            if cell.sae.mesh.alone:
                name = cell.cell.cell_id
                self.run.save_checkpoint(name, cell.step, {**cell.tensors(), **centre}, state, keep=self._whole)
            else:
                self._save_parts(cell, centre if cell.sae.mesh.shard == 0 else {}, state)
        self.stream.passed(self._whole)  # to which one that is damaged would go back
        self._whole = max((cell.step for cell in pack.running), default=self._whole)
        self._last = time.monotonic()

    def save_waiting(self, pack: Pack) -> None:
        """While rows are waited for: what was done since is saved, and then the newest of what was saved counts. Else a
        live source would keep for the older one what has to go before there is room for those rows."""
        if max((cell.step for cell in pack.running), default=self._whole) > self._whole:
            self.save(pack)
        else:
            self.stream.passed(self._whole)
            self._last = time.monotonic()

    def _save_parts(self, cell: TrainingCell, more: Mapping[str, np.ndarray], state: dict[str, Any]) -> None:
        """Each shard what it has; replicas have the same, so the first ones write. The first process says it counts."""
        name, mesh = cell.cell.cell_id, cell.sae.mesh
        part = None
        if mesh.replica == 0:
            tensors = {**cell.tensors(), **more}
            part = self.run.write_checkpoint_part(name, cell.step, tensors, mesh.shard, mesh.shards)
        parts = [part for part in self.group.tell(part) if part is not None]
        if self.group.rank == 0:
            self.run.commit_checkpoint(name, cell.step, parts, state, keep=self._whole)


class Resumed(NamedTuple):
    pack: Pack
    step: int
    position: dict[str, Any]  # of the stream


def resume(run: RunDirectory, cells: Sequence[Cell], device: torch.device, group: Group = ONE) -> Resumed | None:
    """The pack at the last step that all cells have a good checkpoint of; None where there is no such step.

    Good means undamaged and, for all cells, from the same order of the stream. Processes that share the cells go back
    to one step, whatever number of them saved it.
    """
    urls = [run.checkpoint_url(cell.cell_id) for cell in cells]
    steps = [set(checkpoint.steps(url)) for url in urls]
    common = set.intersection(*steps)
    if not common and all(steps):
        text = f"the {len(cells)} cells of a pack have no checkpoint at a common step and start from the beginning"
        warnings.warn(text, SaescaleWarning, stacklevel=2)
    for step in group.tell_first(sorted(common, reverse=True)):
        resumed = fault = None
        # Before anything is built, which takes all processes: a file may be damaged that only one of them reads.
        faults = [said for said in group.tell(_fault(urls, cells, step, group)) if said is not None]
        try:
            if faults:
                raise SaescaleError(faults[0])
            resumed = _restore(urls, cells, step, device, group)
        except SaescaleError as error:
            fault = str(error)
        faults = [said for said in group.tell(fault) if said is not None]
        if resumed is not None and not faults:
            return resumed
        text = f"checkpoint at step {step} cannot be used, going back to the one before or to the start: {faults[0]}"
        warnings.warn(text, SaescaleWarning, stacklevel=2)
    return None


def _fault(urls: Sequence[str], cells: Sequence[Cell], step: int, group: Group) -> str | None:
    """What is wrong with the files that this process of several needs; one alone sees it when it restores."""
    if group is ONE:
        return None
    try:
        for url, cell in zip(urls, cells, strict=True):
            checkpoint.load(url, step, _own(group.mesh(cell.n_latents), cell))
    except SaescaleError as error:
        return str(error)
    return None


def _restore(urls: Sequence[str], cells: Sequence[Cell], step: int, device: torch.device, group: Group) -> Resumed:
    """Cell by cell, so that the states of two are never in memory beside the pack. Raises SaescaleError."""
    tensors, state, _ = checkpoint.load(urls[0], step, _own(group.mesh(cells[0].n_latents), cells[0]))
    position = state.get("stream", {})
    if not position or "variance" not in state:
        raise SaescaleError(f"{urls[0]} does not say the order of its data or the scale of its loss")
    # The centre too comes from the checkpoint, so that the pack goes on with the same bits.
    pack = Pack(cells, Centre(torch.from_numpy(tensors["pack.centre"]), state["variance"]), device, group)
    for training_cell, url in zip(pack.training_cells, urls, strict=True):
        own = _own(training_cell.sae.mesh, training_cell.cell)
        tensors, state, _ = checkpoint.load(url, step, own)
        if state.get("stream") != position:
            raise SaescaleError(f"{url} names another order of its data than the rest of the pack, or none")
        try:
            training_cell.restore(tensors, state)
        except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or has another shape
            raise SaescaleError(f"{url} holds no checkpoint of this cell ({one_line(error)})") from error
    return Resumed(pack, step, position)


def _own(mesh: Mesh, cell: Cell) -> slice | None:
    """The latents of the cell that this process holds; None for all."""
    return None if mesh.shards == 1 else slice(mesh.first, mesh.first + mesh.here(cell.n_latents))
