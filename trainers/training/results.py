"""What a cell leaves in the run directory: its curve as it grows, its weights and its result when it ends."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

from saescale.scaling.compute import Flops
from saescale.storage.columns import RESULTS, CurveRow
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.loggers.interface import CellLogger
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.training.training_cell import TrainingCell
from saescale.trainers.training.weights import write_weights


class Provenance(NamedTuple):
    """Where the numbers of a cell come from."""

    subject: str
    site: str
    corpus: str | None  # None: not known
    heldout_rows: int

    @classmethod
    def of(cls, source: Source, heldout_rows: int) -> Self:
        """nmse is measured on the first `heldout_rows` of that source."""
        corpus = source.manifest.corpus if isinstance(source, ActivationStore) else None
        return cls(source.subject, source.site.name, corpus, heldout_rows)


class Records:
    """Writes into the run, and tells the logger. Raises Superseded where the run's owner lost it.

    Of processes that share a cell the first one writes, but for the weights, of which each shard writes its own.
    """

    def __init__(
        self, run: RunDirectory, provenance: Provenance, logger: CellLogger, group: Group = ONE
    ) -> None:  # fmt: skip
        self.run, self.provenance, self.logger, self.group = run, provenance, logger, group
        self.results: dict[str, dict[str, Any]] = {}  # of the cells that ended, by cell_id

    def point(self, cell: TrainingCell, row: CurveRow) -> None:
        """Logs one point of the curve, and writes the curve so far."""
        if self.group.rank:
            return
        self.logger.log(cell.cell, row)
        self.run.write_cell_curve(cell.cell.cell_id, [row._asdict() for row in cell.curve])

    def end(self, cell: TrainingCell) -> None:
        """The weights, then the result: a cell counts as finished when its result.json is there."""
        name = cell.cell.cell_id
        last = cell.curve[-1] if cell.curve else None
        result = result_row(
            cell.cell, self.provenance, cell.tokens, cell.flops, cell.wall_s, last, cell.error, device=cell.device_kind,
            levels=cell.levels,
        )  # fmt: skip
        weights = None
        if cell.error is None:
            self.run.require_owner()
            trained, folder = Trained(cell.averaged(), cell.cell), self.run.cell_url(name)
            weights = write_weights(trained, folder, partial(self.run.name_now, name), cell.common, self.group)
        if self.group.rank == 0:
            self.run.write_cell_result(name, result, weights=weights)
            self.logger.finish(cell.cell, result)
        self.results[name] = result


def result_row(
    cell: Cell,
    provenance: Provenance,
    tokens: int,
    flops: Flops,
    wall_s: float,
    last: CurveRow | None,
    error: str | None,
    device: str | None = None,
    levels: Sequence[Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The row of a cell that trained on `tokens` tokens in `wall_s` seconds on a `device` of that kind; `last` is its
    last evaluation, `levels` that at its end of all sparsities that it serves.

    With `error`, which says why the cell failed, it measures nothing.
    """
    measured = last if error is None else None
    return {
        "cell_id": cell.cell_id,
        **provenance._asdict(),
        **_defined(cell),
        "tokens": tokens,
        "flops": float(flops.sparse),
        "flops_dense": float(flops.dense),
        "nmse": measured.nmse if measured else None,
        "l0": measured.l0 if measured else None,
        "l0_error": measured.l0 / cell.k - 1 if measured and cell.whole_settings.k_is_target else None,
        "levels": json.dumps(levels) if measured and levels else None,
        "dead_fraction": measured.dead_fraction if measured else None,
        "dead_fraction_long": measured.dead_fraction_long if measured else None,
        "coefficient": measured.coefficient if measured else None,
        "wall_s": wall_s,
        "device": device,
        "status": "failed" if error else "done",
        "error": error,
    }


# Settings of architectures that have a column, and what stands in it.
_COLUMNS = {"k_aux": int, "auxk_coefficient": float}


def _defined(cell: Cell) -> dict[str, Any]:
    """The fields and settings of a cell that have a column, and all others as JSON."""
    whole = cell.whole_settings.model_dump(mode="json", exclude={"k"})
    own = {name: whole.pop(name) for name, kind in _COLUMNS.items() if isinstance(whole.get(name), kind)}
    fields = cell.model_dump(mode="json", exclude={"settings", "heldout_rows"})
    there = {name: value for name, value in fields.items() if name in RESULTS.names}
    others = {name: value for name, value in fields.items() if name not in RESULTS.names} | whole
    return there | own | {"settings": json.dumps(others, sort_keys=True)}
