"""The sparse path of gated SAEs: pairs whose gate is open, of which those with a positive magnitude are active."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.looked import Looked
from saescale.trainers.architectures.pairwise import Boundary, PairwiseStep, Reconstructed
from saescale.trainers.architectures.pairwise_gradient import Loss
from saescale.trainers.mesh.mesh import Mesh


class GatedStep(PairwiseStep):
    beside = ("gate",)
    wide = 7.5

    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(params["b_gate"], torch.zeros_like(params["b_gate"]))

    def latents(self, params: Params, looked: Looked, settings: Any) -> Tensor:
        scores = looked.z - looked.at(params["b_gate"])
        magnitudes = scores * looked.at(params["r_mag"].exp()) + looked.at(params["b_mag"])
        # Where a gate is NaN the magnitude is, too; there is none where there is no pair.
        return magnitudes.clamp_min(0).masked_fill(~looked.there & (looked.z == 0), 0)

    def reconstructions(
        self, looked: Looked, z: Tensor, target: Tensor, offset: Tensor, scale: float, error: Tensor, mesh: Mesh
    ) -> Reconstructed:
        """By magnitudes, then by gates."""
        squared, dz = looked.decode(z, target, offset, scale, error, mesh)
        by_gate = looked.decode(looked.z, target, offset, scale, torch.empty_like(error), mesh)
        return Reconstructed([squared, by_gate.squared], [dz, by_gate.dz])

    def loss(
        self, params: Params, looked: Looked, z: Tensor, by_z: Sequence[Tensor], tokens: int, settings: Any,
        conditions: Conditions,
    ) -> Loss:  # fmt: skip
        dz, by_gate = by_z
        is_open = looked.z > 0
        d_gate = by_gate.add_(is_open, alpha=conditions.coefficient / tokens)
        gain = looked.at(params["r_mag"].exp())
        scores = looked.z - looked.at(params["b_gate"])
        vectors = {
            "b_gate": looked.by_latent(d_gate),
            "b_mag": looked.by_latent(dz),
            "r_mag": looked.by_latent(dz * scores * gain),
        }
        # The gate's reconstruction holds the decoder fast, so W_dec and b_pre have the other's gradient alone.
        parts = {"l1": looked.z.sum() / tokens}
        return Loss(dz * gain + d_gate, vectors, parts, differs=looked.z, more=is_open.sum())
