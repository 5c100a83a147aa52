"""An SAE: an architecture bound to a shape, its settings and its parameters."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import (
    Architecture,
    Batch,
    Candidates,
    FastStep,
    Forward,
    Reconstruction,
    Shape,
    find_architecture,
)
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.mesh.mesh import ALONE, Mesh
from saescale.trainers.precision import Precision


class SAE:
    """Takes rows as preprocess.normalise makes them, x [batch, d_model].

    `params` are float32, on one device, under the architecture's names; they belong to the SAE, and training changes
    them in place. `operands` are those that the fast path multiplies with: in bf16 rounded copies of some of them,
    else `params` themselves. `step` is the architecture's fast path, or the dense one where it has none.
    """

    def __init__(
        self,
        architecture: str,
        shape: Shape,
        settings: Any,
        params: Mapping[str, Tensor],
        precision: Precision = "fp32",
        mesh: Mesh = ALONE,
    ) -> None:
        self.name, self.shape, self.settings, self.precision, self.mesh = architecture, shape, settings, precision, mesh
        self.architecture: Architecture = find_architecture(architecture)
        self.step: FastStep = step_of(architecture, shape.n_latents)
        self.params = dict(params)
        rounded = self.step.rounded if precision == "bf16" else frozenset()
        self.operands = {name: t.bfloat16() if name in rounded else t for name, t in self.params.items()}

    def round(self) -> None:
        """Brings rounded operands up to date, after a change of `params` by anyone but `step.update`."""
        for name, operand in self.operands.items():
            if operand is not self.params[name]:
                operand.copy_(self.params[name])

    def forward(self, x: Tensor) -> Forward:
        """The dense reference, in float32 and in one piece: [batch, n_latents] has to fit into memory."""
        return self.architecture.forward(self.params, x, self.settings)

    def candidates(self, forward: Forward) -> Candidates:
        """What its latents were chosen from in that forward pass, to choose more or fewer of them."""
        if hasattr(self.architecture, "candidates"):
            return self.architecture.candidates(self.params, forward, self.settings)
        return Candidates(forward.pre_activations, forward.pre_activations)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents [batch, n_latents], 0 where a latent is not active."""
        return self.forward(x).latents

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """The forward pass as training measures it: by the fast path where there is one."""
        return self.step.reconstruct(self.params, self.operands, batch, self.settings, self.mesh)

    def calibrate(self, batch: Batch) -> None:
        """Writes what its architecture measures with finished weights on the last batch of training, if anything."""
        calibrate = getattr(self.step, "calibrate", None)
        if calibrate is not None:
            calibrate(self.params, self.operands, batch, self.settings, self.mesh)

    def at(self, k: int) -> "SAE":
        """The same parameters with k latents a token, of an architecture that serves several (Settings.levels)."""
        settings = self.settings.model_copy(update={"k": k})
        return SAE(self.name, self.shape, settings, self.params, self.precision, self.mesh)

    def like(self, params: Mapping[str, Tensor]) -> "SAE":
        """The same with other parameters."""
        return SAE(self.name, self.shape, self.settings, params, self.precision, self.mesh)


def step_of(architecture: str, n_latents: int) -> FastStep:
    """The fast path of that architecture, or the dense one where it has none. Raises as find_architecture does."""
    module = find_architecture(architecture)
    return cast(FastStep, getattr(module, "step", None) or DenseStep(module, n_latents))
