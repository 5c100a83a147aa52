"""The ground truth at each token of a maze, recomputed from the tokens alone.

| label | shape | what |
|---|---|---|
| `told` | [..., edges] bool | at the second cell of a connection and the `;` behind it, its edge; none elsewhere |
| `listed` | [..., edges] bool | the connections that were told so far |
| `origin`, `target` | [...] int8 | the cell; NOWHERE before it was told |
| `kind` | [...] int8 | what stands here, of KINDS |

Edges are those of lattice.py.
"""

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.maze.lattice import NOWHERE, lattice
from saescale.trainers.subjects.maze.tokens import (
    CONNECTOR,
    FIRST_CELL,
    ORIGIN_START,
    PATH_START,
    SEMICOLON,
    TARGET_START,
    vocabulary,
)

KINDS = ("marker", "first", "connector", "second", "semicolon", "origin", "target", "path")
MARKER, FIRST, CONNECTION, SECOND, END, ORIGIN, TARGET, PATH = range(len(KINDS))
LABELS = ("told", "listed", "origin", "target", "kind")


def labels_of_tokens(size: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """All of LABELS for `ids` [mazes, length].

    Raises SaescaleError where they are not tokens of mazes of that size, or tell a connection of cells that are no
    neighbours.
    """
    grid = lattice(size)
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary(size):
        raise SaescaleError(
            f"the tokens {ids.min()} to {ids.max()} are not all of mazes of {size}x{size}, which are below "
            f"{vocabulary(size)}"
        )
    end, cell = ids == SEMICOLON, ids >= FIRST_CELL
    edge = np.full(ids.shape, grid.n_edges)  # none
    complete = cell[:, :-2] & (ids[:, 1:-1] == CONNECTOR) & cell[:, 2:]
    number = np.where(cell, ids - FIRST_CELL, 0)
    edge[:, 2:] = np.where(complete, grid.edge.numpy()[number[:, :-2], number[:, 2:]], grid.n_edges)
    edge[:, 1:] = np.where(end[:, 1:], edge[:, :-1], edge[:, 1:])
    if (wrong := end & (edge == grid.n_edges)).any():
        maze, place = (int(each[0]) for each in wrong.nonzero())
        raise SaescaleError(
            f"maze {maze} is none of {size}x{size}: the `;` at position {place} ends no connection of two neighbours "
            f"(tokens {ids[maze, max(0, place - 3) : place + 1].tolist()})"
        )
    told = edge[..., None] == np.arange(grid.n_edges)
    return {
        "told": told,
        "listed": np.logical_or.accumulate(told, axis=1),
        "origin": _from_here_on(ids, ORIGIN_START),
        "target": _from_here_on(ids, TARGET_START),
        "kind": _kinds(ids, cell),
    }


def _from_here_on(ids: np.ndarray, marker: int) -> np.ndarray:
    """The cell behind the marker, from its own position on."""
    behind = np.zeros(ids.shape, bool)
    behind[:, 1:] = ids[:, :-1] == marker
    place = np.where(behind.any(axis=1), behind.argmax(axis=1), ids.shape[1])
    known = np.arange(ids.shape[1]) >= place[:, None]
    cell = np.take_along_axis(ids, np.minimum(place, ids.shape[1] - 1)[:, None], axis=1) - FIRST_CELL
    return np.where(known, cell, NOWHERE).astype(np.int8)


def _kinds(ids: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """What stands where, by the token before and after markers."""
    found = np.full(ids.shape, MARKER, np.int8)
    before = np.full(ids.shape, -1, np.int64)
    before[:, 1:] = ids[:, :-1]
    on_path = np.logical_or.accumulate(ids == PATH_START, axis=1)
    found[ids == CONNECTOR] = CONNECTION
    found[ids == SEMICOLON] = END
    found[cell] = FIRST
    found[cell & (before == CONNECTOR)] = SECOND
    found[cell & (before == ORIGIN_START)] = ORIGIN
    found[cell & (before == TARGET_START)] = TARGET
    found[cell & on_path] = PATH
    return found
