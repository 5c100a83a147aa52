"""A total order of pre-activations: by score, and of equal scores the lower latent first.

A key is an int64: the score's bits above, so turned that integers have the order of the floats, and below them the
index of the latent in the whole cell counted from its end. No two keys of a token are alike, so "the k largest" means
one thing alone, however the latents are cut into shards.
"""

import torch
from torch import Tensor

from saescale.trainers.kernels.interface import Selected

NONE = torch.iinfo(torch.int64).min  # of a place that holds no latent; below every other key
_LOW = 2**32 - 1


def keys_of(scores: Tensor, latents: Tensor) -> Tensor:
    """int64 of float32 scores and of the latents' indices in the whole cell (below 2**32), both of one shape.

    -0.0 is 0.0. NaN is above everything else, whatever its sign: it has to be seen.
    """
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW - latents.long())


def scores_of(keys: Tensor) -> Tensor:
    """float32: the scores in keys of positive ones; 0 for what has none."""
    return (keys.clamp_min(0) >> 32).int().view(torch.float32)


def candidates(local: Selected, first: int) -> Tensor:
    """Keys [batch, width] of what a shard offers whose latents begin at `first`; NONE where it has no more."""
    keys = keys_of(local.z, local.indices.long() + first)
    return torch.where((local.indices >= 0) & ~local.z.isnan(), keys, NONE)


def kth_largest(keys: Tensor, k: int) -> Tensor:
    """[batch]: the k-th largest of each row of keys [batch, n], the least one where n < k."""
    return keys.topk(min(k, keys.shape[1]), dim=1, sorted=False).values.amin(dim=1)


def kept(local: Selected, keys: Tensor, least: Tensor) -> Selected:
    """Those of `local` whose keys reach `least` [batch], in their order, then padding.

    NaN, which says that the encoder diverged, has no place in the order and stays (sparse_parts.or_nan).
    """
    stays = (keys >= least[:, None]) & (keys > NONE)
    if keys.shape[1] == 0:
        return local
    z = torch.where(stays | local.z.isnan(), local.z, 0.0)
    indices = torch.where(stays, local.indices, -1)
    width = keys.shape[1]
    place = torch.where(stays, stays.cumsum(dim=1) - 1, width)
    # What goes shares one more place, which is cut off.
    padded = torch.full((len(keys), width + 1), -1, dtype=indices.dtype, device=indices.device)
    values = z.new_zeros(len(keys), width + 1)
    kept_z = values.scatter_(1, place, z)[:, :width].contiguous()
    kept_indices = padded.scatter_(1, place, indices)[:, :width].contiguous()
    nan = local.z.isnan().any(dim=1, keepdim=True)
    return Selected(kept_indices, torch.where(nan, local.z, kept_z))


def reference(scores: Tensor, k: int) -> Tensor:
    """bool [batch, n]: the k largest of each row by that order, found by a plain sort in one process."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        order = sorted(range(len(values)), key=lambda latent: (-values[latent], latent))
        chosen[row, order[:k]] = True
    return chosen
