"""What stands between a user and a Triton kernel that does not work on his device: each is tried on small inputs."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saescale.trainers.kernels import eager as sparse_eager
from saescale.trainers.kernels.interface import AdamStep, Moments, Summands, Term

Function = Callable[..., Any]

FUNCTIONS = ("encode_select", "decode", "transpose", "latent_sums", "update_rows")


def check(kernels: ModuleType, device: torch.device) -> str | None:
    """What is wrong with the functions of cuda.py on `device`, in words; None where they agree with eager.py's on a
    CPU."""
    mine, theirs = ([getattr(module, name) for name in FUNCTIONS] for module in (kernels, sparse_eager))
    # On a CPU, whose products nobody has set to TF32.
    expected = small_step(torch.device("cpu"), *theirs, piece=kernels.PIECE)
    try:
        for (name, result), (_, wanted) in zip(small_step(device, *mine, piece=kernels.PIECE), expected, strict=True):
            got = result.cpu().double()
            if not torch.allclose(got, wanted.double(), rtol=1e-4, atol=1e-4):
                return f"{name}: off by up to {float((got - wanted.double()).abs().max()):.3g}"
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    return None


@torch.no_grad()
def small_step(
    device: torch.device,
    encode_select: Function,
    decode: Function,
    transpose: Function,
    latent_sums: Function,
    update_rows: Function,
    batch: int = 20,
    d_model: int = 24,
    n_latents: int = 70,
    ks: tuple[int, ...] = (3, 12),
    *,
    piece: int,
) -> Iterator[tuple[str, Tensor]]:
    """What each function makes of the same random input at every call, by name; none gets what another returned.
    `piece`: pairs of a latent that are summed together (cuda.PIECE)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device)

    # Of such small numbers neither a sum nor its rounding to bfloat16 is inexact, and many of them are the same.
    x, W_enc = whole(-3, 4, batch, d_model).float(), whole(-3, 4, n_latents, d_model).float()
    bias = whole(-8, 9, n_latents) / 4
    for dtype in (torch.bfloat16, torch.float32):
        for indices, z in encode_select(x.to(dtype), W_enc.to(dtype), bias, ks):
            order = indices.argsort(dim=1)
            yield f"the selection from {dtype}", indices.gather(1, order)
            yield f"z from {dtype}", z.gather(1, order)

    selections = sparse_eager.encode_select(x, W_enc, bias, ks)
    offset, W_dec, terms = normal(d_model), normal(n_latents, d_model), []
    for selected in selections:
        for scale in (0.5, None):
            error = torch.empty_like(x)
            decoded = decode(x, offset, selected, W_dec, scale, error)
            yield from zip(("the error", "its square", "dz"), (error, decoded.squared, decoded.dz), strict=True)
        terms.append(Term(selected, normal(*selected.z.shape), 0.5))
    pairs = transpose(terms, n_latents)
    active = torch.arange(len(pairs.rows), device=device) < pairs.starts[-1]
    for name, values in pairs._asdict().items():
        yield f"{name} of the pairs", values if name == "starts" else values * active
    yield "the sums by latent", latent_sums(sparse_eager.transpose(terms, n_latents))

    # One latent has enough pairs for several pieces, and there is something after the last one.
    lengths = whole(0, 4, n_latents)
    lengths[1] = 3 * piece - 5
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    size, latents = int(starts[-1]) + 9, torch.arange(0, n_latents, 9, device=device)
    rows, weights, extra = whole(0, 2 * batch, size).int(), normal(size) / 10, normal(len(latents), d_model)
    of_decoder = Summands(
        starts, rows, weights, normal(2 * batch, d_model), None, offset, latents[:0], extra[:0]
    )  # fmt: skip
    of_encoder = Summands(starts, rows, weights, x, normal(n_latents), offset, latents, extra)
    rounded = torch.empty(n_latents, d_model, dtype=torch.bfloat16, device=device)
    adam = AdamStep(0.01, 0.9, 0.999, 1e-8, 1.5, 2.0, 0.99)
    for gradient, unit_rows, operand in ((of_decoder, True, None), (of_encoder, False, rounded)):
        parameter = torch.nn.functional.normalize(normal(n_latents, d_model))
        # Far from 0, where the last bit of a gradient would decide the sign of a step.
        moments = Moments(*(1 + normal(n_latents, d_model).square() for _ in Moments._fields))
        update_rows(parameter, moments, gradient, adam, unit_rows, operand)
        yield "the updated rows", parameter
        yield from zip(("Adam's mean", "Adam's mean square", "the average of rows"), moments, strict=True)
        if operand is not None:
            yield "the rounding of rows", operand.float() - parameter.bfloat16().float()
