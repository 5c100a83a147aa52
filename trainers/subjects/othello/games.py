"""Random legal games of Othello without end, and the tokens in which a model reads them.

Every move is drawn uniformly from the legal ones (Li et al. 2023), by a hash of seed, number of the game and move: a
game is the same whoever draws it, with how many others at once, on a CPU or a GPU.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.manifest import Split
from saescale.trainers.subjects.drawn import Drawn, draw_split
from saescale.trainers.subjects.hashed import hashed, positive
from saescale.trainers.subjects.othello.board import count, play, signed, spread, start

PAD = 0
AT_A_TIME = {"cpu": 2_048, "cuda": 65_536}  # on a GPU calls weigh more than boards


def random_games(size: int, seed: int, numbers: Tensor) -> Tensor:
    """The tokens of the games of these `numbers`, int64 [games, moves that fit on the board], PAD behind the last move
    of a game that ends with empty squares."""
    position = start(size, len(numbers), numbers.device)
    key = hashed(torch.full_like(numbers, seed), numbers)
    table = _tokens(size).to(numbers.device)
    tokens = torch.full((len(numbers), size * size - 4), PAD, device=numbers.device)
    for number in range(tokens.shape[1]):
        choices = count(position.legal)
        if not choices.any():
            break
        draw = positive(hashed(key, torch.tensor(number)))
        move = _nth(position.legal, draw % choices.clamp_min(1))
        tokens[:, number] = table[count(move - 1)]
        position = play(size, position, move)
    return tokens


class Games(NamedTuple):
    """Tokens as `random_games` gives them, int64 [games, moves]."""

    tokens: Tensor


def games_of_split(
    size: int, split: Split, seed: int, first: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Drawn[Games]]:
    """The games of a split from number `first` on, without end, some thousands at a time. All moves decide but the
    last, which they leave no choice of."""

    def draw(numbers: Tensor) -> Games:
        return Games(random_games(size, seed, numbers))

    return draw_split(draw, lambda games: games.tokens[:, :-1], split, first, device, AT_A_TIME)


def squares_of_tokens(size: int) -> np.ndarray:
    """The square `row * size + column` of each token, int64 [vocabulary]; -1 of PAD.

    The squares in their order without the four in the middle, from 1 on: the vocabulary of Li et al. 2023.
    """
    occupied = spread(size, start(size, 1).mine | start(size, 1).theirs)[0].numpy()
    return np.concatenate([[-1], np.flatnonzero(~occupied)])


def moves_of_tokens(size: int) -> Tensor:
    """Of each token the set of its one square, int64 [vocabulary]; the empty set of PAD."""
    return torch.tensor([0, *(signed(1 << int(square)) for square in squares_of_tokens(size)[1:])])


@cache
def _tokens(size: int) -> Tensor:
    """The token of each square, int64 [65]; PAD in the middle, and of 64, which is no square."""
    squares = squares_of_tokens(size)
    table = torch.full((65,), PAD)
    table[squares[1:]] = torch.arange(1, len(squares))
    return table


def _nth(squares: Tensor, n: Tensor) -> Tensor:
    """The set of the square number `n`, from 0, of each set."""
    for dropped in range(int(n.max())):
        squares = torch.where(n > dropped, squares & (squares - 1), squares)
    return squares & -squares
