"""The door of architectures: what an SAE is made of, what it does and what it is trained for.

An architecture is a file of this folder that defines what `Architecture` lists, at its top level: see README.md for a
whole example. Everything else (data, optimiser, dead latents, average of the weights, checkpoints, evaluation, laws)
is the same for all of them. What a file must give is the dense reference, from which autograd makes the gradients
(dense.py); `step` is the fast path of those that have one, and the tests hold it to that reference.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import AdamStep, Moments
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre

_FIRST = 0.02  # share of the learning rate at which a warm-up begins
# Of the learning rate, for gates where nothing but a penalty holds their number: a whole rate is as large as the
# pre-activations that it shifts, and a latent whose gate has shut has no gradient to open it.
_GATE_RATE = 0.1
FOUND_AT = 0.9  # share of training in which a penalty's coefficient is found; then it is held
ACTIVE_ABOVE = 1e-3  # a latent counts as active on a token when its activation exceeds this
# Share of all pairs beyond which a step of an architecture with a penalty is dense. A sparse step of relu then takes a
# third of a dense one's time on a CPU (B 512, d 256, N 2,048, one thread; at 1/64 a fifth, at 1/4 0.6 of it).
DENSE_ABOVE = 1 / 8
# Of training, until a penalty has brought L0 below that: 12 to 22 % (N 512 to 2,048, k 8 to 32).
_DENSE_UNTIL = 0.15

Params = Mapping[str, Tensor]


class Settings(BaseModel):
    """What an architecture can be told besides its number of latents; its own file adds fields with defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    k: int = Field(gt=0)  # active latents per token: exact, or the target of their mean number

    @property
    def k_is_target(self) -> bool:
        """Whether k is what the mean number of active latents should come to, from which it may be off; else exact."""
        return False

    def levels(self) -> list[int]:
        """The sparsities that one training serves, k the last: of each nmse is measured at its end. None but k: []."""
        return []

    def pairs_per_token(self, n_latents: int) -> int:
        """Latents that the losses are expected to decode for a token while none is dead, for plans (Cell.flops)."""
        return self.k

    def dense_share(self, n_latents: int) -> float:
        """Share of the steps that are expected to be dense, where there is a sparse path, for plans."""
        return 0.0

    def rate(self, progress: float) -> float:
        """Share of the learning rate after that share of training."""
        return 1.0

    def gate_rate(self, progress: float) -> float:
        """The same of parameters that are gates."""
        return self.rate(progress)

    def check(self, n_latents: int) -> None:
        """Raises ValueError, in one line, where an SAE of that many latents cannot have these settings."""


class PenaltySettings(Settings):
    """Of an architecture whose number of active latents follows from the weight of a penalty."""

    # None: found while it trains, so that k latents are active on average (trainers/training/controller.py).
    coefficient: float | None = Field(default=None, gt=0)
    # Share of training in which the learning rate rises to its value. Adam's first steps move all latents by a whole
    # rate in one direction, and those that a penalty's architecture loses so do not come back.
    warmup: float = Field(default=0.1, ge=0, lt=1)

    @property
    def k_is_target(self) -> bool:
        return self.coefficient is None

    def check(self, n_latents: int) -> None:
        # Half of the latents are active at the start, and without a penalty about as many stay so.
        if self.coefficient is None and self.k > n_latents / 2:
            raise ValueError(
                f"k={self.k} is out of reach: with no penalty at all about half of n_latents={n_latents} are active; "
                "lower k, take more latents, or give a coefficient"
            )

    def dense_share(self, n_latents: int) -> float:
        return _DENSE_UNTIL if self.k <= DENSE_ABOVE * n_latents else 1.0

    def rate(self, progress: float) -> float:
        return min(1.0, (progress + _FIRST * self.warmup) / self.warmup) if self.warmup else 1.0

    def gate_rate(self, progress: float) -> float:
        return _GATE_RATE * self.rate(progress)


class Shape(NamedTuple):
    d_model: int
    n_latents: int


class Parameter(NamedTuple):
    """Where a parameter starts from, and how it is trained."""

    data: Tensor  # float32
    unit_rows: bool = False  # of a matrix: the gradient is projected off its rows, and they are brought to norm 1 again
    betas: tuple[float, float] = (0.9, 0.999)
    gate: bool = False  # it says whether a latent is active, and has a rate of its own (Settings.gate_rate)
    common: bool = False  # every process of a mesh has all of it; else the rows of its latents
    trained: bool = True  # False: it stays as it is, unless `Losses.measured` gives it another value; no average


class Forward(NamedTuple):
    pre_activations: Tensor  # [batch, n_latents]
    latents: Tensor  # [batch, n_latents], 0 where a latent is not active
    x_hat: Tensor  # [batch, d_model]


class Candidates(NamedTuple):
    """Each latent as if it were active, [batch, n_latents] both. What is active are latents with the largest scores: a
    number of them, or those above a threshold; one whose value is not above 0 never is."""

    scores: Tensor
    values: Tensor  # its z


class State(NamedTuple):
    """What the losses of a step depend on beside the batch."""

    variance: float  # c, the fixed normaliser of the squared error (trainers/preprocess.py)
    dead: Tensor  # [n_latents] bool: not active for dead_after_tokens, this batch included
    progress: float = 0.0  # share of the cell's tokens that it has been trained on, 0 to 1
    coefficient: float = 0.0  # of the penalty, where the settings are PenaltySettings


# An int64 scalar stays on its device until somebody reads it, since the host has to wait for that.
Count = int | Tensor


class Auxiliary(NamedTuple):
    """What the losses decoded beside `Forward.latents`, for the account of FLOPs; see Worked."""

    selected: Count = 0
    selected_aux: Count = 0
    dead: Count = 0


class Losses(NamedTuple):
    main: Tensor  # scalar: mean((x_hat - target)^2) / c, the training nmse
    total: Tensor  # scalar: what the gradient is of
    parts: Mapping[str, Tensor] = {}  # what else total is made of, by name, each a scalar
    beside: Auxiliary = Auxiliary()
    measured: Mapping[str, Tensor] = {}  # new values of parameters that are not trained


class Worked(NamedTuple):
    """What steps did, summed over them; `selected` and `selected_aux` are (token, latent) pairs."""

    tokens: Count = 0
    selected: Count = 0  # that were active, of all reconstructions of the main losses
    selected_aux: Count = 0  # that were active in a reconstruction by dead latents
    dead: Count = 0  # dead latents that this chose from, summed over tokens
    near: Count = 0  # pairs that were not active, but had a part in the gradient of a threshold

    def plus(self, other: "Worked") -> "Worked":
        return Worked(*(a + b for a, b in zip(self, other, strict=True)))

    def read(self) -> "Worked":
        """In whole numbers."""
        return Worked(*(int(count) for count in self))


class Batch(NamedTuple):
    """Preprocessed activations, shared by the cells of a pack."""

    x: Tensor  # float32 [batch, d_model], minus `origin`
    origin: Tensor  # [d_model], the geometric median of the data: near zero, bfloat16 is finer
    rounded: Tensor  # x in bfloat16, or x itself where no cell needs that
    target: Tensor | None = None  # [batch, d_target], preprocessed, where x_hat is compared with another site

    @classmethod
    def of(cls, x: Tensor, origin: Tensor, bf16: bool, target: Tensor | None = None) -> "Batch":
        """From preprocessed x [batch, d_model]; `bf16`: some cell has operands of that type."""
        centred = x - origin
        return cls(centred, origin, centred.bfloat16() if bf16 else centred, target)


class Conditions(NamedTuple):
    """Under which a step is made, beside the batch."""

    variance: float  # as in State
    dead_after_tokens: int
    progress: float = 0.0  # as in State
    coefficient: float = 0.0  # as in State


class Step(NamedTuple):
    """What one batch gave one cell."""

    main: float  # Losses.main
    parts: Mapping[str, float | Tensor]  # Losses.parts; a scalar on its device where the host did not wait for it
    gradient: Any  # of Losses.total: whatever `FastStep.update` takes
    worked: Worked
    active: float | None = None  # mean number of active latents of a token; needed where the settings are a penalty's
    dense: bool = False  # whether all of it was done in dense products, and `update` does them too


class Update(NamedTuple):
    """What the optimiser has for a parameter at one step (trainers/training/optimiser.py)."""

    moments: Moments
    adam: AdamStep
    unit_rows: bool


class Reconstruction(NamedTuple):
    """What the active latents leave over, for evaluation."""

    error: Tensor  # target - x_hat, float32 [batch, d_model]
    squared: Tensor  # float64 scalar: ||error||^2 over the batch
    active: Tensor  # int64 scalar: latents with z > 0, over all tokens
    dense: bool = False  # as in Step


class Dead(Protocol):
    """For each latent the number of tokens since it was last active (architectures/dead.py)."""

    def update(self, latents: Any) -> None: ...

    def count(self, active: Tensor, tokens: int) -> None: ...

    def after(self, window: int) -> Tensor: ...


class FastStep(Protocol):
    """The sparse path of an architecture: the same losses and gradients without a tensor [batch, n_latents].

    Where nearly all latents are active it may take the dense way, which is then the faster one.

    `params` are float32. `operands` are those of them that `rounded` names, as products take them: bfloat16 copies in
    a bf16 cell, which `update` keeps up to date, else the parameters themselves.
    """

    rounded: frozenset[str]

    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: Any, conditions: Conditions, dead: Dead,
        mesh: Mesh,
    ) -> Step:  # fmt: skip
        """Losses and gradient of a batch, which is counted in `dead`. The host should wait for the device once."""

    def update(
        self, params: Params, operands: Params, gradient: Any, updates: Mapping[str, Update], mesh: Mesh
    ) -> None:
        """One step of the optimiser by that gradient, in place."""

    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        """The forward pass alone."""

    def calibrate(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> None:
        """May be left out: writes to `params` what `Architecture.calibrated` gives."""

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Memory that `measure` and `update` take beside what is held, `batch` and the optimiser's state."""

    def bytes_on_mesh(
        self, shape: Shape, settings: Any, batch: int, layout: Layout, precision: Precision, kernels: KernelKind
    ) -> float:
        """May be left out: `training_bytes` of one of several processes, where that is not the same. `shape` is its
        share, `batch` the whole one."""

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Memory that `reconstruct` takes beside parameters, operands and batch."""


class Architecture(Protocol):
    """What the file of an architecture defines. Shapes: Forward, Shape. Matrices have a row for each latent."""

    Settings: type[Settings]
    step: FastStep | None  # may be left out

    def parameters(self, shape: Shape, settings: Any, centre: Centre, seed: int) -> dict[str, Parameter]:
        """Where training starts, on the CPU, by name (no dots); `centre` is measured on the data, and the caller's."""

    def share(self, shape: Shape, settings: Any, centre: Centre, seed: int, mesh: Mesh) -> dict[str, Parameter]:
        """May be left out, and says that several processes can share a cell: of `parameters` the rows of the latents
        that this process of the mesh holds, without all of them in memory. `step` then asks the mesh for the rest."""

    def forward(self, params: Params, x: Tensor, settings: Any) -> Forward:
        """Of preprocessed x [batch, d_model], in any float dtype. Of a row it gives the same whatever else is in x."""

    def training_forward(self, params: Params, x: Tensor, settings: Any) -> Forward:
        """May be left out: what training has in place of `forward`, where that depends on the whole batch."""

    def calibrated(self, params: Params, x: Tensor, settings: Any) -> Mapping[str, Tensor]:
        """May be left out: averaged parameters, with what is measured with them on the last batch of training."""

    def candidates(self, params: Params, forward: Forward, settings: Any) -> Candidates:
        """May be left out: of what `forward` gave, where pre-activations are not both scores and values."""

    def losses(self, params: Params, forward: Forward, target: Tensor, settings: Any, state: State) -> Losses:
        """Of `forward`; `target` [batch, d_model] is x itself unless the source gives another."""

    def flops(self, shape: Shape, settings: Any, worked: Worked) -> Flops:
        """Training FLOPs of what steps did, in whole numbers: `sparse` of the ideal sparse way, at most `dense`.

        Steps that were dense (Step.dense) are counted by `dense` of both.
        """


# What a file has to define.
_PARTS = ("Settings", "parameters", "forward", "losses", "flops")


def find_architecture(name: str) -> Architecture:
    """The architecture of that name. Raises SaescaleError with the nearest name for an unknown one, and for a file of
    the user's that is not whole."""
    module = ARCHITECTURES.load(name)
    if (problem := _lacks(module)) is not None:
        raise SaescaleError(f"{module.__file__} (architecture) {problem}; README.md of trainers/architectures has one")
    return cast(Architecture, module)


def require_shareable(name: str) -> None:
    """Raises SaescaleError where several processes cannot share a cell of that architecture."""
    if hasattr(find_architecture(name), "share"):
        return
    can = [other for other in ARCHITECTURES.names() if hasattr(find_architecture(other), "share")]
    raise SaescaleError(
        f"{name} trains in one process alone; of the architectures, {', '.join(can)} can be shared by a mesh: leave "
        "resources.mesh out for this one, or take one of those"
    )


@lru_cache(maxsize=1024)
def _lacks(module: ModuleType) -> str | None:
    missing = [name for name in _PARTS if not hasattr(module, name)]
    if missing:
        return f"defines no {', '.join(missing)}: it has to define {', '.join(_PARTS)}"
    kind = module.Settings
    if not (isinstance(kind, type) and issubclass(kind, Settings)):
        return "has Settings that are no architecture.Settings: derive them from that"
    taken = [name for name in kind.model_fields if name != "k" and hasattr(Settings, name)]
    if taken:
        return f"calls a setting {taken[0]}, which is what architecture.Settings calls something else: rename it"
    return None


def unit_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random directions [rows, columns] of norm 1; `generator` is the CPU's, so that a seed means the same anywhere."""
    W = torch.randn(rows, columns, generator=generator)
    return W / W.norm(dim=1, keepdim=True)
