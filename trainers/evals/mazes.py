"""What evaluations of mazes share: held-out rows with the connection that each tells, in two halves by maze."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.evaluation import Unsuited
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.evals.trees import Single, Splits, Tree
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.maze import Maze
from saescale.trainers.subjects.maze_lattice import Lattice, lattice
from saescale.trainers.subjects.subject import Subject

ROWS = 12_288


class Told(NamedTuple):
    """Rows of a store, each the `;` of a connection: activations [rows, d_model] as stored, the maze of each, and
    `closed` bool [rows, edges], which connection it is. Something is chosen on the rows of `first`, bool [rows], and
    measured on the others, which are of other mazes."""

    grid: Lattice
    act: Tensor
    doc: np.ndarray
    closed: np.ndarray
    first: np.ndarray


def maze_of(subject: Subject | None) -> Maze:
    """Raises SaescaleError for a subject without mazes."""
    if not isinstance(subject, Maze):
        name = "there is none" if subject is None else f"{subject.name} has none"
        raise Unsuited(f"connections are measured of the subject maze; {name}")
    return subject


def heldout_connections(source: Source, subject: Subject | None) -> Told:
    """The first ROWS held-out rows, or all where there are fewer.

    Raises SaescaleError for a subject without mazes, and where an edge is a connection on no row of either half.
    """
    maze = maze_of(subject)
    number = min(ROWS, source.rows("heldout")) if isinstance(source, ActivationStore) else ROWS
    rows = source.heldout(number, ("act", "doc"))
    closed = heldout_labels(source, maze, number)["closed"]
    mazes = np.unique(rows.doc)
    first = np.searchsorted(mazes, rows.doc) % 2 == 0
    grid = lattice(maze.size)
    told = Told(grid, to_tensor(rows.act, source.dtype), rows.doc, closed, first)
    if len(missing := np.flatnonzero(~(closed[first].any(axis=0) & closed[~first].any(axis=0)))):
        raise SaescaleError(
            f"the connection {grid.name(int(missing[0]))} and {len(missing) - 1} more are on no held-out row of a half "
            "of the mazes; harvest more (--heldout-tokens)"
        )
    return told


class Found(NamedTuple):
    """For each edge the single column that tells it best, and the best tree of depth two."""

    single: Single
    trees: list[Tree]


def find_connections(told: Told, columns: np.ndarray) -> Found:
    """By columns [rows, any], chosen on the first half."""
    splits = Splits(columns[told.first], told.closed[told.first])
    return Found(splits.single(), [splits.tree(edge) for edge in range(told.grid.n_edges)])


def latents_of(trained: Trained, act: Tensor) -> np.ndarray:
    """float32 [rows, n_latents]."""
    return torch.cat([trained.encode(some).cpu() for some in act.split(2_048)]).numpy()
