"""The TopK SAE (Gao et al. 2024, 2406.04093): its parameters, its forward pass and its losses in plain dense torch.

    z = ReLU(TopK(W_enc (x - b_pre) + b_enc)),  x_hat = z W_dec + b_pre

W_enc [n_latents, d_model], b_enc [n_latents], W_dec [n_latents, d_model] with one row per latent, b_pre [d_model].
While an SAE trains its decoder rows have unit norm; those of averaged weights, which evaluation uses and
sae.safetensors holds, are slightly shorter (Adam.averaged). Multiply z by a row's norm and divide the row by it where
unit directions are needed: that leaves x_hat as it is.
"""

import torch
from pydantic import Field
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import (
    Auxiliary,
    Forward,
    Losses,
    Parameter,
    Params,
    Shape,
    State,
    Worked,
)
from saescale.trainers.architectures.topk_sparse import TopKStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre

MULTI_TOPK_FACTOR = 4
MULTI_TOPK_WEIGHT = 1 / 8


class AuxKSettings(architecture.Settings):
    """Of all whose dead latents are brought back by AuxK."""

    k_aux: int = Field(default=0, ge=0)  # dead latents in the AuxK loss; 0 switches it off
    auxk_coefficient: float = Field(default=1 / 32, ge=0)

    def reconstructions(self, n_latents: int) -> list[tuple[int, float]]:
        """Number of latents and weight of each reconstruction in the loss, the SAE's own first."""
        return [(self.k, 1.0)]


class Settings(AuxKSettings):
    multi_topk: bool = False  # a second reconstruction, by 4k latents, in the loss

    def reconstructions(self, n_latents: int) -> list[tuple[int, float]]:
        if not self.multi_topk:
            return [(self.k, 1.0)]
        return [(self.k, 1.0), (min(MULTI_TOPK_FACTOR * self.k, n_latents), MULTI_TOPK_WEIGHT)]

    def pairs_per_token(self, n_latents: int) -> int:
        return sum(k for k, _ in self.reconstructions(n_latents))


def parameters(shape: Shape, settings: AuxKSettings, centre: Centre, seed: int) -> dict[str, Parameter]:
    return parts.tied_parameters(shape, centre, seed, lambda pre: parts.top_k(pre, settings.k).relu())


def share(shape: Shape, settings: AuxKSettings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    return parts.tied_share(shape, centre, seed, lambda pre: parts.top_k_of_all(pre, settings.k, mesh), mesh)


def forward(params: Params, x: Tensor, settings: AuxKSettings) -> Forward:
    return _decode(params, parts.encode(params, x), settings.k)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    """main + multi / 8 + auxk_coefficient * auxk: `multi` the squared error with 4k latents, `auxk` see `auxk_loss`."""
    main = parts.normalised(forward.x_hat, target, state.variance)

    multi, selected = target.new_zeros(()), 0
    for k, _ in settings.reconstructions(forward.latents.shape[1])[1:]:
        wider = _decode(params, forward.pre_activations, k)
        multi = parts.normalised(wider.x_hat, target, state.variance)
        selected = int((wider.latents > 0).sum())

    error = (target - forward.x_hat).detach()
    auxk, dead = auxk_loss(params, forward.pre_activations, error, state.dead, settings.k_aux)
    total = main + MULTI_TOPK_WEIGHT * multi + settings.auxk_coefficient * auxk
    return Losses(main, total, {"multi": multi, "auxk": auxk}, dead._replace(selected=selected))


def auxk_loss(params: Params, pre: Tensor, error: Tensor, dead: Tensor, k_aux: int) -> tuple[Tensor, Auxiliary]:
    """The k_aux largest pre-activations [batch, n_latents] among `dead` latents reconstruct error = x - x_hat.

    A scalar: their squared error over that of the mean error, 0 where no latent is dead (appendix A.2). The caller
    detaches `error`, so AuxK reaches the dead latents' encoder and decoder rows and b_pre through the encoder, and
    nothing else.
    """
    count = int(dead.sum())
    k_aux = min(k_aux, count)
    if k_aux == 0:
        return error.new_zeros(()), Auxiliary()
    best = pre.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    # No b_pre here: the residual has it taken off already.
    error_hat = latents @ params["W_dec"]
    loss = (error_hat - error).square().mean() / (error.mean(dim=0) - error).square().mean()
    done = Auxiliary(selected_aux=int((latents > 0).sum()), dead=count * len(pre))
    return loss.nan_to_num(0.0), done


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """Of the pairs that were active; AuxK costs something only while latents are dead."""
    return parts.sparse_flops(shape, worked, len(settings.reconstructions(shape.n_latents)))


step = TopKStep()


def _decode(params: Params, pre: Tensor, k: int) -> Forward:
    return parts.decode(params, pre, parts.top_k(pre, k).relu())
