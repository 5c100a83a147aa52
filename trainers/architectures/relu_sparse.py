"""The sparse paths of ReLU and ProLU, whose penalty is ||z||_1."""

from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.pairwise import Boundary, Loss, PairwiseStep, by_latent
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Selected, Term


class ReLUStep(PairwiseStep):
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(params["b_enc"], torch.zeros_like(params["b_enc"]))

    def latents(self, params: Params, selected: Selected, settings: Any) -> Selected:
        return selected

    def loss(
        self, params: Params, selected: Selected, latents: Selected, target: Tensor, offset: Tensor, scale: float,
        settings: Any, conditions: Conditions,
    ) -> Loss:  # fmt: skip
        error = torch.empty_like(target)
        squared, dz = kernels(target.device).decode(target, offset, latents, params["W_dec"], scale, error)
        dz.add_(latents.z > 0, alpha=conditions.coefficient / len(target))
        pre, b_enc = self.through(dz, latents, settings)
        vectors = {"b_enc": by_latent(b_enc, selected, len(params["W_dec"]))}
        parts = {"l1": latents.z.sum(dim=1).mean()}
        term = Term(latents, pre, scale)
        return Loss(squared, parts, error, term, term, vectors)

    def through(self, dz: Tensor, latents: Selected, settings: Any) -> tuple[Tensor, Tensor]:
        """The gradients by W_enc (x - b_pre) and by b_enc of each pair, from that by z."""
        return dz, dz


class ProLUStep(ReLUStep):
    """A latent's value has no bias in it, which moves from where on it counts."""

    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(torch.zeros_like(params["b_enc"]), (-params["b_enc"]).clamp_min(0))

    def through(self, dz: Tensor, latents: Selected, settings: Any) -> tuple[Tensor, Tensor]:
        if settings.variant == "relu":
            return dz, dz
        by_bias = dz * latents.z
        return dz + by_bias, by_bias
