"""What evaluations of mazes share: held-out rows with the connection that each tells, in two halves by maze, and what
finds these connections."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.evals.evaluation import require_kind
from saescale.trainers.evals.labels import heldout_halves
from saescale.trainers.evals.mazes.trees import Single, Splits, Tree
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.maze.labels import KINDS
from saescale.trainers.subjects.maze.lattice import Lattice, lattice
from saescale.trainers.subjects.maze.maze import Maze
from saescale.trainers.subjects.subject import Subject

ROWS = 16_384
PLACES = ("second", "semicolon")  # where a connection is known: at its second cell, and at the `;` behind it


class Told(NamedTuple):
    """Rows of a store at one of PLACES: activations [rows, d_model] as stored, the maze of each, and `edge` bool
    [rows, edges], whose connection is told there. Something is chosen on the rows of `first`, bool [rows], and measured
    on the others, which are of other mazes. `rows` are their numbers in the store."""

    grid: Lattice
    rows: np.ndarray
    act: Tensor
    doc: np.ndarray
    edge: np.ndarray
    first: np.ndarray


def maze_of(subject: Subject | None) -> Maze:
    """Raises Unsuited for a subject without mazes."""
    return require_kind(subject, Maze, "connections are measured of the subject maze")


def heldout_connections(source: Source, subject: Subject | None) -> dict[str, Told]:
    """The first ROWS held-out rows, or all where there are fewer, by their places.

    Raises SaescaleError for a subject without mazes, and where an edge is a connection on no row of a half.
    """
    maze = maze_of(subject)
    rows, grid = heldout_halves(source, maze, ROWS), lattice(maze.size)
    found = {}
    for place in PLACES:
        here = np.flatnonzero(rows.labels["kind"] == KINDS.index(place))
        act, doc, labels, first = rows.those(here)
        told = Told(grid, here, act, doc, labels["told"], first)
        halves = (told.edge[half].any(axis=0) for half in (told.first, ~told.first))
        if len(missing := np.flatnonzero(~np.logical_and(*halves))):
            raise SaescaleError(
                f"{len(missing)} connections, {grid.name(int(missing[0]))} the first, are on no held-out row of a half "
                "of the mazes; harvest more (--heldout-tokens)"
            )
        found[place] = told
    return found


class Found(NamedTuple):
    """For each edge the single column that tells it best, and the best tree of depth two; `f1` is the mean of the F1 of
    the trees on the half that they were chosen on."""

    single: Single
    trees: list[Tree]
    f1: float


def find_connections(told: Told, columns: np.ndarray) -> Found:
    """By columns [rows, any], chosen on the first half."""
    columns, edge = columns[told.first], told.edge[told.first]
    splits = Splits(columns, edge)
    trees = [splits.tree(number) for number in range(told.grid.n_edges)]
    said = np.stack([tree.of(columns) for tree in trees], axis=1)
    f1 = 2 * (said & edge).sum(axis=0) / (said.sum(axis=0) + edge.sum(axis=0))
    return Found(splits.single(), trees, float(f1.mean()))


def better_place(found: dict[str, Found]) -> str:
    """Where the connections are told better, on the half that trees are chosen on."""
    return max(PLACES, key=lambda place: found[place].f1)


def latents_of(trained: Trained, act: Tensor) -> np.ndarray:
    """float32 [rows, n_latents]."""
    return torch.cat(
        [trained.encode(some).cpu() for some in act.split(2_048)]
    ).numpy()  # on the host: all of it is large
