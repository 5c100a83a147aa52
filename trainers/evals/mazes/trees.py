"""The best decision tree of depth two that tells a truth by columns of numbers, found by trying all of them.

A column splits rows at ten places from its smallest to its largest value: `x > split`. A tree is a root, and a split on
either side; the leaves say yes or no. It is the one with the largest F1 on the rows that it is fitted on, exactly, of
those on the columns that tell the truth best alone, or best where the first of them says yes.
"""

from typing import NamedTuple

import numpy as np

SPLITS = 10
CANDIDATES = 24  # columns that a tree may be made of
_ROWS_AT_A_TIME = 4_096


class Split(NamedTuple):
    """`x[column] > at`."""

    column: int
    at: float

    def of(self, x: np.ndarray) -> np.ndarray:
        """Which rows [rows, columns] are above, bool [rows]."""
        return np.asarray(x[:, self.column] > self.at)


class Tree(NamedTuple):
    """A root, and by whether it is below or above it the next split and what either leaf says (below, above)."""

    root: Split
    sides: tuple[tuple[Split, tuple[bool, bool]], tuple[Split, tuple[bool, bool]]]

    def of(self, x: np.ndarray) -> np.ndarray:
        """What it says of rows [rows, columns], bool [rows]."""
        said = [np.where(split.of(x), above, below) for split, (below, above) in self.sides]
        return np.where(self.root.of(x), said[1], said[0])

    def signs(self) -> tuple[int, ...]:
        """The columns that are large where it says yes: of the root where only leaves above it do, or all of these, and
        of the splits whose leaf above does and whose leaf below doesn't."""
        below, above = (leaves for _, leaves in self.sides)
        found = [self.root.column] if (any(above) and not any(below)) or (all(above) and not all(below)) else []
        found += [split.column for split, leaves in self.sides if leaves == (False, True)]
        return tuple(dict.fromkeys(found))


class Single(NamedTuple):
    """The best single split for each truth: which, and its F1 on the rows that it was chosen on."""

    split: list[Split]
    f1: np.ndarray


class Splits:
    """All splits of columns [rows, columns], and how well each alone tells truths [rows, truths]."""

    def __init__(self, x: np.ndarray, truths: np.ndarray) -> None:
        self._x, self._truths = x, truths
        low, high = x.min(axis=0), x.max(axis=0)
        self.at = (low + np.arange(SPLITS)[:, None] / SPLITS * (high - low)).astype(x.dtype)  # [splits, columns]
        holds = truths.sum(axis=0)
        truth = truths.astype(np.float32)
        f1 = []
        for at in self.at:
            above = (x > at).astype(np.float32)
            f1.append(2 * (above.T @ truth) / np.maximum(above.sum(axis=0)[:, None] + holds, 1))
        self.f1 = np.stack(f1)  # [splits, columns, truths]

    def single(self) -> Single:
        flat = self.f1.reshape(-1, self.f1.shape[2])
        best = flat.argmax(axis=0)
        places = [divmod(int(place), self._x.shape[1]) for place in best]
        splits = [Split(column, float(self.at[number, column])) for number, column in places]
        return Single(splits, flat[best, np.arange(len(best))])

    def tree(self, truth: int) -> Tree:
        """The best tree for truth number `truth`."""
        alone = self.f1[:, :, truth].max(axis=0)
        columns = np.union1d(_largest(alone), _largest(self._beside(truth)))
        splits = [Split(int(column), float(at)) for column in columns for at in self.at[:, column]]
        above = np.stack([split.of(self._x) for split in splits], axis=1)
        return best_tree(splits, above, self._truths[:, truth], float(alone.max()))

    def _beside(self, truth: int) -> np.ndarray:
        """The F1 of each column where the best single split is above, itself or what is not, float [columns]."""
        number, column = np.unravel_index(self.f1[:, :, truth].argmax(), self.f1.shape[:2])
        among = self._x[:, column] > self.at[number, column]
        x, y = self._x[among], self._truths[among, truth]
        best = np.zeros(x.shape[1])
        for at in self.at:
            above = x > at
            for said in (above, ~above):
                both = y.astype(np.float32) @ said
                best = np.maximum(best, 2 * both / np.maximum(said.sum(axis=0) + self._truths[:, truth].sum(), 1))
        return best


def _largest(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")[: CANDIDATES // 2]


def best_tree(splits: list[Split], above: np.ndarray, truth: np.ndarray, f1: float) -> Tree:
    """The tree with the largest F1 for `truth` bool [rows], of splits of which `above` bool [rows, splits] says where
    rows are; `f1` is what one of them reaches alone.

    A leaf that says yes is worth its true rows less F / 2 of all of its rows: where F is the largest F1, the best tree
    is worth F / 2 of the true rows (Dinkelbach 1967). So trees are sought at the F1 of the last one until it stays.
    """
    yes, rows = _together(above[truth]), _together(above)
    n_yes, n = int(truth.sum()), len(truth)
    best: Tree | None = None
    while True:
        gain = _quadrants(yes, n_yes) - f1 / 2 * _quadrants(rows, n)  # [side of root, side of split, root, split]
        worth = gain.clip(0).sum(axis=1)  # [side of root, root, split]
        place = worth.argmax(axis=2)  # the split on either side of each root
        root = int(worth.max(axis=2).sum(axis=0).argmax())
        sides = [(int(place[side, root]), gain[side, :, root, place[side, root]] > 0) for side in (0, 1)]
        below, over = ((splits[number], (bool(leaf[0]), bool(leaf[1]))) for number, leaf in sides)
        found = Tree(splits[root], (below, over))
        said = np.where(above[:, root], *(_said(above, *sides[side]) for side in (1, 0)))
        reached = 2 * (said & truth).sum() / max(said.sum() + n_yes, 1)
        if best is not None and reached <= f1:
            return best
        best, f1 = found, max(f1, float(reached))


def _said(above: np.ndarray, split: int, leaves: np.ndarray) -> np.ndarray:
    return np.where(above[:, split], leaves[1], leaves[0])


def _together(above: np.ndarray) -> np.ndarray:
    """On how many rows two splits are both above, float64 [splits, splits]."""
    starts = range(0, len(above), _ROWS_AT_A_TIME)
    parts = (above[start : start + _ROWS_AT_A_TIME].astype(np.float32) for start in starts)
    found = np.zeros((above.shape[1],) * 2)
    for part in parts:
        found += part.T @ part
    return found


def _quadrants(both: np.ndarray, n: int) -> np.ndarray:
    """Rows on each side of each root and split, float64 [2, 2, splits, splits]: below first."""
    alone = both.diagonal()
    return np.array([[n - alone[:, None] - alone + both, alone - both], [alone[:, None] - both, both]])
