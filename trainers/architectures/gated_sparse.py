"""The sparse path of gated SAEs: pairs whose gate is open, of which those with a positive magnitude are active."""

from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Conditions, Params
from saescale.trainers.architectures.pairwise import Boundary, Loss, PairwiseStep, at, by_latent
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Selected, Term


class GatedStep(PairwiseStep):
    def boundary(self, params: Params, settings: Any, training: bool) -> Boundary:
        return Boundary(params["b_gate"], torch.zeros_like(params["b_gate"]))

    def latents(self, params: Params, selected: Selected, settings: Any) -> Selected:
        scores = selected.z - at(params["b_gate"], selected)
        magnitudes = scores * at(params["r_mag"].exp(), selected) + at(params["b_mag"], selected)
        # Where a gate is NaN the magnitude is, too; there is none where there is no pair.
        absent = (selected.indices < 0) & (selected.z == 0)
        return selected._replace(z=magnitudes.clamp_min(0).masked_fill(absent, 0))

    def loss(
        self, params: Params, selected: Selected, latents: Selected, target: Tensor, offset: Tensor, scale: float,
        settings: Any, conditions: Conditions,
    ) -> Loss:  # fmt: skip
        sparse, n_latents = kernels(target.device), len(params["W_dec"])
        error, missed = torch.empty_like(target), torch.empty_like(target)
        squared, dz = sparse.decode(target, offset, latents, params["W_dec"], scale, error)
        by_gate = sparse.decode(target, offset, selected, params["W_dec"], scale, missed)
        is_open = selected.z > 0
        d_gate = by_gate.dz.add_(is_open, alpha=conditions.coefficient / len(target))
        gain = at(params["r_mag"].exp(), selected)
        scores = selected.z - at(params["b_gate"], selected)
        vectors = {
            "b_gate": by_latent(d_gate, selected, n_latents),
            "b_mag": by_latent(dz, selected, n_latents),
            "r_mag": by_latent(dz * scores * gain, selected, n_latents),
        }
        parts = {
            "gate": by_gate.squared / target.numel() / conditions.variance,
            "l1": selected.z.sum(dim=1).mean(),
        }
        # The gate's reconstruction holds the decoder fast, so W_dec and b_pre have the other's gradient alone.
        decoder, encoder = Term(latents, dz, scale), Term(selected, dz * gain + d_gate, 1.0)
        return Loss(squared, parts, error, decoder, encoder, vectors, more=is_open.sum())
