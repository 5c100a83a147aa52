"""Which cells one law describes: those of one kind, and of training that did not diverge."""

import shlex
from dataclasses import replace

import numpy as np

from saescale.scaling.tables import Table, known, shown
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, columns_of

_COMPARABLE = tuple(column.name for column in COLUMNS.values() if column.one_kind)
_ALIKE = tuple(column.name for column in COLUMNS.values() if column.alike)
# What tells two cells apart, whatever their ids are.
IDENTITY = tuple(c.name for c in columns_of("results") if c.role == "spec" and c.name not in ("cell_id", "subject"))
# Of these a table may say nothing of some cells.
TOLD_APART = tuple(name for name in (*_COMPARABLE, *_ALIKE) if name not in ("subject", "d_model"))
_SHOWN = 5  # values of a column in a note


def comparable(table: Table, over_subjects: bool = False) -> Table:
    """Rows of one kind: where subject, site, d_model, architecture, store or held-out rows differ, the most frequent
    combination stays, and of equally frequent ones the first. What is not known of a row is taken to be as in most.

    A law describes one subject and one kind of SAE, measured on the same rows; the others are excluded, with the
    reason, and a note says in what they differ. `over_subjects`: all subjects stay, and only architectures must agree.
    """
    names = [name for name in (("architecture",) if over_subjects else _COMPARABLE) if name in table]
    filled = {name: _filled(table[name]) for name in names}
    names = [name for name in names if len(np.unique(filled[name])) > 1]
    if not names:
        return table
    texts = [
        ", ".join(f"{name} {shown(value)}" for name, value in zip(names, row, strict=True))
        for row in zip(*(filled[name].tolist() for name in names), strict=True)
    ]
    most = max(dict.fromkeys(texts), key=texts.count)
    mask = np.array([text == most for text in texts])
    reasons = [f"{table.describe(int(row))}: {texts[row]}; the laws describe {most}" for row in np.flatnonzero(~mask)]
    there = " and ".join(f"{name} {_counted(filled[name][~mask])}" for name in names)
    other = int(np.flatnonzero(~mask)[0])
    conditions = [f"{name}={shown(filled[name][other].item())}" for name in names]
    apart = " ".join(f"--where {shlex.quote(condition)}" for condition in conditions)
    note = (
        f"{(~mask).sum()} of {len(mask)} cells are of another kind ({there}) than those that laws of one subject "
        f"describe ({most}): fit them apart, as with {apart}"
    )
    return replace(table.select(mask, reasons), notes=(*table.notes, note))


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


def without_diverged(table: Table, keep: bool = False) -> Table:
    """Without cells whose nmse is above 1: they reconstruct worse than the mean does, so their training diverged.

    They are `excluded`, in one line. Where most cells are above 1 the column holds another loss, or the sweep is
    broken: all stay, as they do where they are to be kept. An infinite nmse is in no fit.
    """
    endless = np.isinf(table["nmse"])
    bad = table["nmse"] > 1
    if keep or mostly_above_one(table):
        bad = endless
    if not bad.any():
        return table
    cases = [f"{table.describe(int(row))}: nmse {table['nmse'][row]:.3g}" for row in np.flatnonzero(bad)]
    one = len(cases) == 1
    reason = (
        f"{len(cases)} {'cell' if one else 'cells'} with nmse above 1, worse than the mean alone, diverged and "
        f"{'is' if one else 'are'} kept out of the fits ({listed(cases)})"
    )
    if not endless[bad].all():
        reason += f"; --keep-diverged fits {'it' if one else 'them'} too"
    return table.select(~bad, [reason])
