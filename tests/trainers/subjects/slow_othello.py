"""Othello square by square, as obvious as it can be: what the bitboards are held to."""

import random

DIRECTIONS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
BLACK, WHITE = "black", "white"
OTHER = {BLACK: WHITE, WHITE: BLACK}
Square = tuple[int, int]


class Board:
    """Whose disc lies on which square, and who is to move; None when nobody can."""

    def __init__(self, size: int) -> None:
        self.size = size
        low, high = size // 2 - 1, size // 2
        self.disc: dict[Square, str] = {
            (low, high): BLACK, (high, low): BLACK, (low, low): WHITE, (high, high): WHITE,
        }  # fmt: skip
        self.laid = dict(self.disc)  # what colour a disc had when it was laid
        self.mover = BLACK
        self.on_board = {(row, column): None for row in range(size) for column in range(size)}  # quick to look up

    def squares(self) -> list[Square]:
        return list(self.on_board)

    def turned(self, square: Square, colour: str) -> list[Square]:
        """The discs that `colour` would turn over by playing there."""
        found = []
        for down, right in DIRECTIONS:
            line, (row, column) = [], (square[0] + down, square[1] + right)
            while self.disc.get((row, column)) == OTHER[colour]:
                line.append((row, column))
                row, column = row + down, column + right
            if self.disc.get((row, column)) == colour:
                found += line
        return found

    def legal(self, colour: str) -> list[Square]:
        return [square for square in self.squares() if square not in self.disc and self.turned(square, colour)]

    def play(self, square: Square) -> None:
        assert square in self.legal(self.mover)
        for other in self.turned(square, self.mover):
            self.disc[other] = self.mover
        self.disc[square] = self.laid[square] = self.mover
        if self.legal(OTHER[self.mover]) or not self.legal(self.mover):
            self.mover = OTHER[self.mover]

    def tiles(self) -> list[int]:
        """0 empty, 1 a disc of who is to move, 2 one of the other."""
        return [0 if s not in self.disc else 1 if self.disc[s] == self.mover else 2 for s in self.squares()]

    def changed(self) -> list[bool]:
        return [s in self.disc and self.disc[s] != self.laid[s] for s in self.squares()]

    def stable_du2025(self) -> list[bool]:
        size, stable = self.size, set()
        for corner in ((0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)):
            if corner in self.disc:
                stable.add(corner)
        for x in (0, size - 1):
            for y in range(size):
                if (x, y) in self.disc and ((x, y - 1) in stable or (x, y + 1) in stable):
                    stable.add((x, y))
        for y in (0, size - 1):
            for x in range(size):
                if (x, y) in self.disc and ((x - 1, y) in stable or (x + 1, y) in stable):
                    stable.add((x, y))
        for x in range(1, size - 1):
            for y in range(1, size - 1):
                if (x, y) in self.disc and all((x + down, y + right) in stable for down, right in DIRECTIONS):
                    stable.add((x, y))
        return [square in stable for square in self.squares()]

    def stable_strict(self) -> list[bool]:
        stable: set[Square] = set()
        while True:
            more = {square for square in self.disc if square not in stable and self._holds(square, stable)}
            if not more:
                return [square in stable for square in self.squares()]
            stable |= more

    def _holds(self, square: Square, stable: set[Square]) -> bool:
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            sides = [(square[0] + down, square[1] + right), (square[0] - down, square[1] - right)]
            backed = any(
                side not in self.on_board or (side in stable and self.disc[side] == self.disc[square])
                for side in sides
            )  # fmt: skip
            if not backed and not all(place in self.disc for place in self._line(square, down, right)):
                return False
        return True

    def _line(self, square: Square, down: int, right: int) -> list[Square]:
        steps = range(-self.size, self.size + 1)
        line = [(square[0] + step * down, square[1] + step * right) for step in steps]
        return [place for place in line if place in self.on_board]


def random_game(size: int, rng: random.Random) -> list[Square]:
    """Moves drawn uniformly until nobody can move."""
    board, moves = Board(size), []
    while choices := board.legal(board.mover):
        moves.append(rng.choice(choices))
        board.play(moves[-1])
    return moves


def token_of(size: int, square: Square) -> int:
    """Squares are numbered from 1, without the four in the middle."""
    middle = {(row, column) for row in (size // 2 - 1, size // 2) for column in (size // 2 - 1, size // 2)}
    return [s for s in Board(size).squares() if s not in middle].index(square) + 1
