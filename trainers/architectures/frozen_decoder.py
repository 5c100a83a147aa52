"""A TopK SAE whose decoder stays random: what a claim about learnt features has to beat (2602.14111)."""

from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import parts, topk
from saescale.trainers.architectures.architecture import Forward, Parameter, Params, Shape, Worked
from saescale.trainers.preprocess import Centre

Settings = topk.Settings
losses = topk.losses
step = topk.step


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    started = topk.parameters(shape, settings, centre, seed)
    return started | {"W_dec": started["W_dec"]._replace(trained=False)}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """6 d a pair, where TopK has 8: W_dec has no gradient."""
    return parts.sparse_flops(shape, worked, len(settings.reconstructions(shape.n_latents)), products=3)
