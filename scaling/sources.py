"""Where laws take their cells from: run directories, tables and W&B projects, one or several together."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from saescale.scaling.kinds import TOLD_APART
from saescale.scaling.reading import is_table, read_file
from saescale.scaling.repeats import Loaded, once
from saescale.scaling.tables import Table, check_cells, known, load_curves, load_results, number
from saescale.scaling.where import Condition, select_where
from saescale.storage.columns import EVALS
from saescale.storage.errors import SaescaleError
from saescale.storage.files import join
from saescale.storage.rundir import METRICS, RunDirectory

Reader = Callable[[str], Loaded]
_PREFIX = "wandb:"


def load_sources(
    sources: Sequence[str], wandb: Reader | None = None, where: Sequence[Condition] = ()
) -> tuple[Table, Table | None]:
    """(cells, curves or None) of one or more sources: run directories, tables (see reading.py), wandb:entity/project.

    `wandb` reads a project by what follows the prefix. A cell that is there twice, in one source or in two, counts once
    (repeats.py). Cells of several sources are put together under the columns that all of them have, and those that tell
    cells apart. Without a column `subject` a source's cells are of a subject of the source's name, so that several of
    them are not taken for one. Of all that `where` selects. Raises SaescaleError.
    """
    if not sources:
        raise SaescaleError("no source; name a run directory, a .csv or .parquet table, or wandb:entity/project")
    repeated = [source for source, count in Counter(sources).items() if count > 1]
    sources = list(dict.fromkeys(sources))
    loaded, notes = once([_load(source, wandb) for source in sources])
    notes = [*(f"{source} is named several times and read once" for source in repeated), *notes]
    curves = [table for _, table in loaded if table is not None]
    if len(loaded) == 1:
        results = loaded[0][0]
    else:
        tables = [_with_subject(table) for table, _ in loaded if len(table)]
        places = [f"{table.place(row)} of {table.source}" for table in tables for row in range(len(table))]
        results = replace(_stack(tables, ", ".join(sources)), places=np.array(places, dtype=str))
    results = replace(results, notes=(*results.notes, *notes))
    check_cells(results)
    if where:
        results = select_where(results, where)
    if len(loaded) > 1 and curves:
        return results, _stack(curves, "curves of " + ", ".join(sources))
    return results, curves[0] if curves else None


def load_evals(sources: Sequence[str], wandb: Callable[[str], pa.Table] | None = None) -> pa.Table:
    """What was measured on the cells of the run directories among the sources, and of the W&B projects where `wandb`
    reads one, as one evals.parquet; no rows where nothing was. A cell of a later source that `load_sources` names anew
    for its id is called so here too.
    """
    tables: list[pa.Table] = []
    known: dict[str, Any] = {}
    seen: set[str] = set()
    for source in dict.fromkeys(sources):
        online = source.startswith(_PREFIX)
        if online and wandb is None:
            continue
        if not online and is_table(source):  # Parquet may say what was declared of its metrics
            known |= json.loads((read_file(source).table.schema.metadata or {}).get(METRICS, b"{}"))
            continue
        evals = wandb(source.removeprefix(_PREFIX)) if online and wandb else RunDirectory(source).read_evals()
        known |= json.loads((evals.schema.metadata or {}).get(METRICS, b"{}"))
        ids = evals["cell_id"].to_pylist()
        place = source if online else join(source, "results.parquet")
        names = pa.array([f"{cell} of {place}" if cell in seen else cell for cell in ids], pa.string())
        tables.append(evals.replace_schema_metadata().set_column(0, "cell_id", names))
        seen |= set(ids)
    table = pa.concat_tables(tables) if tables else EVALS.empty_table()
    return table.replace_schema_metadata({METRICS: json.dumps(known).encode()} if known else None)


def _load(source: str, wandb: Reader | None) -> Loaded:
    if not source.startswith(_PREFIX):
        return load_results(source), load_curves(source)
    if wandb is None:
        raise SaescaleError(f"{source}: this program reads no W&B; use saescale fit {source}")
    return wandb(source.removeprefix(_PREFIX))


def _with_subject(table: Table) -> Table:
    if "subject" in table and known(table["subject"]).any():
        return table
    return replace(table, columns=table.columns | {"subject": np.full(len(table), table.source)})


def _stack(tables: Sequence[Table], source: str) -> Table:
    """All rows, under the columns that all have, and those that tell cells apart: without a value where a table has
    none, and as text where it is text in one of them."""
    named = dict.fromkeys(name for table in tables for name in table.columns)
    names = [name for name in named if name in TOLD_APART or all(name in table for table in tables)]
    columns = {}
    for name in names:
        text = any(table[name].dtype.kind == "U" for table in tables if name in table)
        nothing = "" if text else np.nan
        parts = [table[name] if name in table else np.full(len(table), nothing) for table in tables]
        columns[name] = np.concatenate([_as_text(part) if text else part for part in parts])
    unread = {
        name: np.concatenate([table.unread.get(name, np.full(len(table), "")) for table in tables])
        for name in {name for table in tables for name in table.unread}
    }
    excluded = tuple(reason for table in tables for reason in table.excluded)
    notes = tuple(note for table in tables for note in table.notes)
    return Table(columns, source, excluded, notes, unread=unread)


def _as_text(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "U":
        return values
    return np.array(["" if np.isnan(v) else number(v) if v % 1 else f"{v:.0f}" for v in values], dtype=str)
