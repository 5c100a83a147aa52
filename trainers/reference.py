"""The training objective in plain dense torch with autograd: what every faster path is held to.

Works in any dtype and on any device. Sparse paths (trainers/sparse.py) must give the same losses and gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainers.sae import SAE

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


def losses(sae: SAE, x: Tensor, dead: Tensor, objective: Objective) -> Losses:
    """Losses on preprocessed x [batch, d_model]; `dead` [n_latents] bool, updated with this batch beforehand.

    AuxK (Gao et al. 2024, appendix A.2): the k_aux largest pre-activations among dead latents reconstruct the
    residual e = x - x_hat, which is detached, so AuxK reaches the dead latents' encoder and decoder rows and
    b_pre through the encoder, and nothing else.
    """
    forward = sae(x, objective.k)
    main = (forward.reconstruction - x).square().mean() / objective.variance

    multi = x.new_zeros(())
    if objective.multi_topk:
        k = min(MULTI_TOPK_FACTOR * objective.k, sae.n_latents)
        multi = (sae(x, k).reconstruction - x).square().mean() / objective.variance

    auxk = x.new_zeros(())
    k_aux = min(objective.k_aux, int(dead.sum()))
    if k_aux > 0:
        error = (x - forward.reconstruction).detach()
        best = forward.pre_activations.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1)
        latents = torch.zeros_like(forward.pre_activations).scatter(-1, best.indices, best.values.relu())
        # No b_pre here: the residual has it taken off already.
        error_hat = latents @ sae.W_dec
        auxk = (error_hat - error).square().mean() / (error.mean(dim=0) - error).square().mean()
        auxk = auxk.nan_to_num(0.0)

    total = main + MULTI_TOPK_WEIGHT * multi + objective.auxk_coefficient * auxk
    return Losses(main, multi, auxk, total)
