"""Each cell once: rows that are equal, in one source or in several, and cells that are known by their ids."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from saescale.scaling.kinds import IDENTITY
from saescale.scaling.tables import Table, known
from saescale.storage.columns import COLUMNS

T = TypeVar("T", Table, Table | None)
Loaded = tuple[Table, Table | None]  # cells, curves
_SAME = 1e-9  # relative difference of two numbers that are one, written twice
_DIGITS = 10
_OF_A_CELL = (*IDENTITY, "tokens")


@dataclass
class _Found:
    """What there was of repeated cells. `off`: by how much nmse of one cell differs, relatively, at most."""

    rows: int = 0
    twice: int = 0
    off: float = 0.0
    apart: int = 0
    differing: set[str] = field(default_factory=set)
    again: int = 0
    again_off: float = 0.0
    shared: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """In words, a line each."""
        notes = []
        if self.rows:
            notes.append(
                f"{_are(self.rows, 'row')} equal to another and left out: equal rows are one cell (of seeds a column "
                "seed says that they are several)"
            )
        if self.twice:
            each = "each counts" if self.twice > 1 else "it counts"
            text = f"{_are(self.twice, 'cell')} in several sources; {each} once"
            notes.append(
                text
                + (f": of those with another nmse (up to {self.off:.2%} off) the first" if self.off > _SAME else "")
            )
        if self.apart:
            notes.append(
                f"{self.apart} cells have the ids of others and differ in {', '.join(sorted(self.differing))}: they "
                "are other cells"
            )
        if self.again:
            notes.append(
                f"{_are(self.again, 'cell')} like another in {', '.join(self.shared)} and of another nmse (up to "
                f"{self.again_off:.2%} off): each is fitted; leave out what is no cell of its own, or say by a column "
                "seed that it is"
            )
        return notes


def once(loaded: Sequence[Loaded]) -> tuple[list[Loaded], list[str]]:
    """Each cell with its curve once, the first of several; and what must be said of the others.

    Rows are equal where all columns are that both have, but for how long they took. Of two rows with one cell id and
    one subject the second is another cell if it is known to differ in what defines a cell, else the same. One id in two
    subjects is two cells: a table of one's own may number them.
    """
    found = _Found()
    own = []
    for table, curves in loaded:
        first = _first_of_equals(table, _columns(table))
        found.rows += int((first != np.arange(len(table))).sum())
        own.append((table.select(first == np.arange(len(table))), curves) if len(table) else (table, curves))
    kept: list[Loaded] = []
    seen: list[Table] = []
    for table, curves in own:
        mask, ids = np.ones(len(table), dtype=bool), dict[str, str]()
        for other in seen:
            mask &= ~_in(table, other)
        found.twice += int((~mask).sum())
        _by_id(table, seen, mask, ids, found)
        gone = {str(name) for name in table["cell_id"][~mask]} if "cell_id" in table else set()
        # Where the first source of a cell has no curve of it, this one is all there is.
        there = {str(name) for _, c in kept if c is not None and "cell_id" in c for name in np.unique(c["cell_id"])}
        seen.append(table.select(mask))
        kept.append((_renamed(seen[-1], ids), _renamed(_without(curves, gone & there), ids)))
    _measured_again(seen, found)
    return kept, found.notes()


def _columns(*tables: Table) -> list[str]:
    """What says whether two rows are equal: what all tables have, but for times."""
    shared = [name for name in tables[0].columns if all(name in table for table in tables)]
    return [name for name in shared if name not in COLUMNS or COLUMNS[name].role != "time"]


def _levels(values: Sequence[np.ndarray]) -> np.ndarray:
    """A number for each value of one column of one or more tables: equal ones where values are equal."""
    kinds = {column.dtype.kind for column in values}
    if kinds == {"f"}:
        joined = np.concatenate(values)
        there = np.isfinite(joined) & (joined != 0)
        size = np.floor(np.log10(np.abs(joined, where=there, out=np.ones_like(joined))))
        # In digits that survive being written and read.
        mantissa = np.round(np.divide(joined, 10.0**size, where=there, out=joined.copy()), _DIGITS)
        pairs = np.stack([np.where(there, size, 0.0), mantissa], axis=1)
        return np.unique(np.nan_to_num(pairs, nan=-1e300), axis=0, return_inverse=True)[1].ravel()
    return np.unique(np.concatenate([column.astype(str) for column in values]), return_inverse=True)[1]


def _first_of_equals(table: Table, names: Sequence[str], *others: Table) -> np.ndarray:
    """For each row, of this table and then of the others, the first that is equal in the columns: their indices."""
    tables = (table, *others)
    levels = [_levels([t[name] for t in tables]) for name in names]
    if not levels:
        return np.arange(sum(map(len, tables)))
    _, first, inverse = np.unique(np.stack(levels, axis=1), axis=0, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def _in(table: Table, earlier: Table) -> np.ndarray:
    """Which rows [rows] of a table are rows of an earlier one too, by the columns of both."""
    names = _columns(earlier, table)
    sizes = {"n_latents", "k"} & (set(table.columns) | set(earlier.columns))
    # What has no sizes, or no more than these, in common says nothing of whether cells are the same.
    if not ({"nmse"} | sizes <= set(names)) or not sizes:
        return np.zeros(len(table), dtype=bool)
    return _first_of_equals(earlier, names, table)[len(earlier) :] < len(earlier)


def _by_id(table: Table, seen: Sequence[Table], mask: np.ndarray, ids: dict[str, str], found: _Found) -> None:
    """Takes cells out of `mask` that are cells of earlier tables by their id, and names those of `ids` anew."""
    earlier: dict[tuple[str, str], list[tuple[Table, int]]] = {}
    for other in seen if "cell_id" in table else ():
        for row in range(len(other)) if "cell_id" in other else ():
            earlier.setdefault(_name_of(other, row), []).append((other, row))
    for row in np.flatnonzero(mask).tolist() if earlier else ():
        there = earlier.get(_name_of(table, row), []) if table["cell_id"][row] else []
        differing = [{name for name in _OF_A_CELL if _differ(*at, table, row, name)} for at in there]
        if not there:
            continue
        if all(differing):
            ids[str(table["cell_id"][row])] = f"{table['cell_id'][row]} of {table.source}"
            found.apart += 1
            found.differing |= differing[0]
        else:
            first, at = there[differing.index(set())]
            mask[row] = False
            found.twice += 1
            found.off = max(found.off, abs(table["nmse"][row] / first["nmse"][at] - 1))


def _name_of(table: Table, row: int) -> tuple[str, str]:
    return str(table["cell_id"][row]), str(table["subject"][row]) if "subject" in table else table.source


def _measured_again(tables: Sequence[Table], found: _Found) -> None:
    """Counts cells of another nmse than one of an earlier source, or one of the same seed, that is like them in all
    that is said of both."""
    for i, table in enumerate(tables):
        for other in (*tables[:i], *([table] if "seed" in table else [])):
            shared = [name for name in (*_OF_A_CELL, "subject", "cell_id") if name in table and name in other]
            if not {"n_latents", "k"} & set(shared) or (other is not table and "subject" not in shared):
                continue
            first = _first_of_equals(other, shared, table)[len(other) :]
            again = [row for row in range(len(table)) if first[row] < (row if other is table else len(other))]
            if again:
                found.again += len(again)
                found.shared = shared
                ratio = table["nmse"][again] / other["nmse"][first[again]]
                found.again_off = max(found.again_off, float(np.abs(ratio - 1).max()))


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
    """With other cell ids."""
    if table is None or not ids or "cell_id" not in table:
        return table
    names = np.array([ids.get(name, name) for name in table["cell_id"].tolist()], dtype=str)
    return replace(table, columns=table.columns | {"cell_id": names})


def _are(count: int, what: str) -> str:
    return f"{count} {what} is" if count == 1 else f"{count} {what}s are"
