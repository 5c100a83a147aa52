"""What happens after every batch, once the cells have stepped."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L

from saescale.trainers.training.checkpoints import Checkpoints
from saescale.trainers.training.evaluate import Evaluator
from saescale.trainers.training.pack import Pack
from saescale.trainers.training.report import Reporter
from saescale.trainers.training.results import Records


class AfterBatch(L.Callback):
    """Evaluates, records, ends, reports, saves and stops, in this order."""

    def __init__(
        self,
        evaluator: Evaluator,
        records: Records,
        reporter: Reporter,
        checkpoints: Checkpoints,
        should_stop: Callable[[], bool],
    ) -> None:
        self.evaluator, self.records, self.reporter, self.checkpoints = evaluator, records, reporter, checkpoints
        self.should_stop = should_stop

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        assert isinstance(pack, Pack)
        self.evaluator.begin()
        self.reporter.begin(pack)
        self.checkpoints.begin()

    def on_train_batch_end(self, trainer: L.Trainer, pack: L.LightningModule, *_: Any) -> None:
        assert isinstance(pack, Pack)
        stepped = [cell for cell in pack.training_cells if cell.cell.cell_id not in self.records.results]
        for cell, row in self.evaluator.measure(pack, stepped):
            self.records.point(cell, row)
        for cell in stepped:
            if not cell.running:
                self.records.end(cell)
        trainer.should_stop = self.should_stop() or not pack.running
        self.reporter.tell(pack)
        # Cells that ended have their results and need no checkpoint.
        self.checkpoints.save_if_due(pack, at_once=trainer.should_stop)
