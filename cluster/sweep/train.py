"""The section `train` of a sweep file: how cells are trained, and which ways of training its axes make."""

import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from saescale.cluster.crew.claims import NotNegative, Positive, Section
from saescale.cluster.sweep.axes import Axis, count, has_lists, several, singles
from saescale.cluster.sweep.settings import defaults, resolve_settings
from saescale.storage.mistakes import problems
from saescale.trainers.precision import Precision

LARGEST = 2**62  # of what is counted, and of seeds: tables hold 64 bits

Count = Annotated[Positive, Field(le=LARGEST)]
Seed = Annotated[NotNegative, Field(le=LARGEST)]


def _no_truth_value(given: Any) -> Any:
    """`true` is no number, though Python has it as 1."""
    if isinstance(given, bool):
        raise ValueError("input should be a number, not true or false")
    return given


Real = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
Factor = Annotated[Real, Field(gt=0)]
Exponent = Real


class TokenLaw(Section):
    """tokens (n / at)^exponent, rounded to whole batches: larger SAEs need more tokens to converge (about n^0.6)."""

    at: Axis[Count]
    tokens: Axis[Factor]
    exponent: Axis[Exponent]


class RateLaw(Section):
    """value (n / at)^exponent: 2e-4 (n / 2^14)^-0.5 is the rule that others took from Gao et al. 2024, figure 3."""

    at: Axis[Count]
    value: Axis[Factor]
    exponent: Axis[Exponent] = -0.5


class AuxK(Section):
    """The auxiliary loss that revives dead latents; `k: 0` switches it off."""

    k: Axis[NotNegative | Literal["auto"]] = "auto"  # auto: the power of two nearest to d_model / 2
    coefficient: Axis[Annotated[Real, Field(ge=0)]] = 1 / 32
    # Counted for every architecture, also for those that do nothing about dead latents.
    dead_after_tokens: Axis[Count] = 10_000_000


class Way(NamedTuple):
    """One way of training, without an axis."""

    tokens: int | TokenLaw
    batch_tokens: int
    lr: float | RateLaw
    ema: float
    dead_after_tokens: int
    stream_seed: int
    settings: str  # of the architecture less its defaults, JSON with sorted keys; k_aux may be "auto" there

    def tokens_at(self, n_latents: int) -> int:
        """Training tokens of a cell of that size."""
        return _tokens_at(self.tokens, self.batch_tokens, n_latents)

    def rate_at(self, n_latents: int) -> float:
        """Learning rate of a cell of that size."""
        return _rate_at(self.lr, n_latents)


class Train(Section):
    """How each cell is trained; the defaults are the paper's (Gao et al. 2024).

    A number may be a list, and each of its values makes cells. Of `auxk`, `multi_topk` and `settings` each architecture
    takes what it has a setting for (settings.py).
    """

    tokens: Axis[Count | TokenLaw]
    batch_tokens: Axis[Count] = 131_072
    lr: Axis[Factor | RateLaw] = RateLaw(at=16_384, value=2e-4)
    auxk: AuxK = AuxK()
    multi_topk: Axis[bool] = False
    settings: dict[str, Any] = Field(default={})  # of architectures' own; below an architecture's name, of that alone
    ema: Axis[Annotated[Real, Field(ge=0, lt=1)]] = 0.999
    precision: Literal["auto"] | Precision = "auto"  # of the encoder product; auto: crew/precision.py
    stream_seed: Axis[Seed] = 0  # of the order of the data

    @model_validator(mode="after")
    def _check(self) -> Self:
        for tokens, batch in itertools.product(several(self.tokens), several(self.batch_tokens)):
            if isinstance(tokens, int) and tokens % batch:
                raise ValueError(f"tokens = {tokens} is not a multiple of batch_tokens = {batch}")
        return self

    def count(self, architecture: str, architectures: list[str]) -> int:
        """How many `ways` there are, before they are made. Raises as `ways` does."""
        numbers = math.prod(map(count, self._numbers()))
        if not self.settings and not any(map(has_lists, self._general().values())):
            return numbers  # without loading an architecture, and torch
        return numbers * math.prod(map(len, self._settings(architecture, architectures).values()))

    def ways(self, architecture: str, architectures: list[str]) -> list[Way]:
        """All ways of training an architecture, which is one of `architectures`, in the order of the lists.

        Raises ValueError, in one line, for settings that they cannot have.
        """
        settings = self._settings(architecture, architectures)
        chosen = [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]
        # Without AuxK its coefficient is no axis.
        first = settings.get("auxk_coefficient", [None])[0]
        chosen = [own for own in chosen if own.get("k_aux") != 0 or own.get("auxk_coefficient") == first]
        default = defaults(architecture)
        texts = [_text({name: value for name, value in own.items() if value != default[name]}) for own in chosen]
        return [Way._make((*each, own)) for each in itertools.product(*map(singles, self._numbers())) for own in texts]

    def _numbers(self) -> tuple[Any, ...]:
        """The fields of Way that all architectures have."""
        return self.tokens, self.batch_tokens, self.lr, self.ema, self.auxk.dead_after_tokens, self.stream_seed

    def _settings(self, architecture: str, architectures: list[str]) -> dict[str, list[Any]]:
        """The values of each setting of the architecture that is asked for."""
        return resolve_settings(self.settings, self._general(), architecture, architectures)

    def without_taker(self, architectures: Collection[str]) -> list[str]:
        """What is asked for that none of the architectures can be told, such as `multi_topk = True`."""
        asked = {"k_aux": "auxk.k", "auxk_coefficient": "auxk.coefficient", "multi_topk": "multi_topk"}
        usual = Train(tokens=1, batch_tokens=1)._general()
        # To have none of it is what those do that have no such setting.
        told = {name: value for name, value in self._general().items() if value not in (usual[name], 0, False)}
        there = {name for architecture in architectures for name in defaults(architecture)} if told else set()
        return [f"train.{asked[name]} = {value}" for name, value in told.items() if name not in there]

    def _general(self) -> dict[str, Any]:
        """What other keys say of settings that several architectures have."""
        return {"k_aux": self.auxk.k, "auxk_coefficient": self.auxk.coefficient, "multi_topk": self.multi_topk}

    def check_laws(self, sizes: Collection[int]) -> None:
        """Raises ValueError where a law gives no number that can be written down at one of the `sizes`."""
        budgets = itertools.product(singles(self.tokens), several(self.batch_tokens))
        laws: list[tuple[str, Callable[[int], float]]] = [
            *(("tokens", partial(_tokens_at, *each)) for each in budgets),
            *(("lr", partial(_rate_at, rate)) for rate in singles(self.lr)),
        ]
        for name, law in laws:
            for n_latents in sizes:
                try:
                    found = law(n_latents)
                except (OverflowError, ValueError):
                    found = math.inf
                if not 0 < found <= LARGEST:
                    raise ValueError(f"train.{name} is out of range at n_latents = {n_latents}: correct its exponent")

    def most_tokens(self, sizes: Collection[int]) -> int:
        """Those of the longest training."""
        each = itertools.product(singles(self.tokens), several(self.batch_tokens), sizes)
        return max(_tokens_at(*one) for one in each)

    def with_own(self, own: Mapping[str, Any]) -> "Train":
        """This way of training with some keys of its own, as a cell of `grid.cells` may have them.

        Raises ValueError, in one line.
        """
        document = _merged(self.model_dump(mode="json"), own)
        try:
            return Train.model_validate(document)
        except ValidationError as error:
            raise ValueError("; ".join(problems(error, Train, "train"))) from error


def _merged(there: Mapping[str, Any], own: Mapping[str, Any], within: bool = False) -> dict[str, Any]:
    """`own` over `there`. Sections that are a set of numbers are merged; a law of tokens or rates is one number."""
    merged = {**there}
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(there.get(key), Mapping)
        sets = within or key in ("auxk", "settings")
        merged[key] = _merged(there[key], value, within=True) if both and sets else value
    return merged


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _tokens_at(tokens: int | TokenLaw, batch: int, n_latents: int) -> int:
    return tokens if isinstance(tokens, int) else batch * max(1, round(_law(tokens.tokens, tokens, n_latents) / batch))


def _rate_at(rate: float | RateLaw, n_latents: int) -> float:
    return rate if isinstance(rate, float) else _law(rate.value, rate, n_latents)


def _law(value: Any, law: Any, n_latents: int) -> float:
    return float(value * math.pow(n_latents / law.at, law.exponent))
