"""What a report says of the evaluations of its cells: a table for each of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from saescale.scaling.report.text import TextTable, scientific
from saescale.scaling.tables import Table, number
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS

_MOST_ROWS = 200  # of what single latents, labels or positions have
_ABREAST = 8  # metrics beside each other: a page of paper takes no more
_KIND, _CELL = ("subject", "site", "architecture"), ("n_latents", "k", "seed")  # what tells cells apart

Row = Mapping[str, Any]


def evaluation_tables(evals: pa.Table, results: Table) -> list[TextTable]:
    """A table for each evaluation of evals.parquet, or several below each other where it has many metrics: a row for
    each cell, a column for each metric of whole cells, with its 95 % interval; where there are none of whole cells, a
    row for each latent, label or position.

    `results` says what the cells are; those that it does not have are left out. What is not shown is counted,
    and what an evaluation left out is said with the reason.
    """
    cells = {cell: row for row, cell in enumerate(results["cell_id"].tolist())} if "cell_id" in results else {}
    found: dict[str, list[Row]] = {}
    for row in evals.to_pylist():
        if row["cell_id"] in cells:
            found.setdefault(row["evaluation"], []).append(row)
    tables = []
    for name, own in found.items():
        own.sort(key=lambda row: _place(results, cells[row["cell_id"]]))
        names = {row["cell_id"]: _cell(results, cells[row["cell_id"]]) for row in own}
        there = [row for row in own if not row.get("left_out")]
        whole = [row for row in there if not row["at"]]
        header, note, lines = _whole(whole, names) if whole else _each(there, names)
        notes = [*_left_out(own), note]
        if left := len(there) - (len(whole) or len(lines)):
            notes.append(f"{left:,} more rows, of single latents, labels or positions, are in evals.parquet.")
        text = " ".join(filter(None, notes))
        for at in range(1, len(header), _ABREAST):
            now = slice(at, at + _ABREAST)
            part = [[line[0], *line[now]] for line in lines]
            title = f"Evaluation {name}" if at == 1 else f"Evaluation {name}, further metrics"
            tables.append(TextTable(title, text if at == 1 else "", (header[0], *header[now]), part))
    return tables


def _whole(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[Sequence[str], str, list[list[str]]]:
    """A row for each cell."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    values = {(row["cell_id"], row["metric"]): _with_interval(row) for row in rows}
    lines = [[names[cell], *(values.get((cell, metric), "") for metric in metrics)] for cell in names]
    samples: dict[int, list[str]] = {}
    for n, metric in dict.fromkeys((row["n"], row["metric"]) for row in rows if row["n"]):
        samples.setdefault(n, []).append(metric)
    each = [f"{n:,}" + (f" ({listed(of, ', ')})" if len(samples) > 1 else "") for n, of in samples.items()]
    return ("cell", *metrics), f"Samples behind a value: {'; '.join(each)}." if each else "", lines


def _each(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[Sequence[str], str, list[list[str]]]:
    """A row for each latent, label or position."""
    shown = sorted(rows[:_MOST_ROWS], key=lambda row: row["metric"])
    lines = [
        [names[row["cell_id"]], row["metric"], row["at"], _number(row["value"]), _interval(row),
         f"{row['n']:,}" if row["n"] else ""]
        for row in shown
    ]  # fmt: skip
    return ("cell", "metric", "of", "value", "95 % interval", COLUMNS["n"].label), "", lines


def _left_out(rows: Sequence[Row]) -> list[str]:
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


def _with_interval(row: Row) -> str:
    interval = _interval(row)
    return _number(row["value"]) + (f" [{interval}]" if interval else "")


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else scientific(value, 4)


def _interval(row: Row) -> str:
    low, high = row["low"], row["high"]
    return " to ".join(map(_number, (low, high))) if low is not None and high is not None else ""
