"""The door of architectures: what an SAE is made of, what it does and what it is trained for.

An architecture is a file of this folder that defines what `Architecture` lists, at its top level: see README.md for a
whole example. Everything else (data, optimiser, dead latents, average of the weights, checkpoints, evaluation, laws)
is the same for all of them. What a file must give is the dense reference, from which autograd makes the gradients;
`step` is the fast path of those that have one, and the tests hold it to that reference.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.storage.registry import Room
from saescale.trainers.kernels.interface import AdamStep, Moments
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.preprocess import Centre

ARCHITECTURES = Room("saescale.trainers.architectures", "architecture", marker="forward")
ACTIVE_ABOVE = 1e-3  # a latent counts as active on a token when its activation exceeds this

Params = Mapping[str, Tensor]


class Settings(BaseModel):
    """What an architecture can be told besides its number of latents; its own file adds fields with defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(gt=0)  # active latents per token: exact, or the target of their mean number


class Shape(NamedTuple):
    d_model: int
    n_latents: int


class Parameter(NamedTuple):
    """Where a parameter starts from, and how it is trained."""

    data: Tensor  # float32
    unit_rows: bool = False  # of a matrix: the gradient is projected off its rows, and they are brought to norm 1 again
    betas: tuple[float, float] = (0.9, 0.999)
    rounded: bool = False  # in a bf16 cell the forward product takes a copy of it rounded to bfloat16


class Forward(NamedTuple):
    pre_activations: Tensor  # [batch, n_latents]
    latents: Tensor  # [batch, n_latents], 0 where a latent is not active
    x_hat: Tensor  # [batch, d_model]


class State(NamedTuple):
    """What the losses of a step depend on beside the batch."""

    variance: float  # c, the fixed normaliser of the squared error (trainers/preprocess.py)
    dead: Tensor  # [n_latents] bool: not active for dead_after_tokens, this batch included
    progress: float  # share of the cell's tokens that it has been trained on, 0 to 1


class Losses(NamedTuple):
    main: Tensor  # scalar: mean((x_hat - target)^2) / c, the training nmse
    total: Tensor  # scalar: what the gradient is of
    parts: Mapping[str, Tensor] = {}  # what else total is made of, by name, each a scalar


class Worked(NamedTuple):
    """What the steps of a cell did, summed over them; `selected` and `selected_aux` are (token, latent) pairs."""

    tokens: int
    selected: int  # that were decoded, of all reconstructions of the main losses
    selected_aux: int  # that were decoded for dead latents
    dead: int  # dead latents that were scored, summed over tokens


class Batch(NamedTuple):
    """Preprocessed activations, shared by the cells of a pack."""

    x: Tensor  # float32 [batch, d_model], minus `origin`
    origin: Tensor  # [d_model], the geometric median that every b_pre starts from
    rounded: Tensor  # x in bfloat16, or x itself where no cell needs that
    target: Tensor | None = None  # [batch, d_target], preprocessed, where x_hat is compared with another site

    @classmethod
    def of(cls, x: Tensor, origin: Tensor, bf16: bool, target: Tensor | None = None) -> "Batch":
        """From preprocessed x [batch, d_model]; `bf16`: some cell has operands of that type."""
        centred = x - origin
        return cls(centred, origin, centred.bfloat16() if bf16 else centred, target)


class Step(NamedTuple):
    """What one batch gave one cell."""

    main: float  # Losses.main
    parts: Mapping[str, float]  # Losses.parts
    gradient: Any  # of Losses.total: whatever `FastStep.update` takes
    worked: Worked


class Reconstruction(NamedTuple):
    """What the active latents leave over, for evaluation."""

    error: Tensor  # target - x_hat, float32 [batch, d_model]
    squared: float  # ||error||^2 over the batch, summed in float64
    active: int  # latents with z > 0, over all tokens


class Dead(Protocol):
    """For each latent the number of tokens since it was last active (architectures/dead.py)."""

    def update(self, latents: Tensor | Any) -> None: ...

    def after(self, window: int) -> Tensor: ...


class FastStep(Protocol):
    """The sparse path of an architecture: the same losses and gradients without a tensor [batch, n_latents].

    `params` are float32; `operands` are those of them that Parameter calls rounded, as the forward product takes them
    (bfloat16 copies in a bf16 cell, else the parameters themselves).
    """

    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, variance: float, dead: Any,
        dead_after_tokens: int, mesh: Mesh,
    ) -> Step:  # fmt: skip
        """Losses and gradient of a batch, which is counted in `dead`."""

    def update(
        self, params: Params, operands: Params, moments: Mapping[str, Moments], gradient: Any, adam: AdamStep
    ) -> None:
        """One step of the optimiser by that gradient, in place, operands included."""

    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        """The forward pass alone."""


class Architecture(Protocol):
    """What the file of an architecture defines. Shapes: Forward, Shape. Matrices have a row for each latent."""

    Settings: type[Settings]
    step: FastStep | None

    def parameters(self, shape: Shape, settings: Any, centre: Centre, seed: int) -> dict[str, Parameter]:
        """Where training starts; `centre` is measured on the data, `seed` means the same on every device."""

    def forward(self, params: Params, x: Tensor, settings: Any) -> Forward:
        """Of preprocessed x [batch, d_model], in any float dtype."""

    def losses(self, params: Params, forward: Forward, target: Tensor, settings: Any, state: State) -> Losses:
        """Of `forward`; `target` [batch, d_model] is x itself unless the source gives another."""

    def flops(self, shape: Shape, settings: Any, worked: Worked) -> Flops:
        """Training FLOPs of what steps did."""


def find_architecture(name: str) -> Architecture:
    """The architecture of that name. Raises SaescaleError with the nearest name for an unknown one."""
    return ARCHITECTURES.load(name)  # type: ignore[return-value]  # a module with these names


def fired(latents: Tensor) -> Tensor:
    """[batch, n_latents] -> [n_latents] bool: active on at least one token of the batch."""
    return (latents > ACTIVE_ABOVE).any(dim=0)


def unit_rows(rows: int, columns: int, seed: int) -> Tensor:
    """Random directions [rows, columns], drawn on the CPU, so that a seed means the same on every device."""
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return W / W.norm(dim=1, keepdim=True)
