"""What evaluations of boards of Othello share: held-out rows with the board of each, in two halves by game."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.evals.evaluation import require_kind
from saescale.trainers.evals.labels import heldout_halves
from saescale.trainers.subjects.othello.othello import Othello
from saescale.trainers.subjects.subject import Subject

ROWS = 16_384


class Boards(NamedTuple):
    """Rows of a store: activations [rows, d_model] as stored, game of each, labels (othello/labels.py). Something is
    chosen or fitted on the rows of `first`, bool [rows], and measured on the others, which are of other games."""

    size: int
    act: Tensor
    doc: np.ndarray
    labels: dict[str, np.ndarray]
    first: np.ndarray

    def regions(self) -> dict[str, np.ndarray]:
        """Parts of the board, bool [squares]: corners, the rest of the edges, inner squares."""
        row, column = np.divmod(np.arange(self.size**2), self.size)
        ends = (row % (self.size - 1) == 0).astype(int) + (column % (self.size - 1) == 0)
        return {"corner": ends == 2, "edge": ends == 1, "inside": ends == 0}


def othello_of(subject: Subject | None) -> Othello:
    """Raises Unsuited for a subject without boards."""
    return require_kind(subject, Othello, "boards are measured of the subject othello")


def heldout_boards(source: Source, subject: Subject | None) -> Boards:
    """The first ROWS held-out rows, or all where there are fewer.

    Raises SaescaleError for a subject without boards, and where the rows are of one game.
    """
    othello = othello_of(subject)
    rows = heldout_halves(source, othello, ROWS)
    if rows.first.all():
        raise SaescaleError("the held-out rows are of one game; harvest more (--heldout-tokens)")
    return Boards(othello.size, *rows)
