"""A pack: cells trained side by side from one pass over the stream, as one LightningModule.

One batch in, every cell steps. Cells share the data order and the preprocessing and nothing else, so a cell's
result does not depend on the company it was trained in.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from saescale.storage.errors import one_line
from saescale.storage.source import Batches
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.cell import Cell
from saescale.trainers.device import spoils_the_process
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.preprocess import Centre, normalise, to_tensor
from saescale.trainers.training.training_cell import TrainingCell


class RawBatch(NamedTuple):
    """As a source holds them, 16-bit: x [batch, d_model], and target [batch, d_target] where there is one."""

    x: Tensor
    target: Tensor | None = None


class Pack(L.LightningModule):
    """Trains all its cells on each batch."""

    def __init__(self, cells: Sequence[Cell], centre: Centre, device: torch.device, group: Group = ONE) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.centre = Centre(centre.b_pre.to(device), centre.variance)
        self.training_cells = [TrainingCell(cell, self.centre, device, group.mesh(cell.n_latents)) for cell in cells]
        self.bf16 = any(cell.precision == "bf16" for cell in cells)
        self.batches = 0  # in this process; a resumed pack starts at 0 again

    @property
    def running(self) -> list[TrainingCell]:
        return [cell for cell in self.training_cells if cell.running]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None that Lightning should step: each cell has its own (optimiser.py)."""
        return []

    def training_step(self, raw: RawBatch, batch_index: int) -> None:
        target = None if raw.target is None else normalise(raw.target)
        batch = Batch.of(normalise(raw.x), self.centre.b_pre, self.bf16, target)
        for cell in self.running:
            try:
                cell.train_on(batch)
            except Exception as error:
                # Of a mesh the other processes wait for this one, which has to end.
                if spoils_the_process(error) or not cell.sae.mesh.alone:
                    raise
                # Whatever it is, it is this cell's: the others share nothing with it but the batch.
                cell.fail(f"{type(error).__name__}: {one_line(error)[:500]}")
        self.batches += 1


class _StreamDataset(IterableDataset[RawBatch]):
    def __init__(self, stream: Batches, dtype: str, pin: bool) -> None:
        self.stream, self.dtype, self.pin = stream, dtype, pin

    def __iter__(self) -> Iterator[RawBatch]:
        for x, target in self.stream:
            yield RawBatch(self._raw(x), None if target is None else self._raw(target))

    def _raw(self, act: np.ndarray) -> Tensor:
        raw = to_tensor(act, self.dtype)
        return raw.pin_memory() if self.pin else raw


def stream_loader(stream: Batches, dtype: str, device: torch.device) -> DataLoader[RawBatch]:
    """The stream as Lightning takes it; reading stays in the stream's own prefetch thread."""
    return DataLoader(_StreamDataset(stream, dtype, pin=device.type == "cuda"), batch_size=None, num_workers=0)
