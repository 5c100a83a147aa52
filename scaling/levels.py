"""Cells that were measured at several k: an architecture that trains a whole axis of k at once says in the column
`levels` what each of them reaches, and laws in k see these as cells."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from saescale.scaling.kinds import IDENTITY
from saescale.scaling.tables import Table
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS

_TOLD = ("k", "levels")


def with_levels(cells: Table) -> Table:
    """The cells of one kind and, for each level of theirs at whose n_latents and k none was trained by itself, a row
    more: the same cell with the level's k, nmse and l0. A note says at which k.

    Of several cells that have a level the one with the smallest k counts, which is nearest to it. Levels that cannot be
    read are passed over.
    """
    if not {"levels", "n_latents", "k"} <= set(cells.columns):
        return cells
    trained = set(zip(cells["n_latents"].tolist(), cells["k"].tolist(), strict=True))
    same = [name for name in (*IDENTITY, "tokens") if name in cells and name not in _TOLD]
    found: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for row in np.argsort(cells["k"], kind="stable").tolist():
        for level in read_levels(str(cells["levels"][row])):
            if (cells["n_latents"][row].item(), level["k"]) not in trained:
                cell = (*(str(cells[name][row]) for name in same), level["k"])
                found.setdefault(cell, (row, level))
    if not found:
        return cells
    rows = np.array([row for row, _ in found.values()])
    new = {name: values[rows] for name, values in cells.columns.items()}
    for name in ("k", "nmse", "l0"):
        if name in new:
            new[name] = np.array([float(level.get(name, np.nan)) for _, level in found.values()])
    # What else was measured is of the cell's own k.
    new |= {name: np.full(len(rows), np.nan) for name in new if name not in COLUMNS and new[name].dtype.kind == "f"}
    if "cell_id" in new:  # its curve is that of another k
        names = zip(new["cell_id"].tolist(), new["k"].tolist(), strict=True)
        new["cell_id"] = np.array([f"{name} at k = {k:g}" for name, k in names])
    places = np.array([cells.place(row) for row in (*range(len(cells)), *rows.tolist())])
    columns = {name: np.concatenate([values, new[name]]) for name, values in cells.columns.items()}
    unread = {name: np.concatenate([values, values[rows]]) for name, values in cells.unread.items()}
    ks = listed((f"{k:g}" for k in np.unique(new["k"])), ", ")
    note = (
        f"nmse at k = {ks} is that of {len(rows)} levels of cells that were trained at a larger k, where no cell was "
        "trained by itself"
    )
    return replace(cells, columns=columns, unread=unread, places=places, notes=(*cells.notes, note))


def measured_k(cells: Table) -> np.ndarray:
    """k [rows] as laws take it: the measured L0 where k was its target (`l0_error` is known), else k."""
    if not {"k", "l0", "l0_error"} <= set(cells.columns):
        return cells["k"]
    return np.where(np.isfinite(cells["l0_error"]) & (cells["l0"] > 0), cells["l0"], cells["k"])


def read_levels(text: str) -> list[dict[str, Any]]:
    """The levels of a cell: mappings with k and a positive nmse."""
    try:
        found = json.loads(text) if text else []
    except ValueError:
        return []
    levels = [level for level in found if isinstance(level, dict)] if isinstance(found, list) else []
    return [level for level in levels if _positive(level.get("k")) and _positive(level.get("nmse"))]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value)) and value > 0
