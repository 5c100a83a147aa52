"""Reconstructions that grow: each has the latents of the one before and some more, and each one's error is in the loss.

A pair is decoded once, in the reconstruction where it comes in, and has its gradient from the errors of that one and
all that follow: with e_j the error of reconstruction j and w_j its weight, that by x_hat of a pair of group g is

    scale * sum_{j >= g} w_j e_j

so a loss of any number of nested reconstructions costs what one of them does, and errors [groups, batch, d_model].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saescale.trainers.architectures.topk_sparse import Chosen, Reconstructed
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Selected, Term
from saescale.trainers.mesh.mesh import Mesh


def decode_nested(
    chosen: Chosen, target: Tensor, offset: Tensor, W_dec: Tensor, scale: float, errors: Tensor
) -> Reconstructed:
    """As TopKStep.decode, of groups that add up; the last reconstruction is the SAE's own."""
    sparse, none = kernels(target.device), torch.zeros_like(offset)
    before, squared = target, []
    for number, (selected, error) in enumerate(zip(chosen.terms, errors, strict=True)):
        squared.append(sparse.decode(before, none if number else offset, selected, W_dec, None, error).squared)
        before = error
    # From the last on: what is left of each is the sum, in units of the last one's weight.
    last = chosen.weights[-1]
    for number in range(len(errors) - 2, -1, -1):
        errors[number].mul_(chosen.weights[number] / last).add_(errors[number + 1])
    terms = [
        Term(selected, sparse.gradient_by_z(error, selected.indices, W_dec, scale * last), scale * last)
        for selected, error in zip(chosen.terms, errors, strict=True)
    ]
    return Reconstructed(terms, squared, len(errors) - 1, errors[0].sum(dim=0).mul_(scale * last))


class Nested:
    """A step of TopK's kind whose groups add up: what it does otherwise when it decodes, and says of its losses."""

    def decode(
        self, chosen: Chosen, target: Tensor, offset: Tensor, W_dec: Tensor, scale: float, errors: Tensor, mesh: Mesh
    ) -> Reconstructed:
        return decode_nested(chosen, target, offset, W_dec, scale, errors)

    def parts(self, losses: Sequence[float], chosen: Chosen) -> dict[str, float]:
        return {"nested": sum(loss * weight for loss, weight in zip(losses, chosen.weights, strict=True))}


def by_index(selected: Selected, ends: Sequence[int]) -> list[Selected]:
    """`selected`, whose indices ascend before its -1s, in groups of indices below each of `ends`."""
    indices = selected.indices
    batch, width = indices.shape
    # -1 stands behind the rest, beyond every end.
    keys = torch.where(indices < 0, torch.iinfo(torch.int32).max, indices)
    bounds = torch.tensor(ends, dtype=torch.int32, device=keys.device).expand(batch, -1).contiguous()
    until = torch.searchsorted(keys, bounds)
    since = torch.cat([until.new_zeros(batch, 1), until[:, :-1]], dim=1)
    groups = []
    for first, end, most in zip(since.T, until.T, (until - since).amax(dim=0).tolist(), strict=True):
        place = first[:, None] + torch.arange(max(1, most), device=keys.device)
        inside = place < end[:, None]
        place = place.clamp_(max=width - 1)
        # NaN, which says that the encoder diverged, has no index (or_nan).
        z = torch.where(inside | selected.z.isnan().any(), selected.z.gather(1, place), 0.0)
        groups.append(Selected(torch.where(inside, indices.gather(1, place), -1), z))
    return groups


def by_rank(selected: Selected, ends: Sequence[int]) -> list[Selected]:
    """The largest ends[0] of each token, then those up to rank ends[1], and so on; ties to the lower index."""
    order = torch.where(selected.indices < 0, torch.iinfo(torch.int32).max, selected.indices).argsort(dim=1)
    z = selected.z.gather(1, order)
    z, by_size = z.sort(dim=1, descending=True, stable=True)
    indices = selected.indices.gather(1, order.gather(1, by_size))
    starts = [0, *ends[:-1]]
    return [
        Selected(indices[:, start:end].contiguous(), z[:, start:end].contiguous())
        for start, end in zip(starts, ends, strict=True)
    ]
