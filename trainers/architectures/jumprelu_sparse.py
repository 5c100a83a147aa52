"""The sparse path of JumpReLU: active pairs, and for the thresholds those that are less than half a bandwidth away.

The latter lie on both sides, so some of them are not active; they are neither decoded nor differentiated by their
pre-activation, but the gradient of their threshold takes what their decoder row has in common with the error.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.looked import Looked
from saescale.trainers.architectures.pairwise import Boundary, PairwiseStep, Reconstructed
from saescale.trainers.architectures.pairwise_gradient import Loss
from saescale.trainers.mesh.mesh import Mesh


class JumpReLUStep(PairwiseStep):
    wide = 5.5

    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        theta = params["threshold"].relu()
        return Boundary(params["b_enc"], theta - settings.bandwidth / 2 if training else theta)

    def latents(self, params: Params, looked: Looked, settings: Any) -> Tensor:
        return looked.z.masked_fill(looked.z <= looked.at(params["threshold"].relu()), 0)

    def reconstructions(
        self, looked: Looked, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh
    ) -> Reconstructed:
        """The gradient by z is as if all these pairs were active."""
        squared = looked.error(z, target, offset, error, mesh)
        return Reconstructed([squared], [looked.by_z(error, scale)])

    def loss(
        self, params: Params, looked: Looked, z: Tensor, by_z: Sequence[Tensor], tokens: int, settings: Any,
        conditions: Conditions,
    ) -> Loss:  # fmt: skip
        (G,) = by_z
        theta, active, width = params["threshold"].relu(), z > 0, settings.bandwidth
        near = ((looked.z - looked.at(theta)).abs() < width / 2) & looked.there

        by_l0 = conditions.coefficient / settings.k / tokens
        by_theta = looked.by_latent(G * near) * theta
        by_theta = -(by_theta + by_l0 * looked.by_latent(near.to(G.dtype))) / width
        dz = G * active
        vectors = {"b_enc": looked.by_latent(dz), "threshold": by_theta * (params["threshold"] > 0)}
        parts = {"l0": active.sum() / tokens / settings.k}
        return Loss(dz, vectors, parts, near=(near & ~active).sum())
