"""Where laws take their cells from: run directories, tables and W&B projects, one or several together."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TypeVar

import numpy as np

from saescale.scaling.tables import IDENTITY, TOLD_APART, Table, check_cells, known, load_curves, load_results
from saescale.storage.errors import SaescaleError

T = TypeVar("T", Table, Table | None)
Loaded = tuple[Table, Table | None]  # cells, curves
Reader = Callable[[str], Loaded]
_PREFIX = "wandb:"
_SAME = 1e-9  # relative difference of two numbers that are one, written twice


def load_sources(sources: Sequence[str], wandb: Reader | None = None) -> tuple[Table, Table | None]:
    """(cells, curves or None) of one or more sources: run directories, .csv and .parquet tables, wandb:entity/project.

    `wandb` reads a project by what follows the prefix. Cells of several sources are put together under the columns that
    all of them have, and those that tell cells apart; a cell that is in two of them counts once, and cells of equal
    ids that differ in what defines them are two. Without a column `subject` a source's cells are of a subject of the
    source's name, so that several of them are not taken for one. Raises SaescaleError.
    """
    if not sources:
        raise SaescaleError("no source; name a run directory, a .csv or .parquet table, or wandb:entity/project")
    loaded = [_load(source, wandb) for source in sources]
    if len(loaded) == 1:
        return loaded[0]
    loaded, excluded, notes = _once([(_with_subject(table), curves) for table, curves in loaded])
    results = _stack([table for table, _ in loaded if len(table)], ", ".join(sources))
    results = replace(results, excluded=(*results.excluded, *excluded), notes=(*results.notes, *notes))
    curves = [table for _, table in loaded if table is not None]
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
    return replace(table, columns=table.columns | {"subject": np.full(len(table), table.source)})


def _stack(tables: Sequence[Table], source: str) -> Table:
    """All rows, under the columns that all have, and those that tell cells apart: without a value where a table has
    none. Raises SaescaleError for one that is text here and numbers there."""
    named = dict.fromkeys(name for table in tables for name in table.columns)
    names = [name for name in named if name in TOLD_APART or all(name in table for table in tables)]
    columns = {}
    for name in names:
        there = [table for table in tables if name in table]
        if len({table[name].dtype.kind for table in there}) > 1:
            where = " and ".join(
                sorted({f"{t.source} ({'text' if t[name].dtype.kind == 'U' else 'numbers'})" for t in there})
            )
            raise SaescaleError(f"column {name} differs in kind between {where}; make it the same")
        nothing = np.nan if there[0][name].dtype.kind == "f" else ""
        columns[name] = np.concatenate([t[name] if name in t else np.full(len(t), nothing) for t in tables])
    excluded = tuple(reason for table in tables for reason in table.excluded)
    return Table(columns, source, excluded, tuple(note for table in tables for note in table.notes))


def _once(loaded: Sequence[Loaded]) -> tuple[list[Loaded], list[str], list[str]]:
    """Each cell with its curve once; what was left out, and what must be said of it.

    One cell id in two subjects is two cells: a table of one's own may number them.
    """
    first: dict[tuple[str, str], tuple[Table, int]] = {}
    kept: list[Loaded] = []
    twice, apart, unlike, off = 0, 0, set[str](), 0.0
    for table, curves in loaded:
        mask, ids = np.ones(len(table), dtype=bool), {}
        for row in range(len(table)) if "cell_id" in table else ():
            cell_id = str(table["cell_id"][row])
            other, there = first.setdefault((cell_id, str(table["subject"][row])), (table, row))
            if other is table and there == row:
                continue
            differing = [name for name in (*IDENTITY, "tokens") if _differ(other, there, table, row, name)]
            if differing:
                ids[cell_id] = f"{cell_id} of {table.source}"
                apart, unlike = apart + 1, unlike | set(differing)
            else:
                mask[row] = False
                twice += 1
                off = max(off, abs(table["nmse"][row] / other["nmse"][there] - 1))
        gone = {str(name) for name in table["cell_id"][~mask]} if not mask.all() else set()
        kept.append((_renamed(table.select(mask), ids), _renamed(_without(curves, gone), ids)))
    notes = []
    text = f"{twice} cells are in several sources; each counts once"
    if off > _SAME:
        notes.append(f"{text}: of those with another nmse (up to {off:.2%} off) the first")
    if apart:
        differing = sorted(unlike)
        notes.append(f"{apart} cells have the ids of others and differ in {', '.join(differing)}: they are other cells")
    return kept, [text] if twice else [], notes


def _differ(first: Table, at: int, second: Table, row: int, name: str) -> bool:
    """Whether two rows are known to differ in a column."""
    if name not in first or name not in second:
        return False
    ends = first[name][at : at + 1], second[name][row : row + 1]
    return bool(known(ends[0])[0] and known(ends[1])[0] and ends[0][0] != ends[1][0])


def _without(curves: Table | None, cells: Set[str]) -> Table | None:
    if curves is None or not cells or "cell_id" not in curves:
        return curves
    return curves.select(~np.isin(curves["cell_id"], sorted(cells)))


def _renamed(table: T, ids: Mapping[str, str]) -> T:
    """With other cell ids; numbers stay what they are, since what numbers its cells has no curves."""
    if table is None or not ids or "cell_id" not in table or table["cell_id"].dtype.kind == "f":
        return table
    names = np.array([ids.get(name, name) for name in table["cell_id"].tolist()], dtype=str)
    return replace(table, columns=table.columns | {"cell_id": names})
