"""Held-out nmse of every cell that is due, and the results of those that finished."""

import time
from typing import Any

import lightning.pytorch as L
import numpy as np
from saescale.storage.files import join, remove
from saescale.storage.lease import require_owner
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange.native import save_trained
from saescale.trainers.loggers.interface import CellLogger
from saescale.trainers.training.pack import Pack
from saescale.trainers.training.results import result_row
from saescale.trainers.training.training_cell import TrainingCell


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
