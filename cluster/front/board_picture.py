"""Pictures of boards as the latents of a cell see them: of any cell, and of the best one of a run."""

from saescale.scaling.figures.boards import draw_boards
from saescale.scaling.metrics import measured
from saescale.storage.errors import SaescaleError
from saescale.storage.files import join, write_atomic
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.boards.picture import boards_of_cell
from saescale.trainers.subjects.othello.labels import MINE, YOURS

METRICS = ("board_recovery.reconstruction", "board_probe.accuracy_x_hat")
PICTURE = "figures/boards.png"
_POSITIONS = 6
_KEY = (
    "Left the board, in the middle what linear probes read from x_hat, right what single latents are signs of (95 % "
    "right where they were chosen).\nBlack: of who moves next; white: of the other; grey: both are said. Ringed: said, "
    "and not so. Dots: a disc of that colour of which nothing is said."
)


def draw_boards_of(cell_url: str, number: int) -> dict[str, bytes]:
    """The picture as PNG, SVG and PDF, by format. Raises what `boards_of_cell` raises."""
    seen = boards_of_cell(cell_url, number)
    tiles = [(board == MINE, board == YOURS) for board in (seen.true, seen.probed)]
    titles = [
        f"after {moves} moves: {right:.0%} of squares read by probes"
        for moves, right in zip(seen.moves, (seen.probed == seen.true).mean(axis=1), strict=True)
    ]
    return draw_boards(seen.size, [*tiles, (seen.mine, seen.yours)], titles, _KEY)


def draw_best_boards(run: RunDirectory) -> None:
    """RUN/figures/boards.png, of the cell whose latents are signs of most of the board. Raises SaescaleError where that
    was not measured."""
    values = measured(run.read_evals()).get(METRICS[0])
    if not values:
        raise SaescaleError(f"no cell of {run.url} has {METRICS[0]}; saescale eval {run.url} says why")
    best = max(values, key=lambda cell: values[cell][0])
    write_atomic(join(run.url, PICTURE), draw_boards_of(run.cell_url(best), _POSITIONS)["png"])
