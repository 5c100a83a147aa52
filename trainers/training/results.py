"""What a cell leaves in the run directory: its curve as it grows, its weights and its result when it ends."""

from typing import Any

from saescale.scaling.compute import Flops
from saescale.storage.columns import CurveRow
from saescale.storage.manifest import Site
from saescale.storage.rundir import RunDirectory
from saescale.trainers.cell import Cell
from saescale.trainers.exchange import native
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.loggers.interface import CellLogger
from saescale.trainers.training.training_cell import TrainingCell


class Records:
    """Writes into the run, and tells the logger. Raises Superseded where the run's owner lost it (storage/lease.py)."""

    def __init__(self, run: RunDirectory, subject: str, site: Site, logger: CellLogger) -> None:
        self.run, self.subject, self.site, self.logger = run, subject, site, logger
        self.results: dict[str, dict[str, Any]] = {}  # of the cells that ended, by cell_id

    def point(self, cell: TrainingCell, row: CurveRow) -> None:
        """Logs one point of the curve, and writes the curve so far."""
        self.logger.log(cell.cell, row)
        self.run.write_cell_curve(cell.cell.cell_id, [row._asdict() for row in cell.curve])

    def end(self, cell: TrainingCell) -> None:
        """The weights, then the result: a cell counts as finished when its result.json is there."""
        name = cell.cell.cell_id
        last = cell.curve[-1] if cell.curve else None
        result = result_row(
            cell.cell, self.subject, self.site, cell.tokens, cell.flops, cell.wall_s, last, cell.error
        )  # fmt: skip
        if cell.error is None:
            self.run.require_owner()
            native.write(Trained(cell.averaged(), cell.cell), self.run.weights_url(name))
        self.run.write_cell_result(name, result)
        self.results[name] = result
        self.logger.finish(cell.cell, result)


def result_row(
    cell: Cell, subject: str, site: Site, tokens: int, flops: Flops, wall_s: float, last: CurveRow | None,
    error: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The row of a cell that trained on `tokens` tokens in `wall_s` seconds; `last` is its last evaluation.

    With `error`, which says why the cell failed, it measures nothing.
    """
    measured = last if error is None else None
    return {
        "cell_id": cell.cell_id,
        "subject": subject,
        "site": f"{site.hook}.{site.layer}",
        "d_model": cell.d_model,
        "n_latents": cell.n_latents,
        "k": cell.k,
        "architecture": cell.architecture,
        "seed": cell.seed,
        "lr": cell.lr,
        "tokens": tokens,
        "flops": float(flops.sparse),
        "flops_dense": float(flops.dense),
        "nmse": measured.nmse if measured else None,
        "l0": measured.l0 if measured else None,
        "dead_fraction": measured.dead_fraction if measured else None,
        "dead_fraction_long": measured.dead_fraction_long if measured else None,
        "wall_s": wall_s,
        "status": "failed" if error else "done",
        "error": error,
    }
