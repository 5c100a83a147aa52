"""The path of an architecture that has no fast one: its dense reference, with gradients by autograd.

It has tensors [batch, n_latents] for a whole batch, so it is for small SAEs and new ideas, and works in float32.
"""

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import (
    Architecture,
    Batch,
    Conditions,
    Dead,
    Params,
    Reconstruction,
    Shape,
    State,
    Step,
    Update,
    Worked,
    unit_rows,
)
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre

CHUNK_ENTRIES = 2**23  # of [rows, n_latents] that a forward pass makes at a time where no gradient is asked for
_FLOAT = 4
# Tensors [batch, n_latents] that live beside those that autograd keeps: what a forward pass makes on its way, and
# gradients; and those of a forward pass without a gradient. Measured: up to 3, and 5 with TopK's reference.
_BESIDE, _LIVE_FORWARD = 4, 6


class DenseGradient(NamedTuple):
    of_trained: Mapping[str, Tensor]  # by each parameter's name
    measured: Mapping[str, Tensor]  # Losses.measured


class DenseStep:
    """What FastStep is, by `architecture`'s reference."""

    rounded: frozenset[str] = frozenset()

    def __init__(self, architecture: Architecture, n_latents: int) -> None:
        self.architecture = architecture
        self.rows = max(1, CHUNK_ENTRIES // n_latents)  # whose latents are made at a time, without a gradient

    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, conditions: Conditions, dead: Dead,
        mesh: Mesh,
    ) -> Step:  # fmt: skip
        x = batch.x + batch.origin
        training_forward = getattr(self.architecture, "training_forward", self.architecture.forward)
        with torch.enable_grad():
            moved = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
            forward = training_forward(moved, x, settings)
            # Has to come before the losses: a latent that came back to life in this batch is no longer dead in it.
            dead.update(forward.latents.detach())
            state = State(
                conditions.variance, dead.after(conditions.dead_after_tokens), conditions.progress,
                conditions.coefficient,
            )  # fmt: skip
            target = x if batch.target is None else batch.target
            losses = self.architecture.losses(moved, forward, target, settings, state)
            gradients = _gradients(losses.total, moved)
        beside = losses.beside
        active = (forward.latents > 0).sum()
        # In one piece, since the host waits for the device here.
        told = (losses.main, *losses.parts.values(), active)
        main, *parts, pairs = torch.stack([number.detach().double() for number in told]).tolist()
        worked = Worked(len(x), int(pairs) + beside.selected, beside.selected_aux, beside.dead)
        gradient = DenseGradient(gradients, losses.measured)
        return Step(main, dict(zip(losses.parts, parts, strict=True)), gradient, worked, pairs / len(x), dense=True)

    def update(
        self, params: Params, operands: Params, gradient: DenseGradient, updates: Mapping[str, Update], mesh: Mesh
    ) -> None:
        apply(params, gradient.of_trained, updates)
        with torch.no_grad():
            for name, value in gradient.measured.items():
                params[name].copy_(value)

    @torch.no_grad()
    def calibrate(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> None:
        """Writes to `params` what the architecture is calibrated to on `batch`, where it is at all."""
        if hasattr(self.architecture, "calibrated"):
            for name, value in self.architecture.calibrated(params, batch.x + batch.origin, settings).items():
                if value is not params[name]:
                    params[name].copy_(value)

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        x = batch.x + batch.origin
        error = x.clone() if batch.target is None else batch.target.clone()
        active = torch.zeros((), dtype=torch.int64, device=x.device)
        for rows, left in zip(x.split(self.rows), error.split(self.rows), strict=True):
            forward = self.architecture.forward(params, rows, settings)
            left.sub_(forward.x_hat)
            active += (forward.latents > 0).sum()
        return Reconstruction(error, error.double().square_().sum(), active, dense=True)

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        gradients = 2 * shape.n_latents * shape.d_model * _FLOAT
        live = _BESIDE + _kept(cast(Hashable, self.architecture), shape.n_latents, settings)
        # Rows of the batch that an architecture may be calibrated on stay until the next.
        return _FLOAT * batch * (live * shape.n_latents + 6 * shape.d_model) + gradients

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        entries = min(batch * shape.n_latents, max(CHUNK_ENTRIES, shape.n_latents))
        return _FLOAT * (_LIVE_FORWARD * entries + 4 * batch * shape.d_model)


@lru_cache(maxsize=4096)
def _kept(architecture: Any, n_latents: int, settings: Any) -> float:
    """How many float32 tensors [batch, n_latents] autograd keeps of a batch: counted on a small one."""
    d_model, rows = 8, 2
    made = architecture.parameters(Shape(d_model, n_latents), settings, Centre(torch.zeros(d_model), 1.0), 0)
    params = {name: parameter.data.requires_grad_() for name, parameter in made.items()}
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in params.values()}, dict[int, int]()

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dead = torch.zeros(n_latents, dtype=torch.bool)
    dead[: n_latents // 2] = True
    x = unit_rows(rows, d_model, torch.Generator().manual_seed(0))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward = getattr(architecture, "training_forward", architecture.forward)(params, x, settings)
        losses = architecture.losses(params, forward, x, settings, State(1.0, dead, 0.5, 1.0))
    del losses, forward
    return sum(kept.values()) / (_FLOAT * rows * n_latents)


def _gradients(total: Tensor, params: Params) -> dict[str, Tensor]:
    """None of a loss that depends on no parameter, such as PCA's."""
    if not total.requires_grad:
        return {}
    return dict(zip(params, torch.autograd.grad(total, list(params.values()), materialize_grads=True), strict=True))


def apply(params: Params, gradients: Mapping[str, Tensor], updates: Mapping[str, Update]) -> None:
    """One step of the optimiser, one operation at a time, from a dense gradient for each name in `updates`."""
    with torch.no_grad():
        for name, (moments, adam, unit_rows) in updates.items():
            adam_rows(params[name], moments, gradients[name], adam, unit_rows)
