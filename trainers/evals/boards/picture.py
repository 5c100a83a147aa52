"""Boards as the latents of a cell see them, on some positions of games that nothing was fitted on: what linear probes
read from x_hat, as board_probe does, and what single latents are signs of, as board_recovery does."""

import difflib
from typing import NamedTuple

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.bench import Bench
from saescale.trainers.evals.boards.board_probe import read_boards
from saescale.trainers.evals.boards.board_recovery import Reconstruction, reconstruct
from saescale.trainers.evals.boards.boards import Boards, heldout_boards
from saescale.trainers.evals.boards.detectors import active_latents
from saescale.trainers.evals.plan import finished_cells
from saescale.trainers.subjects.othello.labels import TILES

_BEGINNING = 4  # discs that lie there before any move


class Seen(NamedTuple):
    """Positions, from early to late ones, after so many `moves` [positions]: `true` and `probed`, a tile of TILES each
    [positions, squares]; `mine` and `yours` bool [positions, squares], what latents are signs of."""

    size: int
    moves: np.ndarray
    true: np.ndarray
    probed: np.ndarray
    mine: np.ndarray
    yours: np.ndarray


def boards_of_cell(url: str, number: int) -> Seen:
    """Of a cell's folder, RUN/cells/CELL. Raises SaescaleError where that is none, and of subjects without boards."""
    run, cells, cell = url.rstrip("/").rpartition("/cells/")
    if not cells:
        raise SaescaleError(f"{url} is no cell of a run; give RUN/cells/CELL")
    there = RunDirectory(run)
    if cell not in (finished := finished_cells(there)):
        near = difflib.get_close_matches(cell, finished, n=1, cutoff=0)
        raise SaescaleError(f"{run} has no finished cell {cell}; did you mean {near[0]}?")
    there.check_cell(cell)
    at_hand = Bench(there).lay_out(cell, "board_recovery")
    boards, trained = heldout_boards(at_hand.source, at_hand.subject), at_hand.trained
    probed = read_boards(boards, trained.reconstruct(boards.act).cpu(), ("after",))["after"]
    return seen(boards, probed, reconstruct(boards, active_latents(trained, boards.act)), number)


def seen(boards: Boards, probed: np.ndarray, reconstruction: Reconstruction, number: int) -> Seen:
    """So many positions of the second half, each of another game, as evenly over the game as there are any."""
    true = boards.labels["tile_after"][~boards.first]
    discs, doc = (true != TILES.index("empty")).sum(axis=1), boards.doc[~boards.first]
    rows: list[int] = []
    for wanted in np.linspace(discs.min(), discs.max(), number + 2)[1:-1]:
        others = np.flatnonzero(~np.isin(doc, doc[rows]))
        if len(others):
            rows.append(int(others[np.argmin(np.abs(discs[others] - wanted))]))
    mine, yours = np.split(reconstruction.said[rows], 2, axis=1)
    return Seen(boards.size, discs[rows] - _BEGINNING, true[rows], probed[rows], mine, yours)
