"""How well single latents tell truths that hold or do not: AUROC, F1 at a threshold, and what their union predicts.

Latents are sparse, and so is all of this: its cost goes by the active latents, whatever their number in all.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from saescale.trainers.exchange.trained import SparseLatents, Trained

THRESHOLDS = np.arange(10) / 10  # as shares of a latent's largest activation; above all of it nothing is active


class Active(NamedTuple):
    """The active latents of rows, by latent and in each by value: int64 [active], float32 [active]."""

    latent: np.ndarray
    row: np.ndarray
    value: np.ndarray
    n_latents: int
    n_rows: int

    def where(self, kept: np.ndarray) -> sparse.csr_matrix:
        """Those of `kept` [active] as 1 in a matrix [latents, rows]."""
        places = (self.latent[kept], self.row[kept])
        return sparse.csr_matrix((np.ones(len(places[0]), np.float32), places), (self.n_latents, self.n_rows))

    def above(self, threshold: float) -> np.ndarray:
        """Which are above that share of their latent's largest value, bool [active]."""
        largest = np.zeros(self.n_latents, np.float32)
        np.maximum.at(largest, self.latent, self.value)
        return self.value > np.float32(threshold) * largest[self.latent]


def active_latents(trained: Trained, act: Tensor) -> Active:
    """The active latents of rows [rows, d_model] as a store has them."""
    return active_of(trained.encode_sparse(act), trained.cell.n_latents)


def active_of(latents: SparseLatents, n_latents: int) -> Active:
    """What `Trained.encode_sparse` gives, in the order of Active."""
    indices, values = latents.indices.cpu().numpy(), latents.values.cpu().numpy()
    row, place = np.nonzero(indices >= 0)
    return _ordered(indices[row, place], row, values[row, place], n_latents, len(indices))


def active_of_channels(act: Tensor) -> Active:
    """The coordinates of rows [rows, d_model] as if they were latents: of each, less its mean, the positive part, then
    the negative parts, so 2 d_model of them."""
    centred = act.float() - act.float().mean(dim=0)
    return active_of_neurons(torch.cat([centred, -centred], dim=1))


def active_of_neurons(act: Tensor) -> Active:
    """Neurons [rows, neurons] as they are, active where they are positive."""
    values = act.float().numpy()
    row, latent = np.nonzero(values > 0)
    return _ordered(latent, row, values[row, latent], values.shape[1], len(values))


def _ordered(latent: np.ndarray, row: np.ndarray, value: np.ndarray, n_latents: int, n_rows: int) -> Active:
    order = np.lexsort((value, latent))
    return Active(latent[order].astype(np.int64), row[order].astype(np.int64), value[order], n_latents, n_rows)


def auroc(active: Active, labels: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of each latent for each label, float64 [n_latents, n_labels]; `labels` bool
    [rows, n_labels]. Equal values count half (Mann and Whitney 1947). NaN for a label that always holds, or never."""
    truth = labels.astype(np.float32)
    holds = labels.sum(axis=0).astype(np.float64)
    ranks = _midranks(active)
    # Rows on which a latent is silent share the lowest rank; what active ones are above it is summed alone.
    lowest = (active.n_rows - np.bincount(active.latent, minlength=active.n_latents) + 1) / 2
    more = sparse.csr_matrix((ranks - lowest[active.latent], (active.latent, active.row)),
                             (active.n_latents, active.n_rows))  # fmt: skip
    total = more @ truth.astype(np.float64) + lowest[:, None] * holds
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = (total - holds * (holds + 1) / 2) / (holds * (active.n_rows - holds))
    return found


def _midranks(active: Active) -> np.ndarray:
    """The rank of each active value among all rows of its latent, from 1; equal ones share the mean of theirs."""
    if not len(active.latent):
        return np.empty(0)
    count = np.bincount(active.latent, minlength=active.n_latents)
    begins = np.cumsum(count) - count
    rank = np.arange(len(active.latent)) - begins[active.latent] + (active.n_rows - count)[active.latent] + 1.0
    new = np.ones(len(rank), bool)
    new[1:] = (active.value[1:] != active.value[:-1]) | (active.latent[1:] != active.latent[:-1])
    group = np.cumsum(new) - 1
    found: np.ndarray = (np.bincount(group, rank) / np.bincount(group))[group]
    return found


def best_f1(active: Active, labels: np.ndarray) -> np.ndarray:
    """For each threshold and label the largest F1 of any latent as its detector, float64 [thresholds, n_labels]."""
    truth, holds = labels.astype(np.float32), labels.sum(axis=0)
    found = np.zeros((len(THRESHOLDS), labels.shape[1]))
    for place, threshold in enumerate(THRESHOLDS):
        matrix = active.where(active.above(threshold))
        both = matrix @ truth
        f1 = 2 * both / np.maximum(matrix.sum(axis=1).A1[:, None] + holds, 1)
        found[place] = f1.max(axis=0)
    return found


class Union(NamedTuple):
    """Whether labels are predicted to hold, bool [thresholds, rows, n_labels], on all rows, also those that signs
    were chosen on; `rules`: how many pairs of a latent and a label are signs, int64 [thresholds]."""

    predicted: np.ndarray
    rules: np.ndarray


def predict_by_union(active: Active, labels: np.ndarray, chosen_on: np.ndarray, precision: float, least: int) -> Union:
    """A label is predicted where a latent is active that is a sign of it: on the rows in `chosen_on` (bool [rows]) it
    was active at least `least` times, and the label then held in the share `precision`."""
    truth = (labels & chosen_on[:, None]).astype(np.float32)
    predicted = np.zeros((len(THRESHOLDS), *labels.shape), bool)
    rules = np.zeros(len(THRESHOLDS), np.int64)
    for place, threshold in enumerate(THRESHOLDS):
        matrix = active.where(active.above(threshold))
        times = (matrix @ chosen_on.astype(np.float32))[:, None]
        sign = (times >= least) & (matrix @ truth >= precision * times)
        rules[place] = sign.sum()
        predicted[place] = (matrix.T @ sparse.csr_matrix(sign.astype(np.float32))).toarray() > 0
    return Union(predicted, rules)
