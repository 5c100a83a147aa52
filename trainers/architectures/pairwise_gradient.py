"""The gradient of a loss whose latents decide by themselves, and the optimiser's step by it: in pairs, or dense."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params, Update
from saescale.trainers.architectures.dense import DenseGradient
from saescale.trainers.architectures.looked import Some
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.kernels.interface import Pairs, Selected, Summands, Term
from saescale.trainers.mesh.mesh import Mesh


class Loss(NamedTuple):
    """What the pairs of rows make of the loss beside its squared errors, and its gradient by them."""

    dz: Tensor  # [rows, width]: by W_enc (x - b_pre)
    vectors: Mapping[str, Tensor]  # by parameters that have a number for each latent, summed over pairs
    parts: Mapping[str, Tensor]  # Losses.parts, as sums over latents and rows
    differs: Tensor | None = None  # > 0 where a pair has a gradient by W_enc; None: where it is active
    more: Tensor | int = 0  # pairs that were decoded beside the SAE's own
    near: Tensor | int = 0  # Worked.near


class Gradient(NamedTuple):
    decoder: Pairs
    encoder: Pairs
    errors: Tensor  # [batch, d_model]
    x: Tensor  # [batch, d_model], minus origin
    offset: Tensor  # [d_model], b_pre - origin
    vectors: Mapping[str, Tensor]
    b_pre: Tensor  # [d_model], without the part through the encoder


def by_pairs(
    params: Params, looked: Some, z: Tensor, loss: Loss, error: Tensor, scale: float, batch: Batch, offset: Tensor
) -> Gradient:
    """Of the batch of all replicas."""
    sparse, n_latents = choose.kernels(z.device), len(params["W_dec"])
    decoder = encoder = sparse.transpose([Term(Selected(looked.indices, z), loss.dz, scale)], n_latents)
    if loss.differs is not None:
        encoder = sparse.transpose([Term(Selected(looked.indices, loss.differs), loss.dz, 1.0)], n_latents)
    b_pre = error.sum(dim=0).mul_(scale)
    return Gradient(decoder, encoder, error, batch.x, offset, loss.vectors, b_pre)


def by_rows(
    params: Params, z: Tensor, loss: Loss, error: Tensor, scale: float, mine: Batch, offset: Tensor, mesh: Mesh
) -> DenseGradient:
    """Of this replica's rows, summed over the replicas."""
    shift = loss.dz.sum(dim=0)
    W_enc = (loss.dz.T @ mine.x).addr_(shift, offset, alpha=-1)
    W_dec = z.T @ (error * scale)
    b_pre = error.sum(dim=0).mul_(scale) - mesh.sum_shards(shift @ params["W_enc"])
    gradients = {"W_enc": W_enc, "W_dec": W_dec, "b_pre": b_pre, **loss.vectors}
    return DenseGradient({name: mesh.sum_replicas(gradient) for name, gradient in gradients.items()}, {})


def update_by_pairs(
    params: Params, operands: Params, updates: Mapping[str, Update], decoder: Pairs, encoder: Pairs, errors: Tensor,
    x: Tensor, offset: Tensor, shift: Tensor, vectors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """One step of W_dec and W_enc by the sums over pairs, and of the other parameters by their dense gradients.

    `shift` [n_latents] is the gradient by the bias of W_enc (x - b_pre), whose inputs lack `offset` (Summands).
    """
    sparse, W_enc = choose.kernels(params["W_enc"].device), params["W_enc"]
    none = torch.zeros(0, dtype=torch.int64, device=W_enc.device), W_enc[:0]
    for name, pairs, weights, sources, moved in (
        ("W_dec", decoder, decoder.decoder, errors, None), ("W_enc", encoder, encoder.encoder, x, shift),
    ):  # fmt: skip
        moments, adam, unit_rows = updates[name]
        summands = Summands(pairs.starts, pairs.rows, weights, sources, moved, offset, *none)
        operand = None if operands[name] is params[name] else operands[name]
        sparse.update_rows(params[name], moments, summands, adam, unit_rows, operand)
    for name, of_name in vectors.items():
        moments, adam, unit_rows = updates[name]
        adam_rows(params[name], moments, of_name, adam, unit_rows)
