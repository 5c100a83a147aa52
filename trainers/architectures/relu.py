"""The ReLU SAE with an L1 penalty (Cunningham et al. 2023, 2309.08600; Bricken et al. 2023).

    z = ReLU(W_enc (x - b_pre) + b_enc),  x_hat = z W_dec + b_pre,  loss = nmse + coefficient * mean(||z||_1 / ||x||_2)

Rows of W_dec have unit norm, or the penalty could be evaded by small z; x has unit norm from preprocessing, so
||x||_2 = 1. The penalty shrinks what it lets through, which is why nmse at equal L0 is worse than TopK's.
"""

import torch
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import Forward, Losses, Parameter, Params, Shape, State, Worked
from saescale.trainers.architectures.relu_sparse import ReLUStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre


class Settings(architecture.PenaltySettings):
    pass


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    return parts.tied_parameters(shape, centre, seed, torch.relu, gates=True)


def share(shape: Shape, settings: Settings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    return parts.tied_share(shape, centre, seed, torch.relu, mesh, gates=True)


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    pre = parts.encode(params, x)
    return parts.decode(params, pre, pre.relu())


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    return parts.with_l1(forward, target, state)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    return parts.sparse_flops(shape, worked)


step = ReLUStep("relu")
