"""The sparse path of architectures in which each latent decides by itself on a token: relu, prolu, gated, jumprelu.

Latents above a threshold of their own are selected, and what is differentiated are those pairs alone. Where so many are
active that dense products are faster, as most are before a penalty has taken hold, the step is the dense one, which
gives the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import (
    DENSE_ABOVE,
    Batch,
    Conditions,
    Dead,
    Params,
    Reconstruction,
    Shape,
    Step,
    Update,
    Worked,
    find_architecture,
)
from saescale.trainers.architectures.dense import DenseGradient, DenseStep
from saescale.trainers.architectures.sparse_parts import active_pairs, encoder_input, target_of
from saescale.trainers.kernels.choose import KernelKind, kernels
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.kernels.interface import Pairs, Selected, Summands, Term
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.precision import Precision


class Boundary(NamedTuple):
    """What decides on a pair: it is looked at where W_enc (x - b_pre) + bias > threshold, both [n_latents]."""

    bias: Tensor
    threshold: Tensor


class Loss(NamedTuple):
    """What the pairs of a batch make of the loss, and its gradient. Tensors [batch, width] lie beside the indices."""

    squared: Tensor  # float64 scalar: ||x - x_hat||^2
    parts: Mapping[str, Tensor]  # Losses.parts
    error: Tensor  # x - x_hat [batch, d_model]
    decoder: Term  # whose z and scale weigh the errors in the gradient of W_dec
    encoder: Term  # whose dz is the gradient by W_enc (x - b_pre); often the same
    vectors: Mapping[str, Tensor]  # gradients of parameters that have a number for each latent
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


class PairwiseStep(ABC):
    """FastStep, for one process. `name` is the architecture's, whose reference does the steps that are dense."""

    rounded: frozenset[str] = frozenset({"W_enc"})

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        """`training`: all pairs that have a part in a gradient, else those that may be active."""

    @abstractmethod
    def latents(self, params: Params, selected: Selected, settings: Any) -> Selected:
        """The activations of pairs for which `selected` has W_enc (x - b_pre) + bias; 0 where one is not active."""

    @abstractmethod
    def loss(
        self, params: Params, selected: Selected, latents: Selected, target: Tensor, offset: Tensor, scale: float,
        settings: Any, conditions: Conditions,
    ) -> Loss:  # fmt: skip
        """`scale` times x - x_hat is the gradient by x_hat of the mean squared error over c."""

    @torch.no_grad()
    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, conditions: Conditions, dead: Dead,
        mesh: Mesh,
    ) -> Step:  # fmt: skip
        selected = self._selected(params, operands, batch, settings, training=True)
        if selected is None:
            return self._dense(params).measure(params, params, batch, settings, conditions, dead, mesh)
        sparse, n_latents = kernels(batch.x.device), len(params["W_dec"])
        offset, elements = params["b_pre"] - batch.origin, batch.x.numel()
        scale = -2.0 / (elements * conditions.variance)
        latents = self.latents(params, selected, settings)
        dead.update(latents)
        loss = self.loss(params, selected, latents, target_of(batch), offset, scale, settings, conditions)
        active = active_pairs(latents)
        # All that the host has to know of a step, in one piece.
        told = torch.stack([number.double() for number in (loss.squared, active, *loss.parts.values())])
        squared, pairs, *parts = told.tolist()
        decoder = sparse.transpose([loss.decoder], n_latents)
        encoder = decoder if loss.encoder is loss.decoder else sparse.transpose([loss.encoder], n_latents)
        gradient = Gradient(
            decoder, encoder, loss.error, batch.x, offset, loss.vectors, loss.error.sum(dim=0).mul_(scale),
        )  # fmt: skip
        worked = Worked(len(batch.x), int(pairs) + loss.more, near=loss.near)
        main = squared / elements / conditions.variance
        return Step(main, dict(zip(loss.parts, parts, strict=True)), gradient, worked, pairs / len(batch.x))

    @torch.no_grad()
    def update(
        self, params: Params, operands: Params, gradient: Gradient | DenseGradient, updates: Mapping[str, Update],
        mesh: Mesh,
    ) -> None:  # fmt: skip
        if isinstance(gradient, DenseGradient):
            self._dense(params).update(params, operands, gradient, updates, mesh)
            for name in self.rounded:
                if operands[name] is not params[name]:
                    operands[name].copy_(params[name])
            return
        W_enc = params["W_enc"]
        shift = kernels(W_enc.device).latent_sums(gradient.encoder)
        # Has to go before W_enc is updated: pre-activations see x - b_pre.
        vectors = {**gradient.vectors, "b_pre": gradient.b_pre - shift @ W_enc}
        update_by_pairs(
            params, operands, updates, gradient.decoder, gradient.encoder, gradient.errors, gradient.x, gradient.offset,
            shift, vectors,
        )  # fmt: skip

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        selected = self._selected(params, operands, batch, settings, training=False)
        if selected is None:
            return self._dense(params).reconstruct(params, params, batch, settings, mesh)
        latents = self.latents(params, selected, settings)
        error, offset = torch.empty_like(batch.x), params["b_pre"] - batch.origin
        decoded = kernels(error.device).decode(target_of(batch), offset, latents, params["W_dec"], None, error)
        return Reconstruction(error, decoded.squared, active_pairs(latents))

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Those of a dense step: the first ones are."""
        dense = DenseStep(find_architecture(self.name), shape.n_latents)
        return dense.training_bytes(shape, settings, batch, precision, kernels)

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        dense = DenseStep(find_architecture(self.name), shape.n_latents)
        # Indices and values, once in pieces and once whole.
        pairs = 4 * 4 * DENSE_ABOVE * batch * shape.n_latents
        return max(dense.evaluation_bytes(shape, settings, batch, precision, kernels), pairs)

    def _selected(
        self, params: Params, operands: Params, batch: Batch, settings: Any, training: bool
    ) -> Selected | None:
        """None where a dense step is the faster way."""
        boundary = self.boundary(params, settings, training)
        x, W_enc = encoder_input(operands, batch)
        bias = boundary.bias - params["W_enc"] @ (params["b_pre"] - batch.origin)
        most = max(len(x), int(DENSE_ABOVE * len(x) * len(W_enc)))
        selected = kernels(x.device).select_above(x, W_enc, bias, boundary.threshold, most)
        if selected is None:
            return None
        # NaN would exceed no threshold, and a diverged encoder look like one without active latents.
        bad = ~(bias.isfinite() & boundary.threshold.isfinite()).all()
        return selected._replace(z=selected.z.masked_fill_(bad, torch.nan))

    def _dense(self, params: Params) -> DenseStep:
        return DenseStep(find_architecture(self.name), len(params["W_dec"]))


def update_by_pairs(
    params: Params, operands: Params, updates: Mapping[str, Update], decoder: Pairs, encoder: Pairs, errors: Tensor,
    x: Tensor, offset: Tensor, shift: Tensor, vectors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """One step of W_dec and W_enc by the sums over pairs, and of the other parameters by their dense gradients.

    `shift` [n_latents] is the gradient by the bias of W_enc (x - b_pre), whose inputs lack `offset` (Summands).
    """
    sparse, W_enc = kernels(params["W_enc"].device), params["W_enc"]
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


def at(vector: Tensor, selected: Selected) -> Tensor:
    """[batch, width]: of each pair the entry of its latent; whatever one where the index is -1."""
    return vector[selected.indices.clamp_min(0).long()]


def by_latent(values: Tensor, selected: Selected, n_latents: int) -> Tensor:
    """[n_latents]: the sum of `values` [batch, width] over each latent's pairs."""
    places = torch.where(selected.indices < 0, n_latents, selected.indices).flatten().long()
    return values.new_zeros(n_latents + 1).index_add_(0, places, values.flatten())[:-1]
