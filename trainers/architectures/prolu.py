"""The ProLU SAE (Taggart 2024): a latent's bias says from where on it counts, and is not taken off its value.

    ProLU(m, b) = m where m > 0 and m + b > 0, else 0;  z = ProLU(W_enc (x - b_pre), b_enc),  x_hat = z W_dec + b_pre
    loss = nmse + coefficient * mean(||z||_1)

Where it jumps there is no gradient by b, so one is made up. With G the gradient by z where z is not 0: the variant
`relu` passes on dm = db = G, `ste` dm = G + G m and db = G m. Neither opens a gate again that has shut, and of `ste`
the mean of db stays above 0, for what is active by mistake is small and has a positive G: gates go on closing at any
coefficient (with 0.01 L0 fell from 94 to 15 in 500 steps). What holds L0 is that they come to rest.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import (
    Candidates,
    Forward,
    Losses,
    Parameter,
    Params,
    Shape,
    State,
    Worked,
)
from saescale.trainers.architectures.relu_sparse import ProLUStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre

Variant = Literal["relu", "ste"]


class Settings(architecture.PenaltySettings):
    variant: Variant = "ste"

    def gate_rate(self, progress: float) -> float:
        """Falls in a line until gates rest, when the coefficient is held."""
        return super().gate_rate(progress) * max(0.0, 1 - progress / architecture.FOUND_AT)


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    return parts.tied_parameters(shape, centre, seed, torch.relu, gates=True)


def share(shape: Shape, settings: Settings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    return parts.tied_share(shape, centre, seed, torch.relu, mesh, gates=True)


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    m = (x - params["b_pre"]) @ params["W_enc"].T
    latents = _ProLU.apply(m, params["b_enc"], settings.variant)
    return parts.decode(params, m + params["b_enc"], latents)


def candidates(params: Params, forward: Forward, settings: Settings) -> Candidates:
    return Candidates(forward.pre_activations, forward.pre_activations - params["b_enc"])


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    return parts.with_l1(forward, target, state)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    return parts.sparse_flops(shape, worked)


step = ProLUStep("prolu")


class _ProLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor, variant: Variant) -> Tensor:
        z = torch.where((m > 0) & (m + b > 0), m, 0.0)
        ctx.save_for_backward(z)
        ctx.variant = variant
        return z

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (z,) = ctx.saved_tensors
        G = upstream[0] * (z > 0)
        db = G if ctx.variant == "relu" else G * z  # z is m wherever G is not 0
        dm = G if ctx.variant == "relu" else G + db
        return dm, db.sum(dim=0), None
