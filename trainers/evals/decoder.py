"""The decoder of a trained SAE, x_hat = z W + b, for evaluations that put other latents in place of its own, or look at
what each latent writes."""

from typing import NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.sae import SAE
from saescale.trainers.evals.evaluation import Unsuited
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise

TRIED_ROWS = 256
_TOLERANCE = 1e-4  # of the largest entry of x_hat, which float32 holds to 1e-6


class Decoder(NamedTuple):
    W: Tensor  # [n_latents, d_model]
    b: Tensor  # [d_model]


def directions_of(trained: Trained, raw: Tensor) -> Tensor:
    """What each latent writes, the rows of W, float32 [n_latents, d_model]; by some raw rows [rows, d_model] of the
    cell's source. Raises SaescaleError as `linear_decoder` does."""
    device = next(iter(trained.sae.params.values())).device
    return linear_decoder(trained.sae, normalise(raw[:TRIED_ROWS].to(device))).W.float()


@torch.no_grad()
def linear_decoder(sae: SAE, x: Tensor) -> Decoder:
    """What makes x_hat of the latents of preprocessed rows x [rows, d_model].

    Found by what it does, on the first 256 rows, since parameters may have any names. Raises SaescaleError where
    latents have signs, and where no matrix and vector of the parameters do it (several decoders, or one that sees x).
    """
    forward = sae.forward(x[:TRIED_ROWS])
    z, x_hat = forward.latents, forward.x_hat
    if bool((z < 0).any()):
        raise Unsuited(f"latents of {sae.name} have signs, and what is asked here is of latents that have none")
    matrices = [p for p in sae.params.values() if p.shape == (sae.shape.n_latents, sae.shape.d_model)]
    vectors = [p for p in sae.params.values() if p.shape == (sae.shape.d_model,)]
    for W in matrices:
        decoded = z @ W
        for b in [*vectors, torch.zeros_like(x_hat[0])]:
            if (decoded + b - x_hat).abs().max() <= _TOLERANCE * x_hat.abs().max():
                return Decoder(W, b)
    raise Unsuited(f"x_hat of {sae.name} is not z W + b with a matrix and a vector of its parameters")
