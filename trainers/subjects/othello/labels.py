"""The ground truth at each move of Othello, recomputed from the tokens.

A board is seen by who moves next on it. "before" is the board on which the token is played (Du et al. 2025 label that
one), "after" the one that it leaves (Karvonen et al. 2024, Nanda 2023). All but `edge` and `corner` are of squares, row
by row.

| label | shape | what |
|---|---|---|
| `tile_before`, `tile_after` | [..., squares] int8 | EMPTY, MINE or YOURS: who moves next is "me" |
| `legal_before`, `legal_after` | [..., squares] bool | where who moves next may play |
| `changed_before`, `changed_after` | [..., squares] bool | discs of another colour than the one they were laid with |
| `flipped` | [..., squares] bool | the discs that the token turns over |
| `stable_du2025_before`, `stable_du2025_after` | [..., squares] bool | discs that are stable by the rule of Du et al. |
| `stable_strict_before`, `stable_strict_after` | [..., squares] bool | discs that are stable by `strictly_stable` |
| `edge`, `corner` | [...] bool | whether the token's square lies on an edge (corners too), in a corner |
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.othello.board import Position, flipped, moved, play, signed, spread, start
from saescale.trainers.subjects.othello.games import moves_of_tokens

EMPTY, MINE, YOURS = 0, 1, 2
TILES = ("empty", "mine", "yours")
BOARDS = ("before", "after")
OF_BOARDS = ("tile", "legal", "changed", "stable_du2025", "stable_strict")
LABELS = (*(f"{label}_{board}" for label in OF_BOARDS for board in BOARDS), "flipped", "edge", "corner")
_AXES = ((0, 1), (1, 0), (1, 1), (1, -1))


class Replay(NamedTuple):
    """The boards before and after each token, the discs on them whose colour is not the one that they were laid with,
    and the squares that were played and turned over, [games, length]."""

    before: Position
    after: Position
    changed_before: Tensor
    changed_after: Tensor
    move: Tensor
    flipped: Tensor


def replay(size: int, tokens: Tensor) -> Replay:
    """Plays `tokens` [games, length]; PAD leaves a board as it is.

    Raises SaescaleError for a token that is none of this board, or a move that is not legal.
    """
    table = moves_of_tokens(size)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(table):
        raise SaescaleError(
            f"the tokens {int(tokens.min())} to {int(tokens.max())} are not all of a {size}x{size} board of Othello, "
            f"whose squares are 1 to {len(table) - 1}"
        )
    moves = table.to(tokens.device)[tokens.long()]
    boards, turned, changed = [start(size, len(tokens), tokens.device)], [], [torch.zeros_like(moves[:, 0])]
    for number, move in enumerate(moves.unbind(dim=1)):
        wrong = (move & ~boards[-1].legal) != 0
        if wrong.any():
            game = int(wrong.nonzero()[0])
            raise SaescaleError(
                f"game {game} is no game of Othello on {size}x{size}: its move {number} (token "
                f"{int(tokens[game, number])}) is not legal"
            )
        turned.append(flipped(size, boards[-1], move))
        changed.append(changed[-1] ^ turned[-1])
        boards.append(play(size, boards[-1], move))
    sets = [torch.stack(column, dim=1) for column in zip(*boards, strict=True)]
    before, after = Position(*(each[:, :-1] for each in sets)), Position(*(each[:, 1:] for each in sets))
    of_boards = torch.stack(changed, dim=1)
    return Replay(before, after, of_boards[:, :-1], of_boards[:, 1:], moves, torch.stack(turned, dim=1))


def labels_of_tokens(size: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """All of LABELS for `tokens` [games, length]. Raises what `replay` raises."""
    played = replay(size, torch.from_numpy(np.asarray(tokens, np.int64)))
    found = {}
    boards = (played.before, played.changed_before), (played.after, played.changed_after)
    for name, (board, changed) in zip(BOARDS, boards, strict=True):
        found[f"tile_{name}"] = tiles(size, board)
        found[f"legal_{name}"] = spread(size, board.legal)
        found[f"changed_{name}"] = spread(size, changed)
        found[f"stable_du2025_{name}"] = spread(size, stable_du2025(size, board.mine | board.theirs))
        found[f"stable_strict_{name}"] = spread(size, strictly_stable(size, board))
    corner, edge = _corners_and_edges(size)
    found |= {"flipped": spread(size, played.flipped), "edge": (played.move & edge) != 0,
              "corner": (played.move & corner) != 0}  # fmt: skip
    return {name: found[name].numpy() for name in LABELS}


def tiles(size: int, board: Position) -> Tensor:
    """EMPTY, MINE or YOURS, int8 [..., squares]."""
    mine, theirs = (spread(size, squares).to(torch.int8) for squares in (board.mine, board.theirs))
    return MINE * mine + YOURS * theirs


def stable_du2025(size: int, occupied: Tensor) -> Tensor:
    """Du et al. 2025: one pass that changes the set as it goes, whatever the colours. Occupied corners are stable;
    then, edge after edge and square after square, an occupied one beside a stable one on that edge. Their last step,
    inner squares all of whose neighbours are stable, finds none on boards of 4 and more, and is left out."""
    corner, _ = _corners_and_edges(size)
    stable = occupied & corner
    last = size - 1
    edges = [[(x, y) for y in range(size)] for x in (0, last)] + [[(x, y) for x in range(size)] for y in (0, last)]
    for edge in edges:
        bits = [signed(1 << x * size + y) for x, y in edge]
        for place, bit in enumerate(bits):
            beside = sum(bits[other] for other in (place - 1, place + 1) if 0 <= other < size)
            stable = stable | torch.where((stable & beside) != 0, occupied & bit, 0)
    return stable


def strictly_stable(size: int, board: Position) -> Tensor:
    """Discs that nobody can turn over any more, as far as this shows: along each of the four lines through such a disc
    the whole line is occupied, or on one side there is the end of the board or a stable disc of its colour."""
    whole = torch.full_like(board.mine, signed((1 << size * size) - 1))
    empty = whole & ~(board.mine | board.theirs)
    full = []
    for down, right in _AXES:
        open_ = empty
        for _ in range(size - 1):
            open_ = open_ | moved(size, open_, down, right) | moved(size, open_, -down, -right)
        full.append(~open_)
    stable = torch.zeros_like(whole)
    while True:
        found = torch.zeros_like(whole)
        for colour in (board.mine, board.theirs):
            loose = whole & ~(stable & colour)  # what gives no hold to a neighbour of that colour
            safe = colour
            for (down, right), line in zip(_AXES, full, strict=True):
                safe = safe & (line | ~moved(size, loose, down, right) | ~moved(size, loose, -down, -right))
            found |= safe
        if torch.equal(found, stable):
            return stable
        stable = found


def _corners_and_edges(size: int) -> tuple[int, int]:
    places = {(row, column): row * size + column for row in range(size) for column in range(size)}
    ends = (0, size - 1)
    corner = sum(1 << bit for (row, column), bit in places.items() if row in ends and column in ends)
    edge = sum(1 << bit for (row, column), bit in places.items() if row in ends or column in ends)
    return signed(corner), signed(edge)
