"""Which cells one law describes: those of one kind, and of training that did not diverge."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from saescale.scaling.order import in_order
from saescale.scaling.tables import KIND, Table, known, shown
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, columns_of

Kind = Mapping[str, str | float]  # what tells one kind of cells from the others of a table; {} where there is one

_COMPARABLE = tuple(column.name for column in COLUMNS.values() if column.one_kind)
_ALIKE = tuple(column.name for column in COLUMNS.values() if column.alike)
# What a reader knows a kind by; the others name it only where these do not.
_NAMES = ("architecture", "subject", "site")
# What tells two cells apart, whatever their ids are.
IDENTITY = tuple(c.name for c in columns_of("results") if c.role == "spec" and c.name not in ("cell_id", "subject"))
# Of these a table may say nothing of some cells.
TOLD_APART = tuple(name for name in (*_COMPARABLE, *_ALIKE) if name not in ("subject", "d_model"))
_SHOWN = 5  # values of a column in a note


def kinds_in(table: Table, columns: Sequence[str] = _COMPARABLE) -> list[tuple[Kind, np.ndarray]]:
    """The kinds of cells of a table, each with its rows (bool [rows]): what agrees in subject, site, d_model,
    architecture, store and held-out rows, since one law describes no more. In the order of architectures (order.py),
    then of names, with layer 2 before layer 11. What is not known of a row is taken to be as in most.

    A kind is named by the columns in which kinds differ, and by d_model, store and held-out rows only where
    architecture, subject and site leave two kinds with one name.
    """
    filled = {name: _filled(table[name]) for name in columns if name in table}
    order = [name for name in (*_NAMES, *columns) if name in filled and len(np.unique(filled[name])) > 1]
    names: list[str] = []
    kinds = np.zeros(len(table), dtype=int)
    for name in dict.fromkeys(order):
        levels = np.unique(filled[name], return_inverse=True)[1]
        finer = np.unique(np.stack([kinds, levels], axis=1), axis=0, return_inverse=True)[1].ravel()
        if name in _NAMES or finer.max() > kinds.max():
            names.append(name)
            kinds = finer
    found: list[tuple[Kind, np.ndarray]] = []
    for number in range(int(kinds.max(initial=0)) + 1):
        mask = kinds == number
        row = int(np.flatnonzero(mask)[0]) if mask.any() else 0
        found.append(({name: filled[name][row].item() for name in names}, mask))
    architectures = in_order(str(of["architecture"]) for of, _ in found if "architecture" in of)

    def place(entry: tuple[Kind, np.ndarray]) -> list[object]:
        of = entry[0]
        return [architectures.index(str(of[n])) if n == "architecture" else _natural(of[n]) for n in names]

    return sorted(found, key=place)


def largest_kind(table: Table) -> tuple[Kind, Table]:
    """The kind with the most cells, of equally many the first in the table, and its cells."""
    of, mask = max(kinds_in(table), key=lambda entry: (entry[1].sum(), -int(np.argmax(entry[1]))))
    return of, table.select(mask)


def kind_label(of: Kind) -> str:
    """A kind in short words, such as "gated at resid_post.11"; "" for the only one of a table."""
    words = [str(of["architecture"])] if "architecture" in of else []
    for name, before in (("subject", "of "), ("site", "at ")):
        if name in of:
            words.append((before if words else "") + str(of[name]))
    return ", ".join([" ".join(words)] * bool(words) + [f"{n} {shown(of[n])}" for n in of if n not in _NAMES])


def with_kinds(table: Table, kinds: Sequence[tuple[Kind, np.ndarray]]) -> Table:
    """With a column that has the label of each cell's kind, where there are several: messages name cells by it."""
    if len(kinds) == 1:
        return table
    labels = np.empty(len(table), dtype=object)
    for of, mask in kinds:
        labels[mask] = kind_label(of)
    return replace(table, columns=table.columns | {KIND: labels.astype(str)})


def _natural(value: str | float) -> tuple[tuple[int, float, str], ...]:
    """A key that sorts numbers within text as numbers."""
    if not isinstance(value, str):
        return ((0, value, ""),)
    parts = re.split(r"(\d+)", value)
    return tuple((0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts)


def said_of_kinds(kinds: Sequence[Table], notes: Callable[[Table], Iterable[str]]) -> list[str]:
    """The notes on the cells of each kind, each text once, after the kinds that it is of unless that is all of them."""
    of_text: dict[str, list[str]] = {}
    for cells in kinds:
        for text in notes(cells):
            of_text.setdefault(text, []).append(str(cells[KIND][0]) if KIND in cells else "")
    return [
        text if len(labels) == len(kinds) else f"{listed(labels, ', ')}: {text}" for text, labels in of_text.items()
    ]


def unlike(table: Table) -> list[str]:
    """In what else that moves nmse cells of one fit differ, and what is known of some of them alone; a line each."""
    notes = []
    told = {name: known(table[name]) for name in TOLD_APART if name in table}
    differing = [n for n in told if n in _ALIKE and len(np.unique(table[n][told[n]])) > 1]
    if differing:
        words = ", ".join(f"{name} {_counted(table[name][told[name]])}" for name in differing)
        notes.append(f"cells that are fitted together differ in {words}: the laws mix what that does to nmse")
    if silent := [name for name, there in told.items() if there.any() and not there.all()]:
        count = int((~np.all([told[name] for name in silent], axis=0)).sum())
        notes.append(f"{count} of {len(table)} cells do not say their {', '.join(silent)}: they may differ in it")
    return notes


def _filled(values: np.ndarray) -> np.ndarray:
    """With the most frequent value where there is none."""
    there = known(values)
    found, counts = np.unique(values[there], return_counts=True)
    return values if there.all() or not len(found) else np.where(there, values, found[np.argmax(counts)])


def _counted(values: np.ndarray) -> str:
    """The values of a column and how many cells have each."""
    found, counts = np.unique(values, return_counts=True)
    words = [f"{shown(value)} in {count}" for value, count in zip(found.tolist(), counts, strict=True)]
    more = [f"... and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join([*words[:_SHOWN], *more])


def mostly_above_one(table: Table) -> bool:
    """Whether more than half of the finite values of nmse are above 1: then it is not that single cells diverged."""
    finite = table["nmse"][np.isfinite(table["nmse"])]
    return bool(len(finite) and (finite > 1).mean() > 0.5)


def diverged_rows(table: Table, keep: bool = False) -> np.ndarray:
    """Which cells (bool [rows]) diverged: their nmse is above 1, they reconstruct worse than the mean does.

    Where most cells are above 1 the column holds another loss, or the sweep is broken: none counts as diverged, as
    where they are to be kept. An infinite nmse always does.
    """
    return np.isinf(table["nmse"]) if keep or mostly_above_one(table) else table["nmse"] > 1


def without_diverged(table: Table, keep: bool = False) -> Table:
    """Without cells that diverged: they are `excluded`, in one line."""
    bad = diverged_rows(table, keep)
    if not bad.any():
        return table
    cases = [f"{table.describe(int(row))}: nmse {table['nmse'][row]:.3g}" for row in np.flatnonzero(bad)]
    one = len(cases) == 1
    reason = (
        f"{len(cases)} {'cell' if one else 'cells'} with nmse above 1, worse than the mean alone, diverged and "
        f"{'is' if one else 'are'} kept out of the fits ({listed(cases)})"
    )
    if not np.isinf(table["nmse"][bad]).all():
        reason += f"; --keep-diverged fits {'it' if one else 'them'} too"
    return table.select(~bad, [reason])
