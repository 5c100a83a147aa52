"""The grid of a sweep file: which SAEs there are to be, by size, sparsity, architecture and seed."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from saescale.cluster.crew.claims import Section
from saescale.cluster.sweep.axes import Axis, several
from saescale.cluster.sweep.train import Count, Seed
from saescale.storage.columns import OLD_NAMES
from saescale.trainers.cell import known_architecture

MOST_CELLS = 100_000  # of a grid; a sweep of ten times fewer is the largest that was tried


def is_recorded(info: ValidationInfo) -> bool:
    """Whether what is read is a sweep that ran, which was checked then."""
    return bool(info.context) and "recorded" in (info.context or {})


def _known_or_recorded(name: str, info: ValidationInfo) -> str:
    """A sweep that ran can be read where an architecture of the user's own is not at hand."""
    return name if name in (info.context or {}).get("recorded", ()) else known_architecture(name)


Architecture = Annotated[str, AfterValidator(_known_or_recorded)]


class _OldNames(Section):
    """Takes `activation` for `architecture`, as sweep files had it in saescale 0.1.0."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "activation" in fields and "architecture" not in fields:
            return {OLD_NAMES.get(name, name): value for name, value in fields.items()}
        return fields


class Combination(NamedTuple):
    """What a cell of the grid is, in the order in which cells are listed."""

    n_latents: int
    k: int
    architecture: str
    seed: int


class GridCell(_OldNames):
    """One n and k, with a cell for each seed; `train` is what it has otherwise than the sweep, with the same keys."""

    n_latents: Count
    k: Count
    architecture: Architecture = "topk"
    seed: Axis[Seed] = Field(default=[0])
    train: dict[str, Any] = Field(default={})

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "train" or value}


class Grid(_OldNames):
    """Every combination of the lists is a cell, and so is each of `cells` (such as `saescale plan` proposes)."""

    n_latents: Axis[Count] = Field(default=[])
    k: Axis[Count] = Field(default=[])
    architecture: Axis[Architecture] = Field(default=["topk"])
    seed: Axis[Seed] = Field(default=[0])
    cells: list[GridCell] = Field(default=[], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.cells or self.n_latents or self.k:
            for name in ("n_latents", "k"):
                if not getattr(self, name):
                    raise ValueError(f"{name} is missing")
        # Counted before they are made.
        lists = (self.n_latents, self.k, self.architecture, self.seed)
        require_few(math.prod(len(several(each)) for each in lists) + sum(len(several(c.seed)) for c in self.cells))
        for n_latents, k, _, _ in self.combinations():
            if k > n_latents:
                raise ValueError(
                    f"k = {k} is larger than n_latents = {n_latents}; an SAE needs k <= n_latents: remove one of them"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A grid of lists is written as it always was, and a grid of cells can be read again.
        return {key: several(value) for key, value in handler(self).items() if value}

    def combinations(self) -> list[Combination]:
        """All of them, each once, by n_latents, k, architecture and seed; axes of `train` make several cells of one."""
        return sorted({combination for combination, _ in self.asked()})

    def asked(self) -> Iterator[tuple[Combination, Mapping[str, Any]]]:
        """All combinations as they are asked for, with what their training has otherwise than the sweep's."""
        lists = (self.n_latents, self.k, self.architecture, self.seed)
        for chosen in itertools.product(*map(several, lists)):
            yield Combination._make(chosen), {}
        for cell in self.cells:
            for seed in several(cell.seed):
                yield Combination(cell.n_latents, cell.k, cell.architecture, seed), cell.train

    @property
    def architectures(self) -> list[str]:
        """Those of all cells."""
        listed = several(self.architecture) if self.n_latents else []
        return sorted({*listed, *(cell.architecture for cell in self.cells)})


def require_few(many: int) -> None:
    """Raises ValueError where a sweep has too many cells to be one."""
    if many > MOST_CELLS:
        raise ValueError(f"{many:,} cells are more than the {MOST_CELLS:,} of a sweep: shorten its lists")
