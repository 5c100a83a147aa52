"""Trees of depth two: those found are as good as the best of all, and what they are made of is said."""

from itertools import product

import numpy as np
import pytest

from saescale.trainers.evals.mazes.trees import Split, Splits, Tree, best_tree


def f1(said: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (said & truth).sum() / max(said.sum() + truth.sum(), 1))


def best_by_force(above: np.ndarray, truth: np.ndarray) -> float:
    """The largest F1 of any root, any split on either side and any leaves."""
    splits, best = range(above.shape[1]), 0.0
    for root, low, high in product(splits, repeat=3):
        for leaves in product([False, True], repeat=4):
            below = np.where(above[:, low], leaves[1], leaves[0])
            over = np.where(above[:, high], leaves[3], leaves[2])
            best = max(best, f1(np.where(above[:, root], over, below), truth))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_no_tree_is_better_than_the_one_that_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random((80, 4)).astype(np.float32)
    noise = rng.random(80) < 0.15
    truth = ((x[:, 0] > 0.5) & (x[:, 1] > 0.6) | (x[:, 0] <= 0.2) & (x[:, 2] > 0.7)) ^ noise
    splits = [Split(column, at) for column in range(4) for at in (0.3, 0.6)]
    above = np.stack([split.of(x) for split in splits], axis=1)
    alone = max(f1(column, truth) for column in above.T)
    tree = best_tree(splits, above, truth, alone)
    assert f1(tree.of(x), truth) == pytest.approx(best_by_force(above, truth))


def test_two_columns_that_are_large_together_are_found_where_none_tells_it_alone() -> None:
    rng = np.random.default_rng(0)
    x = np.where(rng.random((3_000, 40)) < 0.2, rng.random((3_000, 40)) + 1, 0).astype(np.float32)
    truths = np.stack([(x[:, 7] > 0) & (x[:, 30] > 0), x[:, 3] > 0, (x[:, 5] > 0) & (x[:, 6] == 0),
                       (x[:, 1] > 0) | (x[:, 2] > 0)], axis=1)  # fmt: skip
    splits = Splits(x, truths)
    single, trees = splits.single(), [splits.tree(truth) for truth in range(4)]
    assert [f1(tree.of(x), truth) for tree, truth in zip(trees, truths.T, strict=True)] == [1, 1, 1, 1]
    assert single.split[1].column == 3
    assert single.f1[1] == 1
    assert single.f1[0] < 0.5
    for number, split in enumerate(single.split):
        assert f1(split.of(x), truths[:, number]) == pytest.approx(float(single.f1[number]))
    assert [set(tree.signs()) for tree in trees] == [{7, 30}, {3}, {5}, {1, 2}]


def test_columns_that_know_nothing_tell_little_of_other_rows() -> None:
    rng = np.random.default_rng(1)
    x, truth = rng.random((4_000, 30)).astype(np.float32), rng.random((4_000, 1)) < 0.05
    tree = Splits(x[:2_000], truth[:2_000]).tree(0)
    assert f1(tree.of(x[2_000:]), truth[2_000:, 0]) < 0.15


def test_a_column_that_never_varies_splits_nothing() -> None:
    x, truth = np.zeros((50, 2), np.float32), np.arange(50)[:, None] < 5
    tree = Splits(x, truth).tree(0)
    assert isinstance(tree, Tree)
    assert f1(tree.of(x), truth[:, 0]) <= 2 * 5 / 55 + 1e-9
