"""The sparse path of JumpReLU: active pairs, and for the thresholds those that are less than half a bandwidth away.

The latter lie on both sides, so some of them are not active; they are neither decoded nor differentiated by their
pre-activation, but the gradient of their threshold takes what their decoder row has in common with the error.
"""

from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.pairwise import Boundary, Loss, PairwiseStep, at, by_latent
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Selected, Term


class JumpReLUStep(PairwiseStep):
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        theta = params["threshold"].relu()
        return Boundary(params["b_enc"], theta - settings.bandwidth / 2 if training else theta)

    def latents(self, params: Params, selected: Selected, settings: Any) -> Selected:
        below = selected.z <= at(params["threshold"].relu(), selected)
        return selected._replace(z=selected.z.masked_fill(below, 0))

    def loss(
        self, params: Params, selected: Selected, latents: Selected, target: Tensor, offset: Tensor, scale: float,
        settings: Any, conditions: Conditions,
    ) -> Loss:  # fmt: skip
        sparse, n_latents = kernels(target.device), len(params["W_dec"])
        error, width = torch.empty_like(target), settings.bandwidth
        squared, _ = sparse.decode(target, offset, latents, params["W_dec"], None, error)
        # By z, as if all these pairs were active.
        G = sparse.gradient_by_z(error, selected.indices, params["W_dec"], scale)
        theta, active = params["threshold"].relu(), latents.z > 0
        near = ((selected.z - at(theta, selected)).abs() < width / 2) & (selected.indices >= 0)

        by_l0 = conditions.coefficient / settings.k / len(target)
        by_theta = by_latent(G * near, selected, n_latents) * theta
        by_theta = -(by_theta + by_l0 * by_latent(near.to(G.dtype), selected, n_latents)) / width
        dz = G * active
        vectors = {
            "b_enc": by_latent(dz, selected, n_latents),
            "threshold": by_theta * (params["threshold"] > 0),
        }
        term = Term(latents, dz, scale)
        parts = {"l0": active.sum() / len(target) / settings.k}
        return Loss(squared, parts, error, term, term, vectors, near=(near & ~active).sum())
