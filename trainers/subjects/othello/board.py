"""The rules of Othello on bitboards: any number of boards at once, on a CPU or a GPU.

A set of squares is an int64 whose bit `row * size + column` is that square; a tensor of them is a set for each board.
Who cannot move passes, and that is no move: the other one moves again, as in the games of Li et al. 2023.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = (4, 6, 8)  # of boards; 8 fills the 64 bits


class Position(NamedTuple):
    """Boards [...] as those see them who move next: their discs, the other discs, where they may play. `legal` is empty
    when the game is over; the other player than the last one is then "next"."""

    mine: Tensor
    theirs: Tensor
    legal: Tensor


class _Step(NamedTuple):
    """One of the eight directions: by how many bits it moves a set, and which squares it can reach."""

    bits: int
    reached: int


def start(size: int, games: int, device: torch.device | str = "cpu") -> Position:
    """The four discs in the middle, black to move: the two on the rising diagonal are black's."""
    low, high = size // 2 - 1, size // 2
    sets = ([(low, high), (high, low)], [(low, low), (high, high)])
    black, white = (sum(1 << row * size + column for row, column in places) for places in sets)
    mine, theirs = (torch.full((games,), each, dtype=torch.int64, device=device) for each in (black, white))
    return Position(mine, theirs, legal_moves(size, mine, theirs))


def legal_moves(size: int, mine: Tensor, theirs: Tensor) -> Tensor:
    """Empty squares from which a line of `theirs` leads to one of `mine`."""
    found = torch.zeros_like(mine)
    for step in _steps(size):
        found |= _moved(_line(size, mine, theirs, step), step)
    return found & ~(mine | theirs)


def flipped(size: int, position: Position, move: Tensor) -> Tensor:
    """The discs that `move`, a set of one square or none on each board, turns over."""
    found = torch.zeros_like(move)
    for step in _steps(size):
        line = _line(size, move, position.theirs, step)
        found |= torch.where((_moved(line, step) & position.mine) != 0, line, 0)
    return found


def play(size: int, position: Position, move: Tensor) -> Position:
    """The boards after `move`, one legal square each; a board with no move stays as it is."""
    turned = flipped(size, position, move)
    mine, theirs = position.mine | move | turned, position.theirs & ~turned
    legal = legal_moves(size, theirs, mine)
    # Passes are rare: only those boards are looked at again.
    stuck = (legal == 0).nonzero(as_tuple=True)
    again = legal_moves(size, mine[stuck], theirs[stuck])
    passes = torch.zeros_like(legal, dtype=torch.bool)
    passes[stuck] = again != 0
    legal[stuck] = again
    after = torch.where(passes, mine, theirs), torch.where(passes, theirs, mine), legal
    return Position(*(torch.where(move != 0, new, old) for new, old in zip(after, position, strict=True)))


def count(squares: Tensor) -> Tensor:
    """How many squares each set has."""
    pairs = squares - ((squares >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (eights * 0x0101010101010101) >> 56


def spread(size: int, squares: Tensor) -> Tensor:
    """Sets [...] as bool [..., size * size], row by row."""
    return ((squares[..., None] >> torch.arange(size * size, device=squares.device)) & 1).bool()


def gather(size: int, squares: Tensor) -> Tensor:
    """The other way: bool [..., size * size] as sets [...]."""
    return (squares.long() << torch.arange(size * size, device=squares.device)).sum(dim=-1)


def signed(bits: int) -> int:
    """A set of squares as the int64 that it is."""
    return bits - (1 << 64) if bits >> 63 else bits


def moved(size: int, squares: Tensor, down: int, right: int) -> Tensor:
    """Sets moved by one square; what leaves the board is gone."""
    return _moved(squares, _step(size, down, right))


def _line(size: int, first: Tensor, along: Tensor, step: _Step) -> Tensor:
    """The squares of `along` that follow `first` without a gap."""
    line = _moved(first, step) & along
    for _ in range(size - 3):  # a line between two discs is no longer
        line |= _moved(line, step) & along
    return line


def _moved(squares: Tensor, step: _Step) -> Tensor:
    if step.bits > 0:
        return (squares << step.bits) & step.reached
    return (squares >> -step.bits) & step.reached  # the sign, which comes in from above, is never reached


@cache
def _steps(size: int) -> tuple[_Step, ...]:
    return tuple(_step(size, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right)


@cache
def _step(size: int, down: int, right: int) -> _Step:
    inside = range(size)
    reached = [
        (row, column) for row in inside for column in inside if row - down in inside and column - right in inside
    ]  # fmt: skip
    return _Step(down * size + right, signed(sum(1 << row * size + column for row, column in reached)))
