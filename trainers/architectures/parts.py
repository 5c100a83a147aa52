"""What several architectures are made of: how they start, how they encode and decode, how they select."""

from collections.abc import Callable

import torch
from torch import Tensor

from saescale.scaling.compute import Flops, topk_flops
from saescale.trainers.architectures.architecture import (
    Forward,
    Losses,
    Parameter,
    Params,
    Shape,
    State,
    Worked,
    unit_rows,
)
from saescale.trainers.preprocess import Centre


def tied_parameters(
    shape: Shape, centre: Centre, seed: int, activation: Callable[[Tensor], Tensor], gates: bool = False
) -> dict[str, Parameter]:
    """Random unit decoder rows, tied encoder, b_pre the geometric median of the data.

    The encoder is scaled so that 256 random unit vectors are reconstructed at norm 1 on average by the latents that
    `activation` makes of pre-activations [256, n_latents] (Gao et al. 2024, appendix A.1).
    """
    generator = torch.Generator().manual_seed(seed)
    W = unit_rows(shape.n_latents, shape.d_model, generator)
    probes = unit_rows(256, shape.d_model, generator)
    # With zero biases the reconstruction is linear in the encoder's scale, so one division sets the norm.
    norms = (activation(probes @ W.T) @ W).norm(dim=1)
    return {
        "W_enc": Parameter(W / norms.mean()),
        "b_enc": Parameter(torch.zeros(shape.n_latents), gate=gates),
        "W_dec": Parameter(W, unit_rows=True),
        "b_pre": Parameter(centre.b_pre),
    }


def encode(params: Params, x: Tensor) -> Tensor:
    """Pre-activations [batch, n_latents]: W_enc (x - b_pre) + b_enc."""
    return (x - params["b_pre"]) @ params["W_enc"].T + params["b_enc"]


def decode(params: Params, pre: Tensor, latents: Tensor) -> Forward:
    """x_hat = z W_dec + b_pre."""
    return Forward(pre, latents, latents @ params["W_dec"] + params["b_pre"])


def top_k(pre: Tensor, k: int) -> Tensor:
    """`pre` [batch, n] with all but each row's k largest entries set to zero."""
    largest = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values)


def normalised(x_hat: Tensor, target: Tensor, variance: float) -> Tensor:
    """The training nmse: mean((x_hat - target)^2) / c."""
    return (x_hat - target).square().mean() / variance


def with_l1(forward: Forward, target: Tensor, state: State) -> Losses:
    """nmse + coefficient * mean(||z||_1 / ||x||_2); preprocessing made ||x||_2 = 1."""
    main = normalised(forward.x_hat, target, state.variance)
    l1 = forward.latents.sum(dim=1).mean()
    return Losses(main, main + state.coefficient * l1, {"l1": l1})


def sparse_flops(shape: Shape, worked: Worked, reconstructions: int = 1, products: int = 4) -> Flops:
    """2 N d a token for scoring every latent, 8 d for each pair that was decoded (scaling/compute.py)."""
    return topk_flops(*shape, **worked._asdict(), reconstructions=reconstructions, products=products)
