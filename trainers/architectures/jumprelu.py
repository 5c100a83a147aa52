"""The JumpReLU SAE (Rajamanoharan et al. 2024, 2407.14435): each latent has a threshold, and L0 itself is penalised.

    z = pre where pre > theta, else 0, with pre = W_enc (x - b_pre) + b_enc;  x_hat = z W_dec + b_pre
    loss = nmse + coefficient * L0 / k, L0 the batch's mean number of active latents

The paper's lambda is coefficient / k, and is found as for other penalties. Its other penalty, (L0 / k - 1)^2, has a
gradient of hundreds of times the later one while L0 falls from N / 4 to k: Adam divides by the squares of what it has
seen, so thresholds then hardly move for a thousand steps, and L0 stays wherever it is (measured: 20 to 30 % below k).

Neither z nor L0 has a gradient by theta, so both have that of a rectangle of width `bandwidth` about the threshold
(straight-through): d z / d theta = -theta / bandwidth and d L0 / d theta = -1 / bandwidth where |pre - theta| is less
than half of it. What is trained is `threshold` itself: Adam would take too long over its logarithm. theta =
ReLU(threshold).
"""

from typing import Any

import torch
from pydantic import Field
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
from saescale.trainers.architectures.jumprelu_sparse import JumpReLUStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre

# While L0 falls to k, gradients of thresholds are tens of times what they are later: with Adam's usual memory of 1,000
# steps of their squares thresholds then hardly move at any coefficient, and the one that is found is far too small.
_BETAS = (0.9, 0.98)
_START_AT_MOST = 2.0  # standard deviations of pre-activations: some percent of the latents are active then


class Settings(architecture.PenaltySettings):
    bandwidth: float = Field(default=0.03, gt=0)  # of pre-activations, whose inputs have unit norm
    threshold: float = Field(default=0.03, gt=0)  # at the start; less where so few would reach it that none learns

    def gate_rate(self, progress: float) -> float:
        """Twice that of others: thresholds have to move with L0's target, whatever the coefficient."""
        return 2 * super().gate_rate(progress)


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    tied = parts.tied_parameters(shape, centre, seed, torch.relu, gates=True)
    return _with_thresholds(tied, settings, tied["W_enc"].data.norm(dim=1).mean())


def share(shape: Shape, settings: Settings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    tied = parts.tied_share(shape, centre, seed, torch.relu, mesh, gates=True)
    return _with_thresholds(tied, settings, mesh.sum_shards(tied["W_enc"].data.norm(dim=1).sum()) / shape.n_latents)


def _with_thresholds(tied: dict[str, Parameter], settings: Settings, norm: Tensor) -> dict[str, Parameter]:
    """`norm`: the mean one of all encoder rows."""
    n_latents, d_model = tied["W_enc"].data.shape
    # The standard deviation of pre-activations of random directions, which is the smaller the more latents there are.
    start = min(settings.threshold, _START_AT_MOST * float(norm) / d_model**0.5)
    return tied | {"threshold": Parameter(torch.full((n_latents,), start), betas=_BETAS, gate=True)}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    pre = parts.encode(params, x)
    latents = _Jump.apply(pre, params["threshold"].relu(), settings.bandwidth)
    return parts.decode(params, pre, latents)


def candidates(params: Params, forward: Forward, settings: Settings) -> Candidates:
    return Candidates(forward.pre_activations - params["threshold"].relu(), forward.pre_activations)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    threshold = params["threshold"].relu()
    counted = _Count.apply(forward.pre_activations, threshold, settings.bandwidth)
    l0 = counted.sum(dim=1).mean() / settings.k
    return Losses(main, main + state.coefficient * l0, {"l0": l0})


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    return parts.sparse_flops(shape, worked)


step = JumpReLUStep("jumprelu")


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        G = upstream[0]
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return G * (pre > threshold), -(G * near).sum(dim=0) * threshold / ctx.bandwidth, None


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(upstream[0] * near).sum(dim=0) / ctx.bandwidth, None
