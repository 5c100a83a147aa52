"""Boards as the latents of a cell see them: what board_recovery reconstructs, on some positions of other games."""

from typing import NamedTuple

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.bench import Bench
from saescale.trainers.evals.board_recovery import Reconstruction, latents_of, reconstruct
from saescale.trainers.evals.boards import Boards
from saescale.trainers.subjects.othello_labels import MINE, TILES, YOURS

_BEGINNING = 4  # discs that lie there before any move


class Seen(NamedTuple):
    """Positions, from early to late ones: `true` int8 [positions, squares], a tile of TILES each; `mine` and `yours`
    bool [positions, squares], what was reconstructed; `f1` [positions] of both, and `moves` [positions] made so far."""

    size: int
    true: np.ndarray
    mine: np.ndarray
    yours: np.ndarray
    f1: np.ndarray
    moves: np.ndarray


def boards_of_cell(url: str, number: int) -> Seen:
    """Of a cell's folder, RUN/cells/CELL. Raises SaescaleError where that is none, and of subjects without boards."""
    run, cells, cell = url.rstrip("/").rpartition("/cells/")
    if not cells:
        raise SaescaleError(f"{url} is no cell of a run; give RUN/cells/CELL")
    RunDirectory(run).check_cell(cell)
    at_hand = Bench(RunDirectory(run)).lay_out(cell, "board_recovery")
    (prepared,) = at_hand.prepared
    return seen(prepared.boards, reconstruct(prepared.boards, latents_of(at_hand.trained, prepared.boards)), number)


def seen(boards: Boards, reconstruction: Reconstruction, number: int) -> Seen:
    """So many positions of the second half, each of another game, as evenly over the game as there are any."""
    true = boards.labels["tile_after"][~boards.first]
    discs, doc = (true != TILES.index("empty")).sum(axis=1), boards.doc[~boards.first]
    rows: list[int] = []
    for wanted in np.linspace(discs.min(), discs.max(), number + 2)[1:-1]:
        others = np.flatnonzero(~np.isin(doc, doc[rows]))
        if len(others):
            rows.append(int(others[np.argmin(np.abs(discs[others] - wanted))]))
    mine, yours = np.split(reconstruction.said[rows], 2, axis=1)
    truth = np.concatenate([true[rows] == MINE, true[rows] == YOURS], axis=1)
    said = reconstruction.said[rows]
    f1 = 2 * (said & truth).sum(axis=1) / (said.sum(axis=1) + truth.sum(axis=1))
    return Seen(boards.size, true[rows], mine, yours, f1, discs[rows] - _BEGINNING)
