"""Where latents fire: the active latents of rows, latent by latent, for evaluations that look at single ones."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from saescale.trainers.exchange.trained import Trained


class Firing(NamedTuple):
    """Pairs of a row and a latent that is active there, in the order of the latents; `rows` of one latent ascend."""

    fired: np.ndarray  # int64 [n_latents], on how many rows each is active
    rows: np.ndarray  # int64 [pairs]
    values: np.ndarray  # float32 [pairs], its activation
    ends: np.ndarray  # int64 [n_latents + 1], where the pairs of each latent end and those of the next begin

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows on which it is active, and how much."""
        here = slice(self.ends[latent], self.ends[latent + 1])
        return self.rows[here], self.values[here]

    @property
    def latents(self) -> np.ndarray:
        """The latent of each pair, int64 [pairs]."""
        return np.repeat(np.arange(len(self.fired)), self.fired)

    def fired_on(self, kept: np.ndarray) -> np.ndarray:
        """On how many of the rows of `kept`, bool [rows], each latent is active, int64 [n_latents]."""
        return np.bincount(self.latents[kept[self.rows]], minlength=len(self.fired))


def firing(trained: Trained, raw: Tensor) -> Firing:
    """Of raw rows [rows, d_model]; memory goes with their active latents. Active is what is above 0."""
    sparse = trained.encode_sparse(raw)
    indices, values = sparse.indices.cpu().numpy(), sparse.values.cpu().numpy()
    rows, places = np.nonzero(indices >= 0)
    latents = indices[rows, places]
    order = np.argsort(latents, kind="stable")
    fired = np.bincount(latents, minlength=trained.sae.shape.n_latents)
    return Firing(fired, rows[order], values[rows, places][order], np.concatenate([[0], np.cumsum(fired)]))
