"""The pairs that a step looks at whose latents decide by themselves: of each row some latents, or all that a shard has.

A loss that is written with what `Looked` offers is the same of sparse pairs and of dense products, alone or on a mesh.
"""

from typing import Protocol

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Params
from saescale.trainers.architectures.sparse_parts import decode_rows, error_of
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.interface import Decoded, Selected
from saescale.trainers.mesh.mesh import Mesh


class Looked(Protocol):
    """Of rows of a batch and this shard's latents; what is of a pair is [rows, width]."""

    @property
    def z(self) -> Tensor:
        """W_enc (x - b_pre) + bias; 0 where there is no pair, NaN where an encoder diverged."""

    @property
    def there(self) -> Tensor:
        """bool: where there is a pair."""

    def at(self, vector: Tensor) -> Tensor:
        """Of each pair the entry of its latent, [rows, width] or what broadcasts to that; any where there is none."""

    def by_latent(self, values: Tensor) -> Tensor:
        """[n_latents]: the sum of `values` [rows, width] over each latent's pairs; 0 where there is no pair."""

    def error(self, z: Tensor, target: Tensor, offset: Tensor, error: Tensor, mesh: Mesh) -> Tensor:
        """Writes target - offset - z W_dec, of all shards' latents, to `error` [rows, d_model]; its squared norm, a
        float64 scalar."""

    def by_z(self, error: Tensor, scale: float) -> Tensor:
        """scale * error . W_dec of each pair's latent, whether it is active or not."""

    def decode(self, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh) -> Decoded:
        """`error`, and `by_z` of it where z > 0, else 0."""


class Some:
    """Those that exceed a threshold, as kernels select and take them."""

    def __init__(self, params: Params, selected: Selected) -> None:
        self.indices, self.z = selected
        self.there, self._W_dec = self.indices >= 0, params["W_dec"]

    def of_all(self, params: Params, mesh: Mesh) -> "Some":
        """Of the rows of all replicas."""
        return Some(params, Selected(mesh.gather_replicas(self.indices), mesh.gather_replicas(self.z)))

    def at(self, vector: Tensor) -> Tensor:
        return vector[self.indices.clamp_min(0).long()]

    def by_latent(self, values: Tensor) -> Tensor:
        n_latents = len(self._W_dec)
        places = torch.where(self.there, self.indices, n_latents).flatten().long()
        sums = values.new_zeros(n_latents + 1)
        if values.is_cuda:  # where index_add_ takes any order, and replicas have to come to the same bits
            return sums.index_put_((places,), values.flatten(), accumulate=True)[:-1]
        return sums.index_add_(0, places, values.flatten())[:-1]

    def error(self, z: Tensor, target: Tensor, offset: Tensor, error: Tensor, mesh: Mesh) -> Tensor:
        return error_of(target, offset, Selected(self.indices, z), self._W_dec, error, mesh)

    def by_z(self, error: Tensor, scale: float) -> Tensor:
        return choose.kernels(error.device).gradient_by_z(error, self.indices, self._W_dec, scale)

    def decode(self, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh) -> Decoded:
        return decode_rows(target, offset, Selected(self.indices, z), self._W_dec, scale, error, mesh)


class All:
    """All of a shard's latents, by dense products in float32: [rows, n_latents] of this shard is whole here."""

    def __init__(self, params: Params, z: Tensor, there: Tensor) -> None:
        self.z, self.there, self._W_dec = z, there, params["W_dec"]

    def at(self, vector: Tensor) -> Tensor:
        return vector

    def by_latent(self, values: Tensor) -> Tensor:
        return values.sum(dim=0)

    def error(self, z: Tensor, target: Tensor, offset: Tensor, error: Tensor, mesh: Mesh) -> Tensor:
        torch.sub(target - offset, mesh.sum_shards(z @ self._W_dec), out=error)
        return error.double().square_().sum()

    def by_z(self, error: Tensor, scale: float) -> Tensor:
        return (error @ self._W_dec.T).mul_(scale)

    def decode(self, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh) -> Decoded:
        squared = self.error(z, target, offset, error, mesh)
        return Decoded(squared, self.by_z(error, scale).masked_fill_(~(z > 0), 0))


def select_above(
    x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, most: int, of_all: int, mesh: Mesh
) -> Selected | None:
    """Kernels.select_above in each process of a mesh, as wide in all replicas of a shard. None, and that in all
    processes, where one has more than `most` pairs, or all together more than `of_all`."""
    if len(x):
        selected = choose.kernels(x.device).select_above(x, W_enc, bias, threshold, most)
    else:
        selected = Selected(torch.empty(0, 1, dtype=torch.int32, device=x.device), bias.new_empty(0, 1))
    count, width = (of_all + 1, 0) if selected is None else (int((selected.indices >= 0).sum()), selected.z.shape[1])
    told = mesh.gather_all(torch.tensor([count, width], device=x.device)).cpu()
    if selected is None or int(told[:, 0].sum()) > of_all:
        return None
    short = int(told[mesh.shard :: mesh.shards, 1].amax()) - width
    pad = torch.nn.functional.pad
    return Selected(pad(selected.indices, (0, short), value=-1), pad(selected.z, (0, short))) if short else selected
