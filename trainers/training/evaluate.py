"""Held-out nmse of the cells that are due, for all of them from one reading."""

import time

import numpy as np

from saescale.storage.columns import CurveRow
from saescale.trainers.device import return_freed_memory
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.training.pack import Pack
from saescale.trainers.training.training_cell import TrainingCell


class Evaluator:
    """Measures the cells of a pack each `every_tokens` tokens, and at their end."""

    def __init__(self, held_out: HeldOut, every_tokens: int) -> None:
        self.held_out, self.every_tokens = held_out, every_tokens
        self._last = (time.monotonic(), 0)

    def begin(self) -> None:
        return_freed_memory()
        self._last = (time.monotonic(), 0)

    def measure(self, pack: Pack, stepped: list[TrainingCell]) -> list[tuple[TrainingCell, CurveRow]]:
        """A new point of its curve for each cell of `stepped`, those of the last batch, that is due.

        A cell whose nmse is not finite fails.
        """
        due = [cell for cell in stepped if cell.error is None and self._due(cell)]
        if not due:
            return []
        # Steps and evaluations take blocks of other sizes, of which neither finds room in what the other leaves.
        return_freed_memory()
        then, batches = self._last
        elapsed = max(1e-9, time.monotonic() - then)
        rate = (pack.batches - batches) * due[0].cell.batch_tokens / elapsed
        qualities = self.held_out.evaluate([cell.averaged for cell in due], pack.centre.b_pre, pack.bf16)
        self._measure_levels(
            pack, [cell for cell in due if cell.step == cell.cell.steps and cell.sae.settings.levels()]
        )
        rows = []
        for cell, quality in zip(due, qualities, strict=True):
            if np.isfinite(quality.nmse):
                rows.append((cell, cell.record(quality.nmse, quality.l0, rate)))
            else:
                cell.diverge(f"held-out nmse {quality.nmse}")
        return_freed_memory()
        self._last = (time.monotonic(), pack.batches)
        return rows

    def _measure_levels(self, pack: Pack, ended: list[TrainingCell]) -> None:
        """With the averaged weights of each, at all sparsities that it serves."""
        for cell in ended:
            cell.levels = self.held_out.levels(cell.averaged(), pack.centre.b_pre, pack.bf16)

    def _due(self, cell: TrainingCell) -> bool:
        """Whether the last step crossed a multiple of `every_tokens` or was the cell's last."""
        before = cell.tokens - cell.cell.batch_tokens
        return cell.step == cell.cell.steps or cell.tokens // self.every_tokens > before // self.every_tokens
