"""The sparse path of architectures in which each latent decides by itself on a token: relu, prolu, gated, jumprelu.

Latents above a threshold of their own are selected, and what is differentiated are those pairs alone. Where so many are
active that dense products are faster, as most are before a penalty has taken hold, the step is the dense one, which
gives the same: that of the reference in one process, and in each of several the same loss over all of a shard's latents
(looked.All). No latent asks another one, so a mesh adds up reconstructions and counts, and selects nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from saescale.trainers.architectures.dead import fired
from saescale.trainers.architectures.dense import CHUNK_ENTRIES, DenseGradient, DenseStep
from saescale.trainers.architectures.looked import All, Looked, Some, select_above
from saescale.trainers.architectures.pairwise_gradient import (
    Gradient,
    Loss,
    by_pairs,
    by_rows,
    update_by_pairs,
)
from saescale.trainers.architectures.sparse_parts import (
    active_pairs,
    encoder_input,
    error_of,
    rows_of,
    sum_replicas,
    target_of,
)
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision

# Times its even share of the pairs beyond which a step is dense, that one process of a mesh may have to hold.
_UNEVEN = 2
_FLOAT = 4
# Bytes of a pair: index, place, pre-activation, activation, gradients by these, and its row and weights when sorted.
_OF_PAIR = 52


class Boundary(NamedTuple):
    """What decides on a pair: it is looked at where W_enc (x - b_pre) + bias > threshold, both [n_latents]."""

    bias: Tensor
    threshold: Tensor


class Reconstructed(NamedTuple):
    """What is left over by each reconstruction of the loss, the SAE's own first, and what that says of the pairs."""

    squared: Sequence[Tensor]  # float64 scalars: ||x - x_hat||^2
    by_z: Sequence[Tensor]  # [rows, width]: the gradient of each one's mean squared error over c by what it decodes


class PairwiseStep(ABC):
    """FastStep. `name` is the architecture's, whose reference does the dense steps of one process."""

    rounded: frozenset[str] = frozenset({"W_enc"})
    beside: tuple[str, ...] = ()  # Losses.parts of reconstructions beside the SAE's own
    wide: float = (
        2.75  # float32 tensors [rows, n_latents] that a dense step on a mesh has at a time; masks are a quarter
    )

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        """`training`: all pairs that have a part in a gradient, else those that may be active."""

    @abstractmethod
    def latents(self, params: Params, looked: Looked, settings: Any) -> Tensor:
        """The activations of pairs, [rows, width]; 0 where one is not active."""

    def reconstructions(
        self, looked: Looked, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh
    ) -> Reconstructed:
        """By `latents` z; `scale` times x - x_hat, which goes to `error`, is the gradient by x_hat."""
        squared, dz = looked.decode(z, target, offset, scale, error, mesh)
        return Reconstructed([squared], [dz])

    @abstractmethod
    def loss(
        self, params: Params, looked: Looked, z: Tensor, by_z: Sequence[Tensor], tokens: int, settings: Any,
        conditions: Conditions,
    ) -> Loss:  # fmt: skip
        """Of some rows, or all, of a batch of `tokens`; `by_z` is of `reconstructions`."""

    def said(self, settings: Any, n_latents: int) -> Said:
        """What it asks a mesh for."""
        sums = 1 + len(self.beside)
        return Said([], sums, settings.k, errors=1, numbers=2 + sums, dense=settings.dense_share(n_latents))

    @torch.no_grad()
    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, conditions: Conditions, dead: Dead,
        mesh: Mesh,
    ) -> Step:  # fmt: skip
        """Of several replicas each works on its rows. Where the step is sparse it has the others' errors and pairs from
        them, and so the gradient of the batch in the order of one process; of a dense one gradients are summed, which
        are fewer numbers than so many pairs."""
        mine, tokens = rows_of(batch, mesh), len(batch.x)
        selected = self._selected(params, operands, mine, tokens, settings, True, mesh)
        if selected is None and mesh.alone:
            return self._dense(params).measure(params, params, batch, settings, conditions, dead, mesh)
        offset, elements = params["b_pre"] - batch.origin, batch.x.numel()
        scale = -2.0 / (elements * conditions.variance)
        looked = self._all(params, mine.x, offset, settings, True) if selected is None else Some(params, selected)
        z, error = self.latents(params, looked, settings), torch.empty_like(mine.x)
        squared, by_z = self.reconstructions(looked, z, target_of(mine), offset, scale, error, mesh)
        if isinstance(looked, Some):
            if mesh.replicas > 1:
                looked = looked.of_all(params, mesh)
                z, error = self.latents(params, looked, settings), mesh.gather_replicas(error)
                by_z = [mesh.gather_replicas(each) for each in by_z]
            dead.update(Selected(looked.indices, z))
        else:
            dead.count(mesh.sum_replicas(fired(z).int()) > 0, tokens)
        loss = self.loss(params, looked, z, by_z, tokens, settings, conditions)
        # Of a dense step nothing is counted pair by pair.
        near = loss.near if selected is not None else 0
        counted = torch.stack([_number(each, z) for each in ((z > 0).sum(), loss.more, near, *loss.parts.values())])
        squares = torch.stack(list(squared))
        gradient: Gradient | DenseGradient
        if isinstance(looked, Some):
            gradient = by_pairs(params, looked, z, loss, error, scale, batch, offset)
            squares = mesh.sum_replicas(squares)
        else:
            gradient = by_rows(params, z, loss, error, scale, mine, offset, mesh)
            squares, counted = mesh.sum_replicas(torch.cat([squares, counted])).split([len(squares), len(counted)])
        # All that the host has to know of a step, in one piece.
        told = torch.cat([squares, mesh.sum_shards(counted)]).tolist()
        main, *others = (square / elements / conditions.variance for square in told[: len(squares)])
        pairs, more, near, *parts = told[len(squares) :]
        worked = Worked(tokens, int(pairs + more), near=int(near))
        named = dict(zip(self.beside, others, strict=True)) | dict(zip(loss.parts, parts, strict=True))
        return Step(main, named, gradient, worked, pairs / tokens, dense=selected is None)

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
        shift = choose.kernels(W_enc.device).latent_sums(gradient.encoder)
        # Has to go before W_enc is updated: pre-activations see x - b_pre.
        vectors = {**gradient.vectors, "b_pre": gradient.b_pre - mesh.sum_shards(shift @ W_enc)}
        update_by_pairs(
            params, operands, updates, gradient.decoder, gradient.encoder, gradient.errors, gradient.x, gradient.offset,
            shift, vectors,
        )  # fmt: skip

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        mine, offset = rows_of(batch, mesh), params["b_pre"] - batch.origin
        selected = self._selected(params, operands, mine, len(batch.x), settings, False, mesh)
        if selected is None and mesh.alone:
            return self._dense(params).reconstruct(params, params, batch, settings, mesh)
        error = torch.empty_like(mine.x)
        if not len(mine.x):  # the rest of a set of rows may have fewer than there are replicas
            squared, active = (
                error.new_zeros((), dtype=torch.float64),
                torch.zeros((), dtype=torch.int64).to(error.device),
            )
        elif selected is not None:
            latents = Selected(selected.indices, self.latents(params, Some(params, selected), settings))
            squared = error_of(target_of(mine), offset, latents, params["W_dec"], error, mesh)
            active = mesh.sum_shards(active_pairs(latents))
        else:
            active = self._decode_all(params, mine, offset, settings, error, mesh)
            squared = error.double().square_().sum()
        return Reconstruction(error, *sum_replicas(squared, active, mesh), dense=selected is None)

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Those of a dense step: the first ones are."""
        dense = DenseStep(find_architecture(self.name), shape.n_latents)
        return dense.training_bytes(shape, settings, batch, precision, kernels)

    def bytes_on_mesh(
        self, shape: Shape, settings: Any, batch: int, layout: Layout, precision: Precision, kernels: KernelKind
    ) -> float:
        """Of a dense step, for its rows alone, and what replicas hold while they add up a gradient; or of a sparse one
        with as many pairs as it may have, those of all replicas."""
        matrix = shape.n_latents * shape.d_model * _FLOAT
        rows = batch / layout.replicas
        dense = _FLOAT * rows * (self.wide * shape.n_latents + 6 * shape.d_model)
        # Both gradients; of the one that is summed its parts, the others' and the sum.
        dense += matrix * (2 + (3 + 1 / layout.replicas if layout.replicas > 1 else 0))
        sparse = _OF_PAIR * DENSE_ABOVE * batch * shape.n_latents + batch * shape.d_model * _FLOAT
        return max(dense, sparse + (2 * matrix if kernels == "eager" else 0))

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        dense = DenseStep(find_architecture(self.name), shape.n_latents)
        # Indices and values, once in pieces and once whole.
        pairs = 4 * 4 * DENSE_ABOVE * batch * shape.n_latents
        return max(dense.evaluation_bytes(shape, settings, batch, precision, kernels), pairs)

    def _selected(
        self, params: Params, operands: Params, mine: Batch, tokens: int, settings: Any, training: bool, mesh: Mesh
    ) -> Selected | None:
        """Of this replica's rows of a batch of `tokens`, as wide as those of other replicas. None, and that in all
        processes, where a dense step is the faster way."""
        boundary = self.boundary(params, settings, training)
        x, W_enc = encoder_input(operands, mine)
        bias = boundary.bias - params["W_enc"] @ (params["b_pre"] - mine.origin)
        most = max(len(x), int(DENSE_ABOVE * len(x) * len(W_enc)))
        if mesh.alone:
            selected = choose.kernels(x.device).select_above(x, W_enc, bias, boundary.threshold, most)
        else:
            of_all = max(tokens, int(DENSE_ABOVE * tokens * mesh.whole(len(W_enc))))
            selected = select_above(x, W_enc, bias, boundary.threshold, _UNEVEN * most, of_all, mesh)
        return None if selected is None else selected._replace(z=_or_nan(selected.z, bias, boundary.threshold))

    def _all(self, params: Params, x: Tensor, offset: Tensor, settings: Any, training: bool) -> All:
        """Of rows x, minus origin."""
        boundary, W_enc = self.boundary(params, settings, training), params["W_enc"]
        bias = boundary.bias - W_enc @ offset
        pre = torch.addmm(bias, x, W_enc.T)
        there = pre > boundary.threshold
        return All(params, _or_nan(pre.masked_fill_(~there, 0), bias, boundary.threshold), there)

    def _decode_all(
        self, params: Params, mine: Batch, offset: Tensor, settings: Any, error: Tensor, mesh: Mesh
    ) -> Tensor:
        """Writes x - x_hat to `error`; how many pairs of all shards are active.

        Some rows at a time, of which shards may take more or fewer: so what they say to each other is of all rows.
        """
        active = torch.zeros((), dtype=torch.int64, device=error.device)
        size = max(1, CHUNK_ENTRIES // len(params["W_dec"]))
        for x, part in zip(mine.x.split(size), error.split(size), strict=True):
            z = self.latents(params, self._all(params, x, offset, settings, False), settings)
            torch.mm(z, params["W_dec"], out=part)
            active += (z > 0).sum()
        torch.sub(target_of(mine) - offset, mesh.sum_shards(error), out=error)
        return mesh.sum_shards(active)

    def _dense(self, params: Params) -> DenseStep:
        return DenseStep(find_architecture(self.name), len(params["W_dec"]))


def _or_nan(z: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """NaN would exceed no threshold, and a diverged encoder look like one without active latents."""
    return z.masked_fill_(~(bias.isfinite() & threshold.isfinite()).all(), torch.nan)


def _number(number: Tensor | int, on: Tensor) -> Tensor:
    """A float64 scalar where `on` is, without waiting for its device."""
    return number.double() if isinstance(number, Tensor) else on.new_full((), number, dtype=torch.float64)
