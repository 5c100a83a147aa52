"""The one small interface through which a pack reports its curves; wandb_cells.py implements it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from saescale.storage.columns import CurveRow
from saescale.trainers.cell import Cell


class CellLogger(Protocol):
    """Receives what the cells of a pack measure. An implementation may lose data but never raises."""

    def open(self, cells: Sequence[Cell], context: Mapping[str, Any]) -> None:
        """Before the first step. `context`: what all cells share (subject, site, store URL, run directory)."""

    def log(self, cell: Cell, row: CurveRow) -> None:
        """After each evaluation of `cell`."""

    def finish(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """When `cell` has its result (a row of results.parquet, status `done` or `failed`)."""

    def close(self) -> None:
        """When the pack ends, finished or not."""


class NoLogger:
    """Logs nothing: `--wandb off`."""

    def open(self, cells: Sequence[Cell], context: Mapping[str, Any]) -> None: ...

    def log(self, cell: Cell, row: CurveRow) -> None: ...

    def finish(self, cell: Cell, result: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...
