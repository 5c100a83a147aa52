"""A cell: one SAE to train, named by a hash of everything that defines it."""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from saescale.scaling.compute import Flops
from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.precision import Precision

if TYPE_CHECKING:
    from saescale.trainers.architectures.architecture import Settings

# Fields of the cells of saescale 0.1.0 that are settings of TopK now.
_TOPK_ONCE = ("k_aux", "auxk_coefficient", "multi_topk")


# What names a cell beside axes.
_NAMED = {"store", "d_model", "n_latents", "k", "architecture", "settings", "seed"}


class EvalSpec(BaseModel):
    """When and on what nmse is measured."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(default=32_768, gt=0, strict=True)  # held-out rows; part of what a cell is
    every_tokens: int = Field(default=16_384, gt=0, strict=True)  # training tokens between two points; sweeps adapt it


class Cell(BaseModel):
    """One SAE of a sweep: what it is (architecture, settings, n_latents, k, seed) and how it is trained.

    Two cells with the same fields are the same experiment: they share `cell_id`, and a sweep never trains one twice.
    Token counts are numbers of activations (rows of the store), counted with repetition over passes.

    Raises pydantic's ValidationError for an architecture or a setting that there is not, with the nearest name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str  # fingerprint of the activation store
    d_model: int = Field(gt=0)
    n_latents: int = Field(gt=0)
    k: int = Field(gt=0)  # active latents per token
    architecture: str = "topk"
    settings: dict[str, Any] = Field(default={}, validate_default=True)  # the architecture's own, less its defaults
    seed: int = 0  # of the initial weights
    stream_seed: int = 0  # of the order of the data; one for the whole sweep
    tokens: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    lr: float = Field(gt=0)
    dead_after_tokens: int = Field(gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    precision: Precision = "fp32"
    heldout_rows: int | None = Field(default=None, gt=0)  # that nmse is measured on; None: not known, as in 0.1.0

    @model_validator(mode="before")
    @classmethod
    def _as_it_was(cls, fields: Any) -> Any:
        """Takes the fields that cells had in saescale 0.1.0 too."""
        if not isinstance(fields, dict):
            return fields
        once = {name: fields[name] for name in _TOPK_ONCE if name in fields}
        fields = {name: value for name, value in fields.items() if name not in once}
        if "activation" in fields:
            fields["architecture"] = fields.pop("activation")
        return fields | {"settings": fields.get("settings", {}) | once} if once else fields

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_architecture(name)

    @field_validator("settings")
    @classmethod
    def _valid(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "architecture" not in info.data or "k" not in info.data:
            return settings
        whole = whole_settings(info.data["architecture"], info.data["k"], settings)
        return whole.model_dump(mode="json", exclude={"k"}, exclude_defaults=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k > self.n_latents:
            raise ValueError(f"k={self.k} is larger than n_latents={self.n_latents}: an SAE needs k <= n_latents")
        self.whole_settings.check(self.n_latents)
        if self.precision == "bf16" and not traits_of(self.architecture).bf16:
            raise ValueError(f"{self.architecture} has no fast path, which is what bf16 is for: set precision to fp32")
        if self.tokens % self.batch_tokens:
            raise ValueError(f"tokens={self.tokens} is not a multiple of batch_tokens={self.batch_tokens}")
        return self

    @cached_property
    def cell_id(self) -> str:
        """Readable prefix and the first 8 hex digits of the SHA-256 of the fields that differ from their defaults.

        So a new field with a default renames no cell.
        """
        defined = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        digest = hashlib.sha256(defined.encode()).hexdigest()
        return f"n{self.n_latents}-k{self.k}-s{self.seed}-{digest[:8]}"

    def __hash__(self) -> int:
        return hash(self.cell_id)

    @cached_property
    def whole_settings(self) -> "Settings":
        """Of its architecture, with k and all defaults."""
        return whole_settings(self.architecture, self.k, self.settings)

    def __getstate__(self) -> dict[Any, Any]:
        """Without what is cached: the settings of a user's own architecture are of a class that another process has
        only when it loads that file itself."""
        state = super().__getstate__()
        return state | {"__dict__": {name: getattr(self, name) for name in type(self).model_fields}}

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def dead_after_tokens_long(self) -> int:
        """The second, longer window at which dead latents are reported: four times the one that AuxK acts on."""
        return 4 * self.dead_after_tokens

    def flops(self, tokens: int) -> Flops:
        """Training FLOPs to expect of `tokens` tokens, for plans: as if each had its full k and no latent died.

        What results and curves say is counted instead, as the steps did it (Worked).
        """
        from saescale.trainers.architectures.architecture import Shape, Worked, find_architecture

        settings, architecture = self.whole_settings, find_architecture(self.architecture)
        worked = Worked(tokens, settings.pairs_per_token(self.n_latents) * tokens)
        flops = architecture.flops(Shape(self.d_model, self.n_latents), settings, worked)
        by_all = settings.dense_share(self.n_latents) if getattr(architecture, "step", None) else 1.0
        return flops._replace(sparse=round((1 - by_all) * flops.sparse + by_all * flops.dense))


def axes_of(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The fields and settings, beside architecture, n_latents, k and seed, in which cells of one architecture and one
    n_latents over one store differ: what the axes of a sweep are."""
    values: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for cell in cells:
        seen = values.setdefault((cell.architecture, cell.n_latents, cell.store), {})
        for name, value in (cell.model_dump(exclude=_NAMED) | cell.whole_settings.model_dump(exclude={"k"})).items():
            seen.setdefault(name, set()).add(repr(value))
    return tuple(dict.fromkeys(name for seen in values.values() for name, found in seen.items() if len(found) > 1))


def known_architecture(name: str) -> str:
    """`name` as cells spell it. Raises ValueError, with the nearest name, where there is no such architecture."""
    try:
        ARCHITECTURES.check(name)
    except SaescaleError as error:
        given = "; a file of your own is given with --architecture-file" if "unknown" in str(error) else ""
        raise ValueError(f"{error}{given}") from error
    return name.replace("-", "_")


class Traits(NamedTuple):
    settings: tuple[str, ...]  # names of what an architecture can be told beside k
    bf16: bool  # whether it has a fast path, which is what has a precision


def traits_of(architecture: str) -> Traits:
    """What a sweep needs to know of an architecture. Raises SaescaleError for an unknown one."""
    from saescale.trainers.architectures.architecture import find_architecture

    module = find_architecture(architecture)
    return Traits(
        tuple(name for name in module.Settings.model_fields if name != "k"), getattr(module, "step", None) is not None
    )


def require_known(settings: Iterable[str], names: Sequence[str], of: Sequence[str]) -> None:
    """Raises ValueError, with the nearest of the `names` of settings, for one that no architecture in `of` has."""
    for name in settings:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
            raise ValueError(f"{name} is no setting of {' or '.join(of)}: {hint}")


def whole_settings(architecture: str, k: int, settings: Mapping[str, Any]) -> "Settings":
    """An architecture's settings with its defaults. Raises ValueError, in one line, for one that there is not."""
    from saescale.trainers.architectures.architecture import find_architecture

    try:
        model = find_architecture(architecture).Settings
        require_known(settings, sorted(name for name in model.model_fields if name != "k"), [architecture])
        return model(k=k, **settings)
    except SaescaleError as error:
        raise ValueError(str(error)) from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        given = f" (given: {problem['input']!r})"
        raise ValueError(f"setting {where} of {architecture}: {problem['msg']}{given}") from error


def auto_k_aux(d_model: int) -> int:
    """The power of two nearest to d_model / 2 in ratio: 512 at d_model 768.

    Gao et al. 2024, appendix A.2, take a power of two close to d_model / 2; their code has 256 at d_model 768.
    """
    return 2 ** round(math.log2(d_model / 2))
