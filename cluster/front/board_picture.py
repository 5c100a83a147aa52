"""Pictures of boards as the latents of a cell see them: of any cell, and of the best one of a run."""

from saescale.scaling.figures.boards import draw_boards
from saescale.scaling.metrics import measured
from saescale.storage.errors import SaescaleError
from saescale.storage.files import join, write_atomic
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.board_picture import boards_of_cell
from saescale.trainers.subjects.othello_labels import MINE, YOURS

METRIC = "board_recovery.reconstruction"
PICTURE = "figures/boards.png"
_POSITIONS = 6


def draw_boards_of(cell_url: str, number: int) -> dict[str, bytes]:
    """The picture as PNG, SVG and PDF, by format. Raises what `boards_of_cell` raises."""
    seen = boards_of_cell(cell_url, number)
    titles = [f"after {moves} moves: F1 {f1:.2f}" for moves, f1 in zip(seen.moves, seen.f1, strict=True)]
    return draw_boards(seen.size, seen.true == MINE, seen.true == YOURS, seen.mine, seen.yours, titles)


def draw_best_boards(run: RunDirectory) -> None:
    """RUN/figures/boards.png, of the cell that reconstructs most of the board. Raises SaescaleError where none was
    measured."""
    values = measured(run.read_evals()).get(METRIC)
    if not values:
        raise SaescaleError(f"no cell of {run.url} has {METRIC}; saescale eval {run.url} says why")
    best = max(values, key=lambda cell: values[cell][0])
    write_atomic(join(run.url, PICTURE), draw_boards_of(run.cell_url(best), _POSITIONS)["png"])
