"""The training objective in plain dense torch with autograd: what every faster path is held to.

Works in any dtype and on any device. Sparse paths must give the same losses and gradients.
"""

from typing import NamedTuple

import torch
from saescale.trainers.architectures.topk import SAE, Forward
from torch import Tensor

ACTIVE_ABOVE = 1e-3  # a latent counts as active on a token when its activation exceeds this
MULTI_TOPK_FACTOR = 4
MULTI_TOPK_WEIGHT = 1 / 8


class Objective(NamedTuple):
    """What the loss of one cell is made of; the same for every implementation."""

    k: int
    variance: float  # the fixed normaliser c (trainers/preprocess.py)
    k_aux: int = 0
    auxk_coefficient: float = 1 / 32
    multi_topk: bool = False


class Losses(NamedTuple):
    main: Tensor  # scalar: mean((x_hat - x)^2) / c
    multi: Tensor  # scalar: the same with 4k latents; 0 without Multi-TopK
    auxk: Tensor  # scalar; 0 where no latent is dead
    total: Tensor  # main + multi / 8 + auxk_coefficient * auxk


def fired(latents: Tensor) -> Tensor:
    """[batch, n_latents] -> [n_latents] bool: active on at least one token of the batch."""
    return (latents > ACTIVE_ABOVE).any(dim=0)


def losses(sae: SAE, x: Tensor, forward: Forward, dead: Tensor, objective: Objective) -> Losses:
    """Losses on preprocessed x [batch, d_model] from `forward`, the SAE's pass over x with objective.k latents.

    `dead` [n_latents] bool has to be updated with `fired(forward.latents)` beforehand: a latent that came back to
    life in this batch is no longer dead in it.
    """
    main = (forward.reconstruction - x).square().mean() / objective.variance

    multi = x.new_zeros(())
    if objective.multi_topk:
        k = min(MULTI_TOPK_FACTOR * objective.k, sae.n_latents)
        wider = sae.decode(forward.pre_activations, k)
        multi = (wider.reconstruction - x).square().mean() / objective.variance

    error = (x - forward.reconstruction).detach()
    auxk = auxk_loss(sae, forward.pre_activations, error, dead, objective.k_aux)
    total = main + MULTI_TOPK_WEIGHT * multi + objective.auxk_coefficient * auxk
    return Losses(main, multi, auxk, total)


def auxk_loss(sae: SAE, pre: Tensor, error: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """The k_aux largest pre-activations [batch, n_latents] among `dead` latents reconstruct error = x - x_hat.

    A scalar: their squared error over that of the mean error, 0 where no latent is dead (Gao et al. 2024, appendix
    A.2). The caller detaches `error`, so AuxK reaches the dead latents' encoder and decoder rows and b_pre through
    the encoder, and nothing else.
    """
    k_aux = min(k_aux, int(dead.sum()))
    if k_aux == 0:
        return error.new_zeros(())
    best = pre.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    # No b_pre here: the residual has it taken off already.
    error_hat = latents @ sae.W_dec
    loss = (error_hat - error).square().mean() / (error.mean(dim=0) - error).square().mean()
    return loss.nan_to_num(0.0)
