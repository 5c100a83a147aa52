"""The BatchTopK SAE (Bussmann et al. 2024, 2412.06410): k latents a token on average, not each.

In training the batch's k * batch largest positive pre-activations are active; elsewhere, where a token must not depend
on its company, those above a threshold. That is measured with the averaged weights, which are what is used then, as
the smallest activation that is active in the last batch of training. Losses are TopK's, AuxK among them.
"""

import torch
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import parts, topk
from saescale.trainers.architectures.architecture import Forward, Losses, Parameter, Params, Shape, State, Worked
from saescale.trainers.architectures.batchtopk_sparse import BatchTopKStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre


class Settings(topk.AuxKSettings):
    @property
    def k_is_target(self) -> bool:
        return True


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    started = topk.parameters(shape, settings, centre, seed)
    return started | {"threshold": Parameter(torch.zeros(1), trained=False, common=True)}


def share(shape: Shape, settings: Settings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    started = topk.share(shape, settings, centre, seed, mesh)
    return started | {"threshold": Parameter(torch.zeros(1), trained=False, common=True)}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    pre = parts.encode(params, x)
    return parts.decode(params, pre, torch.where(pre > params["threshold"], pre, 0.0))


def training_forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    pre = parts.encode(params, x)
    return parts.decode(params, pre, batch_top_k(pre, settings.k))


def calibrated(params: Params, x: Tensor, settings: Settings) -> dict[str, Tensor]:
    latents = training_forward(params, x, settings).latents
    smallest = latents.masked_fill(latents <= 0, torch.inf).amin()
    # Just below it, or the smallest would be out itself.
    below = torch.nextafter(smallest, torch.zeros_like(smallest))
    return {**params, "threshold": torch.where(smallest.isfinite(), below, 0.0).reshape(1)}


def batch_top_k(pre: Tensor, k: int) -> Tensor:
    """`pre` [batch, n] with all but its k * batch largest positive entries set to zero."""
    flat = pre.relu().flatten()
    largest = flat.topk(min(k * len(pre), len(flat)))
    return torch.zeros_like(flat).scatter(0, largest.indices, largest.values).view_as(pre)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    error = (target - forward.x_hat).detach()
    auxk, beside = topk.auxk_loss(params, forward.pre_activations, error, state.dead, settings.k_aux)
    total = main + settings.auxk_coefficient * auxk
    return Losses(main, total, {"auxk": auxk}, beside)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    return parts.sparse_flops(shape, worked)


step = BatchTopKStep()
