"""The sparse path of switch SAEs: a token is routed first, and scored by the latents of its own expert alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import (
    Batch,
    Conditions,
    Dead,
    Params,
    Reconstruction,
    Shape,
    Step,
    Update,
    Worked,
)
from saescale.trainers.architectures.pairwise_gradient import update_by_pairs
from saescale.trainers.architectures.sparse_parts import active_pairs, encoder_operands, or_nan, target_of
from saescale.trainers.kernels.choose import KernelKind, kernels
from saescale.trainers.kernels.interface import Pairs, Selected, Term, product_rows
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.precision import Precision

_FLOAT = 4


class Gradient(NamedTuple):
    pairs: Pairs
    error: Tensor  # [batch, d_model]
    x: Tensor  # [batch, d_model], minus origin
    offset: Tensor  # [d_model], b_pre - origin
    b_pre: Tensor  # [d_model], without the part through the encoder
    router: Mapping[str, Tensor]  # of W_router and b_router


class SwitchStep:
    """FastStep, for one process. With p the probability of a token's expert, z of the reference is p times `z` here."""

    rounded: frozenset[str] = frozenset({"W_enc"})

    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, conditions: Conditions, dead: Dead,
        mesh: Mesh,
    ) -> Step:  # fmt: skip
        with torch.enable_grad():
            router = {name: params[name].detach().requires_grad_() for name in ("W_router", "b_router")}
            routed = _routed(router, batch)
            share = torch.nn.functional.one_hot(routed.argmax(dim=1), settings.experts).float().mean(dim=0)
            balance = settings.experts * (share * routed.mean(dim=0)).sum()
        with torch.no_grad():
            sparse, offset = kernels(batch.x.device), params["b_pre"] - batch.origin
            p, chosen = routed.max(dim=1)
            own = _selected(params, operands, batch, offset, settings, chosen)
            latents = own._replace(z=own.z * p[:, None])
            dead.update(latents)
            error = torch.empty_like(batch.x)
            scale = -2.0 / (batch.x.numel() * conditions.variance)
            squared, dz = sparse.decode(target_of(batch), offset, latents, params["W_dec"], scale, error)
            by_p = (dz * own.z).sum(dim=1)
            through = torch.zeros_like(routed).scatter_(1, chosen[:, None], by_p[:, None])
            told = torch.stack([squared, balance.detach().double(), active_pairs(latents).double()])
            square, of_balance, pairs = told.tolist()
            term = Term(latents, dz * p[:, None], scale)
            transposed = sparse.transpose([term], len(params["W_dec"]))
        gradients = torch.autograd.grad([routed, settings.balance * balance], list(router.values()), [through, None])
        gradient = Gradient(
            transposed, error, batch.x, offset, error.sum(dim=0).mul_(scale), dict(zip(router, gradients, strict=True))
        )
        main = square / batch.x.numel() / conditions.variance
        return Step(main, {"balance": of_balance}, gradient, Worked(len(batch.x), int(pairs)))

    @torch.no_grad()
    def update(
        self, params: Params, operands: Params, gradient: Gradient, updates: Mapping[str, Update], mesh: Mesh
    ) -> None:
        pairs, W_enc = gradient.pairs, params["W_enc"]
        b_enc = kernels(W_enc.device).latent_sums(pairs)
        # Has to go before W_enc is updated: pre-activations see x - b_pre.
        dense = {"b_enc": b_enc, "b_pre": gradient.b_pre - b_enc @ W_enc, **gradient.router}
        update_by_pairs(
            params, operands, updates, pairs, pairs, gradient.error, gradient.x, gradient.offset, b_enc, dense
        )  # fmt: skip

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        offset = params["b_pre"] - batch.origin
        p, chosen = _routed(params, batch).max(dim=1)
        own = _selected(params, operands, batch, offset, settings, chosen)
        latents, error = own._replace(z=own.z * p[:, None]), torch.empty_like(batch.x)
        decoded = kernels(error.device).decode(target_of(batch), offset, latents, params["W_dec"], None, error)
        return Reconstruction(error, decoded.squared, active_pairs(latents))

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Pre-activations of an expert, its tokens, the error, selections and sorted pairs, the router's tensors."""
        pairs = batch * settings.k * (6 * _FLOAT + (8 if kernels == "cpu" else 24))
        gradients = 4 * shape.n_latents * shape.d_model * _FLOAT if kernels == "eager" else 0
        return self.evaluation_bytes(shape, settings, batch, precision, kernels) + pairs + gradients

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        each = shape.n_latents // settings.experts
        made = product_rows(batch, each, "cpu" if kernels == "cpu" else "cuda") * each * _FLOAT
        rows = 3 * batch * shape.d_model * _FLOAT  # the error, and a copy of an expert's tokens and of their origin
        return made + rows + batch * (3 * settings.k + 6 * settings.experts) * _FLOAT


def _routed(params: Params, batch: Batch) -> Tensor:
    """Probabilities [batch, experts]; in float32, whatever the encoder's precision."""
    return torch.softmax((batch.x - (params["b_router"] - batch.origin)) @ params["W_router"].T, dim=-1)


def _selected(
    params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, chosen: Tensor
) -> Selected:
    """Of each token the k largest latents of its expert, `chosen` [batch]."""
    x, W_enc, bias = encoder_operands(params, operands, batch, offset)
    each = len(bias) // settings.experts
    indices = torch.full((len(x), settings.k), -1, dtype=torch.int32, device=x.device)
    z = bias.new_zeros(len(x), settings.k)
    for expert in range(settings.experts):
        tokens = (chosen == expert).nonzero().flatten()
        if not len(tokens):
            continue
        part = slice(expert * each, (expert + 1) * each)
        (best,) = kernels(x.device).encode_select(x[tokens], W_enc[part], bias[part].contiguous(), [settings.k])
        indices[tokens] = torch.where(best.indices < 0, -1, best.indices + expert * each)
        z[tokens] = best.z
    return or_nan(Selected(indices, z), bias)
