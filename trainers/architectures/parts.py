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
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre

_DRAWN = 2**12  # rows that are drawn at a time; a multiple of 16


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
        "b_pre": Parameter(centre.b_pre, common=True),
    }


def tied_share(
    shape: Shape, centre: Centre, seed: int, activation: Callable[[Tensor], Tensor], mesh: Mesh, gates: bool = False
) -> dict[str, Parameter]:
    """Of `tied_parameters` the rows of this shard, without those of the others in memory; `activation` makes its own
    latents of its own pre-activations.

    All are drawn, a few at a time, since a seed means the same rows whatever the mesh; the encoder's scale is summed
    over the shards, so it may be off in its last bits.
    """
    generator = torch.Generator().manual_seed(seed)
    W = _drawn(shape, generator, mesh)
    probes = unit_rows(256, shape.d_model, generator)
    norms = mesh.sum_shards(activation(probes @ W.T) @ W).norm(dim=1)
    return {
        "W_enc": Parameter(W / norms.mean()),
        "b_enc": Parameter(torch.zeros(len(W)), gate=gates),
        "W_dec": Parameter(W, unit_rows=True),
        "b_pre": Parameter(centre.b_pre, common=True),
    }


def top_k_of_all(pre: Tensor, k: int, mesh: Mesh) -> Tensor:
    """Of a shard's `pre` [batch, n] those positive ones that are among the k largest of all shards; else 0."""
    best = pre.relu().topk(min(k, pre.shape[1]), dim=1)
    local = Selected(torch.where(best.values > 0, best.indices, -1).int(), best.values)
    chosen = mesh.select(local, k)
    width = pre.shape[1] + 1  # what is none goes to one more column
    return torch.zeros(len(pre), width).scatter_(1, chosen.indices.long() % width, chosen.z)[:, :-1]


def _drawn(shape: Shape, generator: torch.Generator, mesh: Mesh) -> Tensor:
    """This shard's rows of unit_rows(*shape, generator), bit for bit: torch draws normal numbers 16 at a time."""
    size, d_model = mesh.here(shape.n_latents), shape.d_model
    last, own = mesh.first + size, torch.empty(size, d_model)
    for start in range(0, shape.n_latents, _DRAWN):
        # What is left at the end would be drawn otherwise if it were few, so it goes with the rows before it.
        stop = start + _DRAWN if shape.n_latents - start >= 2 * _DRAWN else shape.n_latents
        rows = torch.randn(stop - start, d_model, generator=generator)
        low, high = max(start, mesh.first), min(stop, last)
        if low < high:
            own[low - mesh.first : high - mesh.first] = rows[low - start : high - start]
        if stop == shape.n_latents:
            break
    return own.div_(own.norm(dim=1, keepdim=True))


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
