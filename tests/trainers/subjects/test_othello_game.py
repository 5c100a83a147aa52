"""Rules, random games and labels of Othello, held to code that goes square by square."""

import random

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest.contexts import SPLITS
from saescale.trainers.subjects.othello import board, games
from saescale.trainers.subjects.othello.labels import LABELS, labels_of_tokens
from tests.trainers.subjects.slow_othello import Board, random_game, token_of


def slow_labels(size: int, tokens: list[int]) -> dict[str, list[object]]:
    """Every label at every move of one game, one by one."""
    slow, found = Board(size), {name: [] for name in LABELS}  # type: ignore[var-annotated]
    squares = games.squares_of_tokens(size)

    def note(when: str) -> None:
        found[f"tile_{when}"].append(slow.tiles())
        legal = slow.legal(slow.mover)
        found[f"legal_{when}"].append([square in legal for square in slow.squares()])
        found[f"changed_{when}"].append(slow.changed())
        found[f"stable_du2025_{when}"].append(slow.stable_du2025())
        found[f"stable_strict_{when}"].append(slow.stable_strict())

    for token in tokens:
        square = divmod(int(squares[token]), size)
        note("before")
        turned = slow.turned(square, slow.mover)
        found["flipped"].append([other in turned for other in slow.squares()])
        ends = [place in (0, size - 1) for place in square]
        found["edge"].append(any(ends))
        found["corner"].append(all(ends))
        slow.play(square)
        note("after")
    return found


@pytest.mark.parametrize(("size", "number"), [(4, 20), (6, 12), (8, 5)])
def test_labels_are_those_of_slow_code(size: int, number: int) -> None:
    rng = random.Random(size)
    for _ in range(number):
        tokens = [token_of(size, square) for square in random_game(size, rng)]
        found = labels_of_tokens(size, np.array([tokens]))
        assert tuple(found) == LABELS
        for name, expected in slow_labels(size, tokens).items():
            assert np.array_equal(found[name][0], np.array(expected)), name


@pytest.mark.parametrize(("size", "number"), [(4, 40), (6, 30), (8, 10)])
def test_random_games_are_legal_to_their_end(size: int, number: int) -> None:
    tokens = games.random_games(size, 3, torch.arange(number))
    squares = games.squares_of_tokens(size)
    ended = 0
    for game in tokens.tolist():
        slow = Board(size)
        moves = [token for token in game if token]
        for token in moves:
            slow.play(divmod(int(squares[token]), size))  # asserts that it is legal
        assert not slow.legal(slow.mover)
        assert game == moves + [games.PAD] * (len(game) - len(moves))
        ended += len(moves) < len(game)
    if size == 4:  # where passes and early ends are common
        assert ended > 0


def test_the_number_of_games_is_the_published_one() -> None:
    """Perft of 8x8: leaves of the tree of all games, by depth (known since the 1990s)."""
    position, found = board.start(8, 1), []
    for _ in range(6):
        choices = board.count(position.legal)
        found.append(int(choices.sum()))
        which = torch.cat([torch.arange(int(number)) for number in choices])
        every = board.Position(*(sets.repeat_interleave(choices) for sets in position))
        position = board.play(8, every, games._nth(every.legal, which))
    assert found == [4, 12, 56, 244, 1396, 8200]


def test_the_vocabulary_is_the_published_one() -> None:
    squares = games.squares_of_tokens(8)
    assert len(squares) == 61
    assert set(range(64)) - set(squares[1:].tolist()) == {27, 28, 35, 36}
    # Black's first moves: d3, c4, f5, e6.
    first = {int(squares[token]) for token in games.random_games(8, 0, torch.arange(200))[:, 0]}
    assert first == {19, 26, 37, 44}


def test_every_legal_move_is_drawn_equally_often() -> None:
    """A chi-squared of the second moves after one first move, and of the tenth choice among as many as there are."""
    tokens = games.random_games(6, 11, torch.arange(12_000))
    _, first = np.unique(tokens[:, 0].numpy(), return_counts=True)
    assert len(first) == 4
    assert ((first - 3_000) ** 2 / 3_000).sum() < 16.3  # 99.9 % of 3 degrees of freedom
    after = tokens[tokens[:, 0] == tokens[0, 0], 1].numpy()
    _, second = np.unique(after, return_counts=True)
    assert len(second) == 3
    assert ((second - len(after) / 3) ** 2 / (len(after) / 3)).sum() < 13.8


def test_a_game_is_the_same_however_it_is_drawn() -> None:
    whole = games.random_games(6, 5, torch.arange(100))
    assert torch.equal(games.random_games(6, 5, torch.tensor([71])), whole[71:72])
    assert torch.equal(games.random_games(6, 5, torch.arange(40, 60)), whole[40:60])
    assert not torch.equal(games.random_games(6, 6, torch.arange(100)), whole)
    assert len({tuple(game) for game in whole.tolist()}) == 100


def test_no_game_is_in_both_splits() -> None:
    # On 4x4, where games are few and drawn again and again.
    train, heldout = (
        {
            tuple(g)
            for seed in range(3)
            for g in next(games.games_of_split(4, split, seed)).things.tokens[:, :-1].tolist()
        }
        for split in SPLITS
    )
    assert not train & heldout
    assert 0.15 < len(heldout) / (len(train) + len(heldout)) < 0.35
    assert len(train) < 4_300  # of 4,685: many were drawn more than once


@pytest.mark.parametrize("size", board.SIZES)
def test_sets_and_squares(size: int) -> None:
    rng = np.random.default_rng(0)
    marked = torch.from_numpy(rng.random((50, size * size)) < 0.4)
    sets = board.gather(size, marked)
    assert torch.equal(board.spread(size, sets), marked)
    assert torch.equal(board.count(sets), marked.sum(dim=1))
    grid = marked.view(50, size, size)
    right = torch.zeros_like(grid)
    right[:, :, 1:] = grid[:, :, :-1]
    assert torch.equal(board.spread(size, board.moved(size, sets, 0, 1)).view_as(grid), right)


def test_what_is_no_game_is_one_line() -> None:
    with pytest.raises(SaescaleError, match="tokens 1 to 33 are not all of a 6x6 board"):
        labels_of_tokens(6, np.array([[1, 33]]))
    game = games.random_games(6, 0, torch.arange(1)).numpy()
    game[0, 5] = game[0, 4]
    with pytest.raises(SaescaleError, match="game 0 is no game of Othello on 6x6: its move 5"):
        labels_of_tokens(6, game)
