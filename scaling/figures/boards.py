"""Boards of a game of discs, true and as they were reconstructed, side by side: for paper."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from saescale.scaling.figures.palette import INK, PAGE, RULE, SOFT
from saescale.scaling.figures.paper import drawn

_SQUARE, _WRONG = "#e9f1ea", "#c44e00"  # a square of the board; a disc that is not so
_ACROSS = 3  # pairs of boards in a row
_SIDE, _GAP, _TITLE = 1.62, 0.14, 0.42  # inches
_RADIUS = 0.38  # of a disc, in squares
_KEY = (
    "Left the board, right what the latents say of it. Black: of who moves next; white: of the other; grey: "
    "both are said.\nRinged: said, and not so. Dots: a disc of that colour of which nothing is said."
)


def draw_boards(
    size: int, mine: np.ndarray, yours: np.ndarray, said_mine: np.ndarray, said_yours: np.ndarray, titles: Sequence[str]
) -> dict[str, bytes]:
    """Bool [positions, size * size] each: where a disc is of who moves next, or of the other, and where that was said.
    Files by format, as of other figures (paper.py)."""
    across = min(_ACROSS, len(titles))
    down = -(-len(titles) // across)
    width, height = across * (2 * _SIDE + 3 * _GAP), down * (_SIDE + _TITLE) + 0.5

    def fill(figure: Figure) -> None:
        for place, title in enumerate(titles):
            row, column = divmod(place, across)
            left = column * (2 * _SIDE + 3 * _GAP) + _GAP
            bottom = height - (row + 1) * (_SIDE + _TITLE)
            for side, (black, white) in enumerate(((mine, yours), (said_mine, said_yours))):
                box = ((left + side * (_SIDE + _GAP)) / width, bottom / height, _SIDE / width, _SIDE / height)
                axes = _board(figure, box, size)
                for square in range(size * size):
                    _disc(axes, size, square, bool(black[place, square]), bool(white[place, square]))
                    if side:
                        of_square = (each[place, square] for each in (mine, yours, said_mine, said_yours))
                        _mistake(axes, size, square, *map(bool, of_square))
            figure.text((left + _SIDE + _GAP / 2) / width, (bottom + _SIDE + 0.1) / height, title, ha="center",
                        fontsize=9, color=INK[0])  # fmt: skip
        figure.text(_GAP / width, 0.25 / height, _KEY, va="center", fontsize=7.5, color=SOFT[0])

    return drawn(fill, width, height)


def _board(figure: Figure, box: tuple[float, float, float, float], size: int) -> Axes:
    axes = figure.add_axes(box)
    axes.set_xlim(0, size)
    axes.set_ylim(0, size)
    axes.set_axis_off()
    axes.add_patch(Rectangle((0, 0), size, size, fc=_SQUARE, ec=RULE[0], lw=1.0, clip_on=False))
    for line in range(1, size):
        axes.plot([line, line], [0, size], color=RULE[0], lw=0.5)
        axes.plot([0, size], [line, line], color=RULE[0], lw=0.5)
    return axes


def _middle(size: int, square: int) -> tuple[float, float]:
    row, column = divmod(square, size)
    return column + 0.5, size - row - 0.5


def _disc(axes: Axes, size: int, square: int, black: bool, white: bool) -> None:
    if not (black or white):
        return
    shade = SOFT[0] if black and white else INK[0] if black else PAGE[0]
    axes.add_patch(Circle(_middle(size, square), _RADIUS, fc=shade, ec=INK[0], lw=0.7))


def _mistake(axes: Axes, size: int, square: int, mine: bool, yours: bool, said_mine: bool, said_yours: bool) -> None:
    if (said_mine and not mine) or (said_yours and not yours):
        axes.add_patch(Circle(_middle(size, square), _RADIUS + 0.04, fill=False, ec=_WRONG, lw=1.8))
    elif (mine or yours) and not (said_mine or said_yours):
        axes.add_patch(Circle(_middle(size, square), 0.11, fc=INK[0] if mine else PAGE[0], ec=INK[0], lw=0.6))
