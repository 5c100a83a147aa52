"""The sweep file: a grid of cells over one or several stores, validated with the path of what is wrong."""

import json
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Annotated, Any, Protocol, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from saescale.cluster.crew.claims import Resources, Section
from saescale.cluster.sweep.axes import Axis, has_lists, several
from saescale.cluster.sweep.grid import Combination, Grid, is_recorded, require_few
from saescale.cluster.sweep.planned import Planned
from saescale.cluster.sweep.train import Train
from saescale.storage.documents import read_yaml
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.files import folders_like
from saescale.storage.mistakes import SECRET, problems
from saescale.storage.secrets import ADVICE, secret_in_url
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.own import not_here
from saescale.trainers.cell import Cell, EvalSpec, auto_k_aux, traits_of
from saescale.trainers.evals.wanted import Wanted, each_once
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.loggers.wandb_cells import WandbSettings
from saescale.trainers.precision import Precision

# What a sweep file says where nobody has named a store yet: to be edited.
NO_STORE = "stores/STORE"

_POINTS = 50  # of a curve


class Evals(EvalSpec):
    """When nmse is measured, and what is measured on each cell when all are trained (trainers/evals).

    `eval: [core, downstream_loss]` is short for the latter alone.
    """

    evaluations: list[Wanted] = Field(default=[Wanted(evaluation="core")])

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        return {"evaluations": fields} if isinstance(fields, list) else fields

    @field_validator("evaluations")
    @classmethod
    def _known(cls, entries: list[Wanted], info: ValidationInfo) -> list[Wanted]:
        try:
            if not is_recorded(info):
                for entry in entries:
                    entry.check()
            return each_once(entries)
        except SaescaleError as error:
            raise ValueError(str(error)) from error


class OfStore(Protocol):
    """What cells take of a store."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def d_model(self) -> int: ...


class Live(Section):
    """A source that is harvested while the sweep streams from it."""

    live: LiveSpec


Store = Annotated[
    Annotated[str, Tag("a URL")] | Annotated[Live, Tag("a live source")],
    Discriminator(lambda given: "a live source" if isinstance(given, Mapping | Live) else "a URL"),
]


class SweepSpec(Section):
    """The whole sweep file."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.-]+$")  # W&B takes no longer one for a group
    store: Axis[Store]  # URL of the activation store, or a live source, or several
    out: str  # URL of the run directory
    grid: Grid
    train: Train
    eval: Evals = Evals()
    resources: Resources = Resources()
    wandb: WandbSettings = WandbSettings()
    # What a run's sweep.yaml says besides; allowed here so that it can be swept again as it is, and not used.
    resolved: dict[str, Any] = Field(default={}, exclude=True)

    @field_validator("store", "out")
    @classmethod
    def _without_secrets(cls, given: Any) -> Any:
        for url in several(given):
            if isinstance(url, str) and (found := secret_in_url(url)):
                raise PydanticCustomError(SECRET, "{found}; {advice}", {"found": found, "advice": ADVICE})
        return given

    @field_validator("store")
    @classmethod
    def _each_once(cls, given: Any) -> Any:
        """A list of one is that one."""
        if not isinstance(given, list):
            return given
        if twice := [url for url in given if given.count(url) > 1]:
            name = twice[0] if isinstance(twice[0], str) else f"a live source of {twice[0].live.subject}"
            raise ValueError(f"{name} stands there {given.count(twice[0])} times: name each store once")
        return given if len(given) > 1 else given[0]

    @model_validator(mode="after")
    def _blocks_have_a_place(self) -> Self:
        """Beside the run, where no folder is named: sweep.yaml is to say it."""

        def placed(entry: str | Live) -> str | Live:
            if isinstance(entry, str) or entry.live.folder is not None:
                return entry
            folder = entry.live.folder_of(self.out)
            return Live(live=entry.live.model_copy(update={"folder": folder}))

        if any(isinstance(entry, Live) for entry in several(self.store)):
            given = self.store
            self.store = [placed(entry) for entry in given] if isinstance(given, list) else placed(given)
        return self

    @model_validator(mode="after")
    def _are_few_cells(self, info: ValidationInfo) -> Self:
        """Counts all axes before anything is made of them."""
        if not is_recorded(info):
            architectures = self.grid.architectures
            over_one = sum(len(cells) * train.count(name, architectures) for name, train, cells in self._parts())
            require_few(over_one * len(self.stores))
        return self

    @model_validator(mode="after")
    def _laws_are_in_range(self) -> Self:
        """That each size has a number of tokens and a rate that can be written down."""
        for _, train, cells in self._parts():
            train.check_laws({cell.n_latents for cell in cells})
        return self

    @model_validator(mode="after")
    def _evaluates_at_times(self) -> Self:
        """Where nobody said how often: about 50 points of the longest curve, and never more than one a step."""
        if "every_tokens" not in self.eval.model_fields_set:
            parts = self._parts()
            batch = max(max(several(train.batch_tokens)) for _, train, _ in parts)
            longest = max(train.most_tokens({cell.n_latents for cell in cells}) for _, train, cells in parts)
            every = batch * -(-longest // (_POINTS * batch))
            self.eval = self.eval.model_copy(update={"every_tokens": every})
        return self

    @model_validator(mode="after")
    def _cells_can_be(self, info: ValidationInfo) -> Self:
        """Before anything is harvested or trained. Loads architectures, and torch, only where there is need."""
        if not is_recorded(info) and (self.train.settings or self.grid.architectures != ["topk"]):
            cells = self._planned()
            for cell in cells:
                cell.check()
            for architecture in self.grid.architectures:
                min(cell for cell in cells if cell.architecture == architecture).try_out()
        return self

    @model_validator(mode="after")
    def _evaluations_have_cells(self, info: ValidationInfo) -> Self:
        """Before anything is trained, as far as the grid alone decides it."""
        if not is_recorded(info) and any(entry.where for entry in self.eval.evaluations):
            rows = [{"cell_id": "", **cell._asdict()} for cell in self._planned()]
            try:
                for entry in self.eval.evaluations:
                    entry.check_cells(rows)
            except SaescaleError as error:
                raise ValueError(f"eval.{error}") from error
        return self

    def _parts(self) -> list[tuple[str, Train, list[Combination]]]:
        """The combinations of the grid by architecture and way of training. Raises ValueError for none such."""
        parts: dict[tuple[str, str], tuple[Train, list[Combination]]] = {}
        for combination, own in self.grid.asked():
            key = combination.architecture, json.dumps(own, sort_keys=True, default=str)
            if key not in parts:
                try:
                    parts[key] = self.train.with_own(own) if own else self.train, []
                except ValueError as error:
                    of = f"n_latents = {combination.n_latents}, k = {combination.k}"
                    raise ValueError(f"grid.cells, train of {of}: {error}") from error
            parts[key][1].append(combination)
        return [(architecture, *part) for (architecture, _), part in parts.items()]

    def _planned(self) -> list[Planned]:
        architectures = self.grid.architectures
        found: dict[Planned, None] = {}
        for architecture, train, combinations in self._parts():
            ways = train.ways(architecture, architectures)
            found |= dict.fromkeys(Planned.of(each, way) for each in combinations for way in ways)
        return sorted(found, key=lambda cell: cell.combination)

    def planned(self) -> list[Planned]:
        """Those over one store, each once, by n_latents, k, architecture and seed, then in the axes' order.

        Raises SaescaleError where an architecture of the user's own cannot be loaded.
        """
        try:
            return self._planned()
        except ValueError as error:
            raise SaescaleError(str(error)) from error

    @property
    def has_axes(self) -> bool:
        """Whether there may be several cells of one combination of the grid."""
        return has_lists(self.train.model_dump(mode="json")) or any(cell.train for cell in self.grid.cells)

    @property
    def stores(self) -> list[str]:
        """The URLs of all stores, of live sources those of their folders."""
        return list(self.entries)

    @property
    def entries(self) -> dict[str, str | Live]:
        """What the sweep file says of each store, by its URL."""
        given = self.store if isinstance(self.store, list) else [self.store]
        return {one if isinstance(one, str) else one.live.folder_of(self.out): one for one in given}

    @property
    def lives(self) -> dict[str, LiveSpec]:
        """The live sources by the URLs of their folders."""
        return {url: one.live for url, one in self.entries.items() if isinstance(one, Live)}

    @property
    def size(self) -> int:
        """Number of cells: those planned, over each store."""
        return len(self.planned()) * len(self.stores)

    def cells(self, store: OfStore, precision: Precision) -> list[Cell]:
        """The cells over one store, each once; `precision` is what `train.precision: auto` means here.

        An architecture without a fast path works in fp32 whatever is asked for. Raises SaescaleError for a cell that
        cannot be.
        """
        return list(dict.fromkeys(self.cell(planned, store, precision) for planned in self.planned()))

    def cell(self, planned: Planned, store: OfStore, precision: Precision) -> Cell:
        """One of them."""
        wanted = precision if self.train.precision == "auto" else self.train.precision
        settings = json.loads(planned.settings)
        if settings.get("k_aux") == "auto":
            settings["k_aux"] = auto_k_aux(store.d_model)
        try:
            return Cell(
                **{name: value for name, value in planned._asdict().items() if name != "settings"},
                store=store.fingerprint,
                d_model=store.d_model,
                settings=settings,
                heldout_rows=self.eval.tokens,
                precision=wanted if traits_of(planned.architecture).bf16 else "fp32",
            )
        except ValidationError as error:
            raise SaescaleError(f"{planned.name}: {'; '.join(problems(error, Cell, 'it cannot be'))}") from error


def load_spec(url: str, out: str | None = None, wandb: str | None = None) -> SweepSpec:
    """Reads a sweep file (YAML). `out` and `wandb` replace the file's run directory and W&B mode; of each `*` in
    `store` there are the stores that it stands for.

    Raises SaescaleError that names the file, the path of the wrong key and the nearest valid name.
    """
    document = read_keys(url, "sweep", SweepSpec.model_fields)
    if out:
        document["out"] = out
    if wandb:
        section = document.get("wandb")
        document["wandb"] = (section if isinstance(section, dict) else {}) | {"mode": wandb}
    return parse_spec(named_stores(document, url), url)


def read_keys(url: str, what: str, keys: Iterable[str], examples: str = "deploy/sweeps holds") -> dict[str, Any]:
    """The YAML file of a `what` with those `keys`, or some of them. Raises SaescaleError where it is not there or has
    no keys, and for what is no YAML."""
    try:
        document = read_yaml(url)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no {what} file at {url}; {examples} examples") from error
    return require_keys(document, url, what, keys)


def require_keys(document: Any, where: str, what: str, keys: Iterable[str]) -> dict[str, Any]:
    """The document. Raises SaescaleError where it has no keys at all."""
    if not isinstance(document, dict):
        raise SaescaleError(f"{where} holds no {what}: it should have the keys {', '.join(keys)}")
    return document


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


def parse_spec(document: Mapping[str, Any], where: str, recorded: Collection[str] | None = None) -> SweepSpec:
    """Validates a sweep given as a mapping; `where` names it in errors.

    recorded: of a sweep that ran, the architectures of the user's own that need not be at hand to read it.
    """
    if recorded is None:
        _require_own(document, where)
    try:
        return SweepSpec.model_validate(document, context=None if recorded is None else {"recorded": recorded})
    except ValidationError as error:
        raise SaescaleError(f"{where}: {'; '.join(problems(error, SweepSpec))}") from error


def _require_own(document: Mapping[str, Any], where: str) -> None:
    """Raises SaescaleError where a sweep that ran had an architecture of the user's own which is not at hand."""
    resolved = document.get("resolved")
    own = resolved.get("architectures") if isinstance(resolved, Mapping) else None
    for name in own if isinstance(own, Mapping) else ():
        if name not in ARCHITECTURES.names():
            raise SaescaleError(f"{where}: {not_here(str(document.get('out')), name)}")


def parse_recorded(document: Mapping[str, Any], where: str) -> SweepSpec:
    """The sweep that a run's sweep.yaml records, but for where it was logged, which need not be valid any more.

    Raises Damaged, which says what wrote it, where it is none.
    """
    resolved = document.get("resolved")
    own = resolved.get("architectures") if isinstance(resolved, dict) else None
    try:
        return parse_spec({key: value for key, value in document.items() if key != "wandb"}, where, own or ())
    except SaescaleError as error:
        versions = resolved.get("versions") if isinstance(resolved, dict) else None
        by = versions.get("saescale") if isinstance(versions, dict) else None
        raise Damaged(
            f"{error}: it is damaged, or of another version (saescale {by or 'unknown'} wrote it, this is "
            f"{version('saescale')}); restore it, or remove it and run the same sweep again, which keeps what is done",
            where,
        ) from error
