"""AUROC, F1 and unions of sparse latents, held to scipy and to loops over every latent, label and row."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from saescale.trainers.evals.boards.detectors import (
    THRESHOLDS,
    Active,
    active_of,
    active_of_channels,
    auroc,
    best_f1,
    predict_by_union,
)
from saescale.trainers.exchange.trained import SparseLatents

ROWS, LATENTS, LABELS = 120, 7, 5


@pytest.fixture
def dense() -> np.ndarray:
    """Latents [rows, latents] with ties, one that never fires and one that always does."""
    rng = np.random.default_rng(0)
    found = np.where(rng.random((ROWS, LATENTS)) < 0.4, rng.integers(1, 9, (ROWS, LATENTS)) / 4, 0).astype(np.float32)
    found[:, 3] = 0
    found[:, 5] = rng.random(ROWS) + 0.5
    return found


@pytest.fixture
def labels(dense: np.ndarray) -> np.ndarray:
    """Some that latents tell, some that nobody does, bool [rows, labels]."""
    rng = np.random.default_rng(1)
    found = rng.random((ROWS, LABELS)) < 0.3
    found[:, 0] = dense[:, 0] > 0.5
    found[:, 1] = (dense[:, 1] > 0) | (dense[:, 2] > 1)
    return found


def active(dense: np.ndarray) -> Active:
    indices = np.full((ROWS, LATENTS), -1)
    values = np.zeros((ROWS, LATENTS), np.float32)
    for row, latents in enumerate(dense):
        those = np.flatnonzero(latents)
        indices[row, : len(those)], values[row, : len(those)] = those, latents[those]
    return active_of(SparseLatents(torch.from_numpy(indices), torch.from_numpy(values)), LATENTS)


def test_auroc_is_that_of_mann_and_whitney(dense: np.ndarray, labels: np.ndarray) -> None:
    found = auroc(active(dense), labels)
    for latent in range(LATENTS):
        for label in range(LABELS):
            truth = labels[:, label]
            u = mannwhitneyu(dense[truth, latent], dense[~truth, latent]).statistic
            assert found[latent, label] == pytest.approx(u / (truth.sum() * (~truth).sum()))
    assert found[3] == pytest.approx(0.5)
    with np.errstate(invalid="ignore"):
        assert np.isnan(auroc(active(dense), np.ones((ROWS, 1), bool))).all()


def test_f1_is_that_of_a_loop(dense: np.ndarray, labels: np.ndarray) -> None:
    found = best_f1(active(dense), labels)
    for place, threshold in enumerate(THRESHOLDS):
        fires = dense > np.float32(threshold) * dense.max(axis=0)
        for label in range(LABELS):
            each = []
            for latent in range(LATENTS):
                both = (fires[:, latent] & labels[:, label]).sum()
                either = fires[:, latent].sum() + labels[:, label].sum()
                each.append(2 * both / max(either, 1))
            assert found[place, label] == pytest.approx(max(each))


def test_a_union_is_that_of_a_loop(dense: np.ndarray, labels: np.ndarray) -> None:
    chosen_on = np.arange(ROWS) % 2 == 0
    found = predict_by_union(active(dense), labels, chosen_on, precision=0.8, least=5)
    some = 0
    for place, threshold in enumerate(THRESHOLDS):
        fires = dense > np.float32(threshold) * dense.max(axis=0)
        predicted = np.zeros((ROWS, LABELS), bool)
        rules = 0
        for latent in range(LATENTS):
            times = fires[chosen_on, latent].sum()
            for label in range(LABELS):
                held = (fires[:, latent] & labels[:, label])[chosen_on].sum()
                if times >= 5 and held >= 0.8 * times:
                    predicted[fires[:, latent], label] = True
                    rules += 1
        assert np.array_equal(found.predicted[place], predicted)
        assert found.rules[place] == rules
        some += rules
    assert some > 5


def test_channels_are_both_signs_of_each_coordinate() -> None:
    act = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3
    found = active_of_channels(act)
    centred = (act - act.mean(dim=0)).numpy()
    dense = np.zeros((50, 8), np.float32)
    dense[found.row, found.latent] = found.value
    np.testing.assert_allclose(dense[:, :4] - dense[:, 4:], centred, rtol=1e-6)
    assert (dense >= 0).all()
