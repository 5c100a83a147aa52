"""A trained SAE, ready to use: raw activations in, latents and reconstructions out."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.preprocess import normalise


class SparseLatents(NamedTuple):
    """The active latents of each row, most active first: int64 and float32 [batch, most], padded with -1 and 0."""

    indices: Tensor
    values: Tensor


class Trained(NamedTuple):
    """An SAE and the cell that it was trained as. `sae` expects rows as preprocess.normalise makes them; the methods
    take raw activations [batch, d_model] of any float type, and give x_hat in their space."""

    sae: SAE
    cell: Cell

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        """Latents, float32 [batch, n_latents], 0 where a latent is not active."""
        return torch.cat([self.sae.encode(normalise(rows)) for rows in self._chunks(raw)])

    @torch.no_grad()
    def encode_sparse(self, raw: Tensor) -> SparseLatents:
        """The active latents alone; memory does not grow with n_latents."""
        parts = []
        for rows in self._chunks(raw):
            latents = self.sae.encode(normalise(rows))
            most = int((latents > 0).sum(dim=1).max()) if len(latents) else 0
            best = latents.topk(most, dim=1)
            parts.append(SparseLatents(best.indices.masked_fill(best.values <= 0, -1), best.values.clamp_min(0)))
        most = max(part.indices.shape[1] for part in parts)
        return SparseLatents(
            torch.cat([_widened(part.indices, most, -1) for part in parts]),
            torch.cat([_widened(part.values, most, 0) for part in parts]),
        )

    @torch.no_grad()
    def reconstruct(self, raw: Tensor) -> Tensor:
        """x_hat, float32 [batch, d_model], with each row's own mean and norm put back."""
        parts = []
        for rows in self._chunks(raw):
            rows = rows.float()
            mean = rows.mean(dim=-1, keepdim=True)
            norm = (rows - mean).norm(dim=-1, keepdim=True)
            parts.append(self.sae.forward(normalise(rows)).x_hat * norm + mean)
        return torch.cat(parts)

    @property
    def origin(self) -> Tensor:
        """[d_model]: where batches are centred, near the median of the data, which helps bfloat16."""
        first = next(iter(self.sae.params.values()))
        return self.sae.params.get("b_pre", first.new_zeros(self.sae.shape.d_model))

    def _chunks(self, raw: Tensor) -> Iterator[Tensor]:
        """On the SAE's device, so many rows at a time that their latents fit."""
        device = next(iter(self.sae.params.values())).device
        for rows in raw.split(max(1, CHUNK_ENTRIES // self.sae.shape.n_latents)):
            yield rows.to(device)


def _widened(part: Tensor, columns: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, columns - part.shape[1]), value=fill)
