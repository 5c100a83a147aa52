"""Where laws take their cells from: run directories, tables and W&B projects, one or several together."""

from collections.abc import Callable, Sequence

import numpy as np
from saescale.scaling.tables import Table, check_cells, load_curves, load_results
from saescale.storage.errors import SaescaleError

Reader = Callable[[str], tuple[Table, Table | None]]
_PREFIX = "wandb:"


def load_sources(sources: Sequence[str], wandb: Reader | None = None) -> tuple[Table, Table | None]:
    """(cells, curves or None) of one or more sources: run directories, .csv and .parquet tables, wandb:entity/project.

    `wandb` reads a project by what follows the prefix. Cells of several sources are put together under the columns that
    all of them have; a cell that is in two of them counts once. Without a column `subject` a source's cells are of a
    subject of the source's name, so that several of them are not taken for one. Raises SaescaleError.
    """
    if not sources:
        raise SaescaleError("no source; name a run directory, a .csv or .parquet table, or wandb:entity/project")
    loaded = [_load(source, wandb) for source in sources]
    if len(loaded) == 1:
        return loaded[0]
    results = _stack([_with_subject(table) for table, _ in loaded], ", ".join(sources))
    curves = [table for _, table in loaded if table is not None]
    results, twice = _once(results)
    if twice:
        text = f"{twice} cells are in several sources; each counts once"
        results = results.select(np.ones(len(results), dtype=bool), [text])
    check_cells(results)
    return results, _stack(curves, "curves of " + ", ".join(sources)) if curves else None


def _load(source: str, wandb: Reader | None) -> tuple[Table, Table | None]:
    if not source.startswith(_PREFIX):
        return load_results(source), load_curves(source)
    if wandb is None:
        raise SaescaleError(f"{source}: this program reads no W&B; use saescale fit {source}")
    return wandb(source.removeprefix(_PREFIX))


def _with_subject(table: Table) -> Table:
    if "subject" in table:
        return table
    return Table(table.columns | {"subject": np.full(len(table), table.source)}, table.source, table.excluded)


def _stack(tables: Sequence[Table], source: str) -> Table:
    """All rows, under the columns that all have. Raises SaescaleError for one that is text here and numbers there."""
    shared = [name for name in tables[0].columns if all(name in table for table in tables)]
    for name in shared:
        if len({table[name].dtype.kind for table in tables}) > 1:
            where = " and ".join(
                sorted({f"{t.source} ({'text' if t[name].dtype.kind == 'U' else 'numbers'})" for t in tables})
            )
            raise SaescaleError(f"column {name} differs in kind between {where}; make it the same")
    columns = {name: np.concatenate([table[name] for table in tables]) for name in shared}
    return Table(columns, source, tuple(reason for table in tables for reason in table.excluded))


def _once(table: Table) -> tuple[Table, int]:
    """The first of the rows of each cell id, and how many others there were."""
    if "cell_id" not in table:
        return table, 0
    # One cell id in two subjects is two cells: a table of one's own may number them.
    keys = [f"{cell}\0{subject}" for cell, subject in zip(table["cell_id"], table["subject"], strict=True)]
    _, first = np.unique(keys, return_index=True)
    mask = np.zeros(len(table), dtype=bool)
    mask[first] = True
    return table.select(mask), int((~mask).sum())
