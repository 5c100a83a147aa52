"""What happens after every batch, once the cells have stepped."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L

from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.training.checkpoints import Checkpoints
from saescale.trainers.training.evaluate import Evaluator
from saescale.trainers.training.pack import Pack
from saescale.trainers.training.report import Reporter
from saescale.trainers.training.results import Records

_LOOK_S = 0.2  # between two looks, while rows are waited for, whether to save or to stop


class AfterBatch(L.Callback):
    """Evaluates, records, ends, reports, saves and stops, in this order."""

    def __init__(
        self,
        evaluator: Evaluator,
        records: Records,
        reporter: Reporter,
        checkpoints: Checkpoints,
        should_stop: Callable[[], bool],
        group: Group = ONE,
    ) -> None:
        self.evaluator, self.records, self.reporter, self.checkpoints = evaluator, records, reporter, checkpoints
        self.should_stop, self.group = should_stop, group

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        assert isinstance(pack, Pack)
        self.evaluator.begin()
        self.reporter.begin(pack)
        self.checkpoints.begin()

    def wait(self, pack: Pack, there: Callable[[float], bool]) -> None:
        """Rows are needed: until they are there. Processes that share the cells need the same ones at the same batch,
        and wait for the last of them together, so that all of them save, or stop, or none."""
        while not self.group.all(there(_LOOK_S)):
            self.reporter.tell_rest(pack)
            stop, due = self.group.agree([self.should_stop(), self.checkpoints.due()])
            if stop:
                self.checkpoints.stream.close()  # the batch that is at hand is the last one, after which all is saved
            elif due:
                self.checkpoints.save_waiting(pack)

    def on_train_batch_end(self, trainer: L.Trainer, pack: L.LightningModule, *_: Any) -> None:
        assert isinstance(pack, Pack)
        stepped = [cell for cell in pack.training_cells if cell.cell.cell_id not in self.records.results]
        for cell, row in self.evaluator.measure(pack, stepped):
            self.records.point(cell, row)
        for cell in stepped:
            if not cell.running:
                self.records.end(cell)
        # Clocks and signals are each process' own, so of a mesh the first one's count.
        stop, due = self.group.agree([self.should_stop(), self.checkpoints.due()])
        trainer.should_stop = stop or not pack.running
        self.reporter.tell(pack)
        # Cells that ended have their results and need no checkpoint.
        if due or trainer.should_stop:
            self.checkpoints.save(pack)
