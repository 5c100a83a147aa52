"""What a report says of the evaluations of its cells: a table for each of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from saescale.scaling.report.text import TextTable, scientific
from saescale.scaling.tables import Table, number
from saescale.storage.columns import COLUMNS

_MOST_ROWS = 200
_KIND, _CELL = ("subject", "site", "architecture"), ("n_latents", "k", "seed")  # what tells cells apart


def evaluation_tables(evals: pa.Table, results: Table) -> list[TextTable]:
    """One table for each evaluation of evals.parquet: a row for each cell and metric, with its 95 % interval.

    `results` says what the cells are; those that it does not have are left out. Where an evaluation measured single
    latents, labels or positions besides whole cells, only the latter are shown, and the note says so, as it says what
    was left out.
    """
    cells = {cell: row for row, cell in enumerate(results["cell_id"].tolist())} if "cell_id" in results else {}
    rows = [row for row in evals.to_pylist() if row["cell_id"] in cells]
    found = []
    for name in dict.fromkeys(row["evaluation"] for row in rows):
        asked = [row for row in rows if row["evaluation"] == name]
        own = [row for row in asked if not row.get("left_out")]
        shown = ([row for row in own if not row["at"]] or own)[:_MOST_ROWS]
        shown.sort(key=lambda row: (row["metric"], _place(results, cells[row["cell_id"]]), row["at"] or ""))
        described = any(row["at"] for row in shown)
        left = len(own) - len(shown)
        more = [f"{left:,} more rows, of single latents, labels or positions, are in evals.parquet."] if left else []
        note = " ".join([*_left_out(asked), *more])
        header = ("cell", "metric", *(("of",) if described else ()), "value", "95 % interval", COLUMNS["n"].label)
        lines = []
        for row in shown:
            of = (row["at"] or "",) if described else ()
            ends, samples = _interval(row["low"], row["high"]), f"{row['n']:,}" if row["n"] else ""
            lines.append(
                [_cell(results, cells[row["cell_id"]]), row["metric"], *of, _number(row["value"]), ends, samples]
            )
        found.append(TextTable(f"Evaluation {name}", note, header, lines))
    return found


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason why there is something that is not in the table."""
    cells = len({row["cell_id"] for row in rows})
    found = Counter((row["metric"], row["left_out"]) for row in rows if row.get("left_out"))
    return [
        f"No {metric}{'' if lacking == cells else f' of {lacking} of {cells} cells'}: {why}."
        for (metric, why), lacking in sorted(found.items())
    ]


def _place(results: Table, row: int) -> tuple[str | float, ...]:
    kind = [str(results[name][row]) for name in _KIND if name in results]
    return (*kind, *(float(results[name][row]) for name in _CELL if name in results))


def _cell(results: Table, row: int) -> str:
    """Such as "N = 512, k = 8", with what else the cells differ in before it and behind it."""
    parts = []
    for name in (*_KIND, *_CELL):
        if name in results and (name in ("n_latents", "k") or len(np.unique(results[name])) > 1):
            value = results[name][row]
            text = str(value) if results[name].dtype.kind == "U" else number(float(value))
            parts.append(text if name in _KIND else f"{COLUMNS[name].label} = {text}")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else scientific(value, 5)


def _interval(low: float | None, high: float | None) -> str:
    return " to ".join(map(_number, (low, high))) if low is not None and high is not None else ""
