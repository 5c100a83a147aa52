"""A TopK SAE whose encoder stays random, its biases too: what a claim about learnt features has to beat (2602.14111).

b_pre is trained, as a part of the decoder; that it shifts what the encoder sees is the one thing that moves there.
"""

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
    return started | {name: started[name]._replace(trained=False) for name in ("W_enc", "b_enc")}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """6 d a pair, where TopK has 8: W_enc has no gradient."""
    return parts.sparse_flops(shape, worked, len(settings.reconstructions(shape.n_latents)), products=3)
