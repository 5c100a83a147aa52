"""The gated SAE (Rajamanoharan et al. 2024, 2404.16014): one half says which latents are active, the other how much.

    gate = W_enc (x - b_pre) + b_gate,  mag = exp(r_mag) * W_enc (x - b_pre) + b_mag
    z = 1[gate > 0] ReLU(mag),  x_hat = z W_dec + b_pre

The penalty and a reconstruction by ReLU(gate), with the decoder held fast, train the gate, and the magnitudes are not
shrunk: loss = nmse + coefficient * mean(||ReLU(gate)||_1) + nmse of ReLU(gate) W_dec + b_pre. Betas are those of all
others: the paper's (0, 0.999) lost 90 % of the latents at rates of 5e-3 and more, where the paper has 3e-4.
"""

import torch
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import (
    Auxiliary,
    Candidates,
    Forward,
    Losses,
    Parameter,
    Params,
    Shape,
    State,
    Worked,
)
from saescale.trainers.architectures.gated_sparse import GatedStep
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre


class Settings(architecture.PenaltySettings):
    def pairs_per_token(self, n_latents: int) -> int:
        return 2 * self.k


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    return _with_gates(parts.tied_parameters(shape, centre, seed, torch.relu, gates=True))


def share(shape: Shape, settings: Settings, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
    return _with_gates(parts.tied_share(shape, centre, seed, torch.relu, mesh, gates=True))


def _with_gates(tied: dict[str, Parameter]) -> dict[str, Parameter]:
    tied["b_gate"] = tied.pop("b_enc")
    zeros = {name: Parameter(torch.zeros_like(tied["b_gate"].data), gate=True) for name in ("r_mag", "b_mag")}
    return tied | zeros


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    scores = (x - params["b_pre"]) @ params["W_enc"].T
    gate = scores + params["b_gate"]
    return parts.decode(params, gate, _magnitudes(params, scores).relu() * (gate > 0))


def _magnitudes(params: Params, scores: Tensor) -> Tensor:
    return scores * params["r_mag"].exp() + params["b_mag"]


def candidates(params: Params, forward: Forward, settings: Settings) -> Candidates:
    gate = forward.pre_activations
    return Candidates(gate, _magnitudes(params, gate - params["b_gate"]))


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    gate = forward.pre_activations.relu()
    fixed = {name: params[name].detach() for name in ("W_dec", "b_pre")}
    by_gate = parts.normalised(parts.decode(fixed, gate, gate).x_hat, target, state.variance)
    l1 = gate.sum(dim=1).mean()
    beside = Auxiliary(selected=int((gate > 0).sum()))
    return Losses(main, main + by_gate + state.coefficient * l1, {"gate": by_gate, "l1": l1}, beside)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """6 d for each pair of either reconstruction: the gate's has no gradient by W_dec, and of a pair of both there is
    one row of W_enc to differentiate."""
    return parts.sparse_flops(shape, worked, reconstructions=2, products=3)


step = GatedStep("gated")
