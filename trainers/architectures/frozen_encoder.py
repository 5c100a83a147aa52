"""A TopK SAE whose encoder stays random, its biases too: what a claim about learnt features has to beat (2602.14111).

b_pre is trained, as a part of the decoder; that it shifts what the encoder sees is the one thing that moves there.
"""

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
    return started | {name: started[name]._replace(trained=False) for name in ("W_enc", "b_enc")}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)
