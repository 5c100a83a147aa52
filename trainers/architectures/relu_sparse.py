"""The sparse paths of ReLU and ProLU, whose penalty is ||z||_1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.looked import Looked
from saescale.trainers.architectures.pairwise import Boundary, PairwiseStep
from saescale.trainers.architectures.pairwise_gradient import Loss


class ReLUStep(PairwiseStep):
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(params["b_enc"], torch.zeros_like(params["b_enc"]))

    def latents(self, params: Params, looked: Looked, settings: Any) -> Tensor:
        return looked.z

    def loss(
        self, params: Params, looked: Looked, z: Tensor, by_z: Sequence[Tensor], tokens: int, settings: Any,
        conditions: Conditions,
    ) -> Loss:  # fmt: skip
        (dz,) = by_z
        dz.add_(z > 0, alpha=conditions.coefficient / tokens)
        pre, b_enc = self.through(dz, z, settings)
        return Loss(pre, {"b_enc": looked.by_latent(b_enc)}, {"l1": z.sum() / tokens})

    def through(self, dz: Tensor, z: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
        """The gradients by W_enc (x - b_pre) and by b_enc of each pair, from that by z."""
        return dz, dz


class ProLUStep(ReLUStep):
    """A latent's value has no bias in it, which moves from where on it counts."""

    wide = 4.25

    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(torch.zeros_like(params["b_enc"]), (-params["b_enc"]).clamp_min(0))

    def through(self, dz: Tensor, z: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
        if settings.variant == "relu":
            return dz, dz
        by_bias = dz * z
        return dz + by_bias, by_bias
