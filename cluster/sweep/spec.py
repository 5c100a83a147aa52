"""The sweep file: a grid of cells over one or several stores, validated with the path of what is wrong."""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib.metadata import version
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from saescale.cluster.crew.claims import NotNegative, Positive, Resources, Section
from saescale.storage.columns import OLD_NAMES
from saescale.storage.documents import read_yaml
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.files import folders_like
from saescale.storage.secrets import ADVICE, names_secret, secret_in_url
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec, auto_k_aux, check_settings, known_architecture, traits_of
from saescale.trainers.loggers.wandb_cells import WandbSettings
from saescale.trainers.precision import Precision

# What a sweep file says where nobody has named a store yet: to be edited.
NO_STORE = "stores/STORE"
MOST_CELLS = 100_000  # of a grid; a sweep of ten times fewer is the largest that was tried
_LARGEST = 2**62  # of what is counted, and of seeds: tables hold 64 bits

_POINTS = 50  # of a curve

# As people write numbers, which YAML takes for text.
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:[,_ ' ]\d{3})+")
_MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9}

# Of a problem whose input must not be repeated.
_SECRET = "secret"


Architecture = Annotated[str, AfterValidator(known_architecture)]
Count = Annotated[Positive, Field(le=_LARGEST)]
Seed = Annotated[NotNegative, Field(le=_LARGEST)]


class _OldNames(Section):
    """Takes `activation` for `architecture`, as sweep files had it in saescale 0.1.0."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "activation" in fields and "architecture" not in fields:
            return {OLD_NAMES.get(name, name): value for name, value in fields.items()}
        return fields


class GridCell(_OldNames):
    """One n and k, with a cell for each seed."""

    n_latents: Count
    k: Count
    architecture: Architecture = "topk"
    seed: list[Seed] = Field(default=[0], min_length=1)


class Combination(NamedTuple):
    """What a cell of the grid is, in the order in which cells are listed."""

    n_latents: int
    k: int
    architecture: str
    seed: int


class Grid(_OldNames):
    """Every combination of the lists is a cell, and so is each of `cells` (such as `saescale plan` proposes)."""

    n_latents: list[Count] = Field(default=[], min_length=1)
    k: list[Count] = Field(default=[], min_length=1)
    architecture: list[Architecture] = Field(default=["topk"], min_length=1)
    seed: list[Seed] = Field(default=[0], min_length=1)
    cells: list[GridCell] = Field(default=[], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.cells or self.n_latents or self.k:
            for name in ("n_latents", "k"):
                if not getattr(self, name):
                    raise ValueError(f"{name} is missing")
        # Counted before they are made.
        many = len(self.n_latents) * len(self.k) * len(self.architecture) * len(self.seed)
        many += sum(len(cell.seed) for cell in self.cells)
        if many > MOST_CELLS:
            raise ValueError(f"{many:,} cells are more than the {MOST_CELLS:,} of a sweep: shorten its lists")
        for n_latents, k, _, _ in self.combinations():
            if k > n_latents:
                raise ValueError(
                    f"k = {k} is larger than n_latents = {n_latents}; an SAE needs k <= n_latents: remove one of them"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A grid of lists is written as it always was, and a grid of cells can be read again.
        return {key: value for key, value in handler(self).items() if value}

    def combinations(self) -> list[Combination]:
        """All cells, each once, by n_latents, k, architecture and seed."""
        found = {Combination(*c) for c in itertools.product(self.n_latents, self.k, self.architecture, self.seed)}
        found |= {Combination(c.n_latents, c.k, c.architecture, seed) for c in self.cells for seed in c.seed}
        return sorted(found)

    @property
    def architectures(self) -> list[str]:
        """Those of all cells."""
        return sorted({c.architecture for c in self.combinations()})

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self.combinations())


class TokenLaw(Section):
    """tokens (n / at)^exponent, rounded to whole batches: larger SAEs need more tokens to converge (about n^0.6)."""

    at: Count
    tokens: float = Field(gt=0, allow_inf_nan=False)
    exponent: float = Field(allow_inf_nan=False)


class RateLaw(Section):
    """value (n / at)^exponent: 2e-4 (n / 2^14)^-0.5 is the rule that others took from Gao et al. 2024, figure 3."""

    at: Count
    value: float = Field(gt=0, allow_inf_nan=False)
    exponent: float = Field(default=-0.5, allow_inf_nan=False)


class AuxK(Section):
    """The auxiliary loss that revives dead latents; `k: 0` switches it off."""

    k: NotNegative | Literal["auto"] = "auto"  # auto: the power of two nearest to d_model / 2
    coefficient: float = Field(default=1 / 32, ge=0, allow_inf_nan=False)
    dead_after_tokens: Count = 10_000_000


class Train(Section):
    """How each cell is trained; the defaults are the paper's (Gao et al. 2024).

    Of `auxk`, `multi_topk` and `settings` each architecture takes what it has a setting for.
    """

    tokens: Count | TokenLaw
    batch_tokens: Count = 131_072
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | RateLaw = RateLaw(at=16_384, value=2e-4)
    auxk: AuxK = AuxK()
    multi_topk: bool = False
    settings: dict[str, Any] = Field(default={})  # of an architecture's own
    ema: float = Field(default=0.999, ge=0, lt=1)
    precision: Literal["auto"] | Precision = "auto"  # of the encoder product; auto: crew/precision.py
    stream_seed: Seed = 0  # of the order of the data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.tokens, int) and self.tokens % self.batch_tokens:
            raise ValueError(f"tokens = {self.tokens} is not a multiple of batch_tokens = {self.batch_tokens}")
        return self


class SweepSpec(Section):
    """The whole sweep file."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.-]+$")  # W&B takes no longer one for a group
    store: str | list[str]  # URL of the activation store, or of several
    out: str  # URL of the run directory
    grid: Grid
    train: Train
    eval: EvalSpec = EvalSpec()
    resources: Resources = Resources()
    wandb: WandbSettings = WandbSettings()
    # What a run's sweep.yaml says besides; allowed here so that it can be swept again as it is, and not used.
    resolved: dict[str, Any] = Field(default={}, exclude=True)

    @field_validator("store", "out")
    @classmethod
    def _without_secrets(cls, given: str | list[str]) -> str | list[str]:
        for url in [given] if isinstance(given, str) else given:
            if found := secret_in_url(url):
                raise PydanticCustomError(_SECRET, "{found}; {advice}", {"found": found, "advice": ADVICE})
        return given

    @field_validator("store")
    @classmethod
    def _each_once(cls, given: str | list[str]) -> str | list[str]:
        """A list of one is that one."""
        if isinstance(given, str):
            return given
        if not given:
            raise ValueError("name one store at least")
        if twice := [url for url in given if given.count(url) > 1]:
            raise ValueError(f"{twice[0]} stands there {given.count(twice[0])} times: name each store once")
        return given if len(given) > 1 else given[0]

    @model_validator(mode="after")
    def _has_not_too_many(self) -> Self:
        if self.size > MOST_CELLS:
            raise ValueError(
                f"{self.size:,} cells, {self.grid.size:,} over each of {len(self.stores)} stores, are more than the "
                f"{MOST_CELLS:,} of a sweep: name fewer stores"
            )
        return self

    @model_validator(mode="after")
    def _laws_are_in_range(self) -> Self:
        """That each size has a number of tokens and a rate that can be written down."""
        for n_latents in {cell.n_latents for cell in self.grid.combinations()}:
            for name, of in (("tokens", self.tokens_of), ("lr", self.rate_of)):
                try:
                    found = of(n_latents)
                except (OverflowError, ValueError):
                    found = math.inf
                if not 0 < found <= _LARGEST:
                    raise ValueError(f"train.{name} is out of range at n_latents = {n_latents}: correct its exponent")
        return self

    @model_validator(mode="after")
    def _evaluates_at_times(self) -> Self:
        """Where nobody said how often: about 50 points of the longest curve, and never more than one a step."""
        if "every_tokens" not in self.eval.model_fields_set:
            batch = self.train.batch_tokens
            longest = max(self.tokens_of(cell.n_latents) for cell in self.grid.combinations())
            every = batch * -(-longest // (_POINTS * batch))
            self.eval = self.eval.model_copy(update={"every_tokens": every})
        return self

    @model_validator(mode="after")
    def _settings_are_known(self) -> Self:
        """Before anything is harvested or trained. Loads architectures, and torch, only where there is need."""
        if self.train.settings:
            check_settings(self.grid.architectures, self.train.settings)
        return self

    @property
    def stores(self) -> list[str]:
        """The URLs of all stores."""
        return [self.store] if isinstance(self.store, str) else self.store

    @property
    def size(self) -> int:
        """Number of cells: the grid over each store."""
        return self.grid.size * len(self.stores)

    def cells(self, store: ActivationStore, precision: Precision) -> list[Cell]:
        """The grid over `store`, one of the sweep's; `precision` is what `train.precision: auto` means here.

        An architecture without a fast path works in fp32 whatever is asked for.
        """
        grid, train = self.grid, self.train
        asked = {
            "k_aux": auto_k_aux(store.d_model) if train.auxk.k == "auto" else train.auxk.k,
            "auxk_coefficient": train.auxk.coefficient,
            "multi_topk": train.multi_topk,
        } | train.settings
        traits = {name: traits_of(name) for name in grid.architectures}
        wanted = precision if train.precision == "auto" else train.precision
        return [
            Cell(
                store=store.fingerprint,
                d_model=store.d_model,
                n_latents=n_latents,
                k=k,
                architecture=architecture,
                settings={name: asked[name] for name in traits[architecture].settings if name in asked},
                seed=seed,
                stream_seed=train.stream_seed,
                tokens=self.tokens_of(n_latents),
                batch_tokens=train.batch_tokens,
                lr=self.rate_of(n_latents),
                dead_after_tokens=train.auxk.dead_after_tokens,
                ema=train.ema,
                heldout_rows=self.eval.tokens,
                precision=wanted if traits[architecture].bf16 else "fp32",
            )
            for n_latents, k, architecture, seed in grid.combinations()
        ]

    def tokens_of(self, n_latents: int) -> int:
        """Training tokens of a cell of that size."""
        tokens, batch = self.train.tokens, self.train.batch_tokens
        if isinstance(tokens, int):
            return tokens
        return batch * max(1, round(_law(tokens.tokens, tokens, n_latents) / batch))

    def rate_of(self, n_latents: int) -> float:
        """Learning rate of a cell of that size."""
        lr = self.train.lr
        return lr if isinstance(lr, float) else _law(lr.value, lr, n_latents)


def _law(value: float, law: TokenLaw | RateLaw, n_latents: int) -> float:
    return value * math.pow(n_latents / law.at, law.exponent)


def load_spec(url: str, out: str | None = None, wandb: str | None = None) -> SweepSpec:
    """Reads a sweep file (YAML). `out` and `wandb` replace the file's run directory and W&B mode; of each `*` in
    `store` there are the stores that it stands for.

    Raises SaescaleError that names the file, the path of the wrong key and the nearest valid name.
    """
    try:
        document = read_yaml(url)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no sweep file at {url}; deploy/sweeps holds examples") from error
    if not isinstance(document, dict):
        raise SaescaleError(f"{url} holds no sweep: it should have the keys {', '.join(SweepSpec.model_fields)}")
    if out:
        document["out"] = out
    if wandb:
        section = document.get("wandb")
        document["wandb"] = (section if isinstance(section, dict) else {}) | {"mode": wandb}
    return parse_spec(named_stores(document, url), url)


def named_stores(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sweep file `document` with the stores that the `*` in its `store` stand for, by the numbers in their names:
    layers in order.

    Every folder counts: one without a finished harvest is told as such, and not passed over. Raises SaescaleError
    where there is none.
    """
    given, named = document.get("store"), []
    for one in given if isinstance(given, list) else [given]:
        if not isinstance(one, str) or "*" not in one or secret_in_url(one):
            named.append(one)
        elif found := folders_like(one):
            named += found
        else:
            raise SaescaleError(f"{where}: store: there is no folder like {one}; harvest first, or correct the pattern")
    store = named if isinstance(given, list) or len(named) > 1 else named[0]
    return {**document, **({"store": store} if "store" in document else {})}


def parse_spec(document: Mapping[str, Any], where: str) -> SweepSpec:
    """Validates a sweep given as a mapping; `where` names it in errors."""
    try:
        return SweepSpec.model_validate(document)
    except ValidationError as error:
        raise SaescaleError(f"{where}: {'; '.join(_problems(error))}") from error


def parse_recorded(document: Mapping[str, Any], where: str) -> SweepSpec:
    """The sweep that a run's sweep.yaml records, but for where it was logged, which need not be valid any more.

    Raises Damaged, which says what wrote it, where it is none.
    """
    try:
        return parse_spec({key: value for key, value in document.items() if key != "wandb"}, where)
    except SaescaleError as error:
        resolved = document.get("resolved")
        versions = resolved.get("versions") if isinstance(resolved, dict) else None
        by = versions.get("saescale") if isinstance(versions, dict) else None
        raise Damaged(
            f"{error}: it is damaged, or of another version (saescale {by or 'unknown'} wrote it, this is "
            f"{version('saescale')}); restore it, or remove it and run the same sweep again, which keeps what is done",
            where,
        ) from error


def _problems(error: ValidationError) -> list[str]:
    """One phrase for each wrong key, without the repetition that unions bring."""
    phrases: dict[str, str] = {}
    for problem in error.errors():
        # The last part of a union's location names the member that did not fit, which no user wrote.
        path = [part for part in problem["loc"] if isinstance(part, int) or part in _KEYS]
        wrong = [part for part in problem["loc"] if problem["type"] == "extra_forbidden"][-1:]
        name = ".".join(str(part) for part in [*path, *(part for part in wrong if part not in path)]) or "the sweep"
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(wrong[0]), _fields(problem["loc"][:-1]), n=1, cutoff=0.5)
            hint = f", did you mean {close[0]}?" if close else f", valid are {', '.join(_fields(problem['loc'][:-1]))}"
            if not close and names_secret(str(wrong[0])):
                hint = f"; {ADVICE}"
            phrases.setdefault(name, f"{name} is not a key{hint}")
        elif problem["type"] == "missing":
            phrases.setdefault(name, f"{name} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            echoed = problem["type"] != _SECRET and isinstance(given, str | int | float | bool | None)
            shown = f" (given: {given!r}){_plainer(problem['type'], given)}" if echoed else ""
            begun = message[0].lower() if message[1:2].islower() else message[:1]  # W&B stays as it is called
            phrases.setdefault(name, f"{name}: {begun}{message[1:]}{shown}")
    return list(phrases.values())


def _plainer(kind: str, given: Any) -> str:
    """How a number is written that somebody wrote in a way which YAML or the key does not take; "" where it is none."""
    text = str(given).strip()
    if not kind.startswith(("int_", "float_")) or isinstance(given, bool):
        return ""
    if _THOUSANDS.fullmatch(text):
        text = re.sub(r"\D", "", text)
    elif kind.startswith("float_"):
        text = text.replace(",", ".", 1)
    multiple = _MULTIPLES.get(text[-1:].lower(), 1)
    try:
        value = Decimal(text if multiple == 1 else text[:-1].rstrip()) * multiple
    except ArithmeticError:
        return ""
    if not value.is_finite() or abs(value.adjusted()) > 18 or (kind.startswith("int_") and value % 1):
        return ""
    written = f"{value:.0f}" if kind.startswith("int_") else f"{value:f}"
    return f"; YAML reads that as {'text' if isinstance(given, str) else 'a fraction'}: write {written}"


def _fields(location: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at `location`."""
    model: type[BaseModel] = SweepSpec
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def _all_keys(model: type[BaseModel]) -> set[str]:
    keys = set(model.model_fields)
    for name in model.model_fields:
        inner = _fields([name]) if model is SweepSpec else []
        keys |= set(inner)
    return keys


_KEYS = _all_keys(SweepSpec) | {name for law in (GridCell, TokenLaw, RateLaw, AuxK) for name in law.model_fields}
