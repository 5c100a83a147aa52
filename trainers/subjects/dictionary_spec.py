"""What a known dictionary is made of: its features, how often and with what others they fire, and their directions.

The parts are those of SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687). Features are numbered from the
most frequent to the rarest. The defaults are a dictionary for a laptop.
"""

import json
import math
from typing import Annotated, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saescale.storage.documents import read_yaml
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.mistakes import problems

GENERATION = 1  # of what draws from a spec; another one would give other activations

Count = Annotated[int, Field(strict=True, ge=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Frequencies(_Part):
    """Feature r = 1, 2 ... is to fire with a probability that falls as r^-exponent from `highest` to `lowest`."""

    exponent: float = Field(default=0.5, gt=0)
    highest: Probability = 0.25
    lowest: Probability = 0.002

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lowest > self.highest:
            raise ValueError(f"lowest, {self.lowest:g}, is above highest, {self.highest:g}")
        return self


class Hierarchy(_Part):
    """Trees: the `roots` most frequent features have `branching` children each, these as many again, `depth` levels.

    A child fires only where its parent does; it is drawn with as much more probability as brings it near its frequency.
    Of `exclusive` siblings one at most fires; a `scaled` child's magnitude is multiplied by its parent's, over the
    parent's mean.
    """

    roots: Count = 16
    branching: int = Field(default=4, strict=True, ge=2)
    depth: int = Field(default=2, strict=True, ge=1, le=12)
    exclusive: bool = Field(default=True, strict=True)
    scaled: bool = Field(default=True, strict=True)

    def levels(self) -> list[int]:
        """How many features each level has, roots first."""
        return [self.roots * self.branching**level for level in range(self.depth + 1)]


class Correlations(_Part):
    """Features fire together by a Gaussian copula: `rank` common factors, with weights normal(0, scale)."""

    rank: Count = 8
    scale: float = Field(default=0.1, gt=0)


class Magnitudes(_Part):
    """A feature that fires has the magnitude |normal(mean, spread)|: its mean falls in a line from `first`, of the most
    frequent one, to `last`; its spread is |normal(spread, spread_deviation)|, drawn once."""

    first: float = Field(default=5.0, gt=0)
    last: float = Field(default=4.0, gt=0)
    spread: float = Field(default=0.5, ge=0)
    spread_deviation: float = Field(default=0.5, ge=0)


class DictionarySpec(_Part):
    """`features` unit directions in `d_model` dimensions; random ones, or with `coherence` such that no two have a
    larger |cosine|. `noise` is the standard deviation of what is added to every entry of an activation."""

    features: int = Field(default=1024, strict=True, ge=1, le=2**20)
    d_model: int = Field(default=128, strict=True, ge=2, le=2**16)
    frequencies: Frequencies = Frequencies()
    hierarchy: Hierarchy | None = Hierarchy()
    correlations: Correlations | None = Correlations()
    magnitudes: Magnitudes = Magnitudes()
    coherence: float | None = Field(default=None, gt=0, lt=1)
    noise: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, strict=True, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hierarchy and (needed := sum(self.hierarchy.levels())) > self.features:
            raise ValueError(
                f"hierarchy: {self.hierarchy.roots} roots with {self.hierarchy.branching} children each to depth "
                f"{self.hierarchy.depth} are {needed:,} features, and there are {self.features:,}"
            )
        if self.correlations and self.correlations.rank * self.correlations.scale**2 > 0.5:
            raise ValueError(
                "correlations: rank * scale^2 has to be at most 0.5, or common factors leave a feature nothing of its "
                f"own; it is {self.correlations.rank * self.correlations.scale**2:.3g}"
            )
        if self.coherence is not None and self.coherence < (bound := welch(self.features, self.d_model)):
            raise ValueError(
                f"coherence: {self.features:,} directions in {self.d_model} dimensions have a |cosine| of at least "
                f"{bound:.3g} among them (Welch's bound), not {self.coherence:g}"
            )
        return self

    def fingerprint(self) -> str:
        """The same for every spec that gives the same activations."""
        text = json.dumps([GENERATION, self.model_dump(mode="json")], sort_keys=True)
        return f"xxh3-128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def welch(features: int, d_model: int) -> float:
    """The least that the largest |cosine| among so many directions can be (Welch 1974)."""
    return math.sqrt(max(0.0, features - d_model) / (d_model * max(1, features - 1)))


def read_spec(where: str) -> DictionarySpec:
    """The spec in a YAML file, of this machine or any fsspec URL. Raises SaescaleError with the keys that are wrong."""
    what = f"the dictionary {where}"
    try:
        found = read_yaml(where)
    except FileNotFoundError as error:
        raise SaescaleError(
            f"there is no {where}; a dictionary is a YAML file with features, d_model ... (dictionary:my.yaml), or "
            "`dictionary` alone"
        ) from error
    except OSError as error:
        raise SaescaleError(f"{what} cannot be read ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise SaescaleError(f"{what} holds no keys; write features: 1024, d_model: 128 and so on")
    try:
        return DictionarySpec.model_validate(found)
    except ValidationError as error:
        raise SaescaleError(f"{what}: {'; '.join(problems(error, DictionarySpec, 'the spec'))}; correct it") from error
