"""Reconstructions that grow: each has the latents of the one before and some more, and each one's error is in the loss.

A pair is decoded once, in the reconstruction where it comes in, and has its gradient from the errors of that one and
all that follow: with e_j the error of reconstruction j and w_j its weight, that by x_hat of a pair of group g is

    scale * sum_{j >= g} w_j e_j

so a loss of any number of nested reconstructions costs what one of them does, and errors [groups, batch, d_model].
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saescale.trainers.architectures.topk_sparse import Chosen, Reconstructed
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.interface import Selected, Term
from saescale.trainers.mesh.keys import NONE, candidates, kept
from saescale.trainers.mesh.mesh import Mesh


def decode_nested(
    chosen: Chosen, target: Tensor, offset: Tensor, W_dec: Tensor, scale: float, errors: Tensor, mesh: Mesh
) -> Reconstructed:
    """As TopKStep.decode, of groups that add up; the last reconstruction is the SAE's own."""
    sparse = choose.kernels(target.device)
    mine = errors if mesh.replicas == 1 else errors.new_empty(len(errors), *target.shape)
    squared = _errors(chosen.terms, target, offset, W_dec, mine, mesh)
    # From the last on: what is left of each is the sum, in units of the last one's weight.
    last = chosen.weights[-1]
    for number in range(len(mine) - 2, -1, -1):
        mine[number].mul_(chosen.weights[number] / last).add_(mine[number + 1])
    terms = []
    for selected, own, error in zip(chosen.terms, mine, errors, strict=True):
        dz = sparse.gradient_by_z(own, selected.indices, W_dec, scale * last)
        if own.data_ptr() != error.data_ptr():
            error.copy_(mesh.gather_replicas(own))
        whole = Selected(mesh.gather_replicas(selected.indices), mesh.gather_replicas(selected.z))
        terms.append(Term(whole, mesh.gather_replicas(dz), scale * last))
    active = chosen.active
    if mesh.replicas > 1:
        groups = [term.selected for term in terms]
        active = Selected(torch.cat([g.indices for g in groups], dim=1), torch.cat([g.z for g in groups], dim=1))
    return Reconstructed(terms, squared, len(errors) - 1, active, errors[0].sum(dim=0).mul_(scale * last))


def _errors(
    terms: Sequence[Selected], target: Tensor, offset: Tensor, W_dec: Tensor, errors: Tensor, mesh: Mesh
) -> list[Tensor]:
    """Writes what each reconstruction leaves over of this replica's rows; squared norms of that, of all replicas."""
    sparse, none = choose.kernels(target.device), torch.zeros_like(offset)
    if mesh.shards == 1:
        before, squared = target, []
        for number, (selected, error) in enumerate(zip(terms, errors, strict=True)):
            squared.append(sparse.decode(before, none if number else offset, selected, W_dec, None, error).squared)
            before = error
    else:
        for selected, error in zip(terms, errors, strict=True):
            sparse.decode(torch.zeros_like(target), none, selected, W_dec, None, error)
            error.copy_(mesh.sum_shards(error))  # each by itself, which takes less memory
        errors[0].add_(target - offset)
        for before, error in pairwise(errors):
            error.add_(before)
        squared = [error.double().square_().sum() for error in errors]
    return [mesh.sum_replicas(each) for each in squared]


class Nested:
    """A step of TopK's kind whose groups add up: what it does otherwise when it decodes, and says of its losses."""

    def decode(
        self, chosen: Chosen, target: Tensor, offset: Tensor, W_dec: Tensor, scale: float, errors: Tensor, mesh: Mesh
    ) -> Reconstructed:
        return decode_nested(chosen, target, offset, W_dec, scale, errors, mesh)

    def parts(self, losses: Sequence[float], chosen: Chosen) -> dict[str, float]:
        return {"nested": sum(loss * weight for loss, weight in zip(losses, chosen.weights, strict=True))}


def by_index(selected: Selected, ends: Sequence[int], mesh: Mesh) -> list[Selected]:
    """`selected`, whose indices ascend before its -1s, in groups of indices below each of `ends`, as wide in all
    processes of `mesh`."""
    indices = selected.indices
    batch, width = indices.shape
    # -1 stands behind the rest, beyond every end.
    keys = torch.where(indices < 0, torch.iinfo(torch.int32).max, indices)
    bounds = torch.tensor(ends, dtype=torch.int32, device=keys.device).expand(batch, -1).contiguous()
    until = torch.searchsorted(keys, bounds)
    since = torch.cat([until.new_zeros(batch, 1), until[:, :-1]], dim=1)
    groups = []
    widest = mesh.gather_all((until - since).amax(dim=0)).amax(dim=0)
    for first, end, most in zip(since.T, until.T, widest.tolist(), strict=True):
        place = first[:, None] + torch.arange(max(1, most), device=keys.device)
        inside = place < end[:, None]
        place = place.clamp_(max=width - 1)
        # NaN, which says that the encoder diverged, has no index (or_nan).
        z = torch.where(inside | selected.z.isnan().any(), selected.z.gather(1, place), 0.0)
        groups.append(Selected(torch.where(inside, indices.gather(1, place), -1), z))
    return groups


def by_rank(selected: Selected, ends: Sequence[int], mesh: Mesh) -> list[Selected]:
    """The largest ends[0] of each token, then those up to rank ends[1], and so on; ties to the lower index."""
    if mesh.shards > 1:
        return _by_rank_of_all(selected, ends, mesh)
    order = torch.where(selected.indices < 0, torch.iinfo(torch.int32).max, selected.indices).argsort(dim=1)
    z = selected.z.gather(1, order)
    z, by_size = z.sort(dim=1, descending=True, stable=True)
    indices = selected.indices.gather(1, order.gather(1, by_size))
    starts = [0, *ends[:-1]]
    return [
        Selected(indices[:, start:end].contiguous(), z[:, start:end].contiguous())
        for start, end in zip(starts, ends, strict=True)
    ]


def _by_rank_of_all(selected: Selected, ends: Sequence[int], mesh: Mesh) -> list[Selected]:
    """As by_rank, where ranks are those among what all shards have selected."""
    keys = candidates(selected, mesh.first)
    groups, before = [], torch.zeros_like(keys, dtype=torch.bool)
    for start, end in pairwise([0, *ends]):
        among = keys >= mesh.kth_of_rows(keys, end)[:, None]
        own = kept(selected, torch.where(among & ~before, keys, NONE), keys.new_full((len(keys),), NONE))
        # No more of all shards, so as wide in all replicas.
        width = min(end - start, keys.shape[1])
        groups.append(Selected(own.indices[:, :width].contiguous(), own.z[:, :width].contiguous()))
        before = among
    return groups
