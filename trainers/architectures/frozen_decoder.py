"""A TopK SAE whose decoder stays random: what a claim about learnt features has to beat (2602.14111)."""

from torch import Tensor

from saescale.trainers.architectures import topk
from saescale.trainers.architectures.architecture import Forward, Parameter, Params, Shape
from saescale.trainers.preprocess import Centre

Settings = topk.Settings
losses = topk.losses
step = topk.step
flops = topk.flops


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    started = topk.parameters(shape, settings, centre, seed)
    return started | {"W_dec": started["W_dec"]._replace(trained=False)}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)
