"""What is asked for: an evaluation, of which cells, and how many latents of each it looks at."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from saescale.scaling.tables import Table
from saescale.scaling.where import Condition, no_row, parse_condition, rows_where
from saescale.storage.columns import columns_of, folded
from saescale.storage.documents import problem_of
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.evaluation import EVALUATIONS

ALL = "all"
DEFAULT = ("core", "downstream_loss")


class Wanted(BaseModel):
    """An entry of `eval.evaluations`: the name of an evaluation, or that with `latents` or `where`.

        [core, {n2g: {latents: 32, where: {n_latents: [512, 1024], k: 8}}}, {probe_loss: {where: ["k>=16"]}}]

    `where`: columns of results.parquet with a value or a list of values, or a condition or a list of them as
    `saescale fit --where` takes them; a cell has to meet all of them.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    evaluation: str
    latents: int | None = Field(default=None, gt=0, strict=True)  # None: as many as the evaluation says
    where: dict[str, Any] | list[str] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _named(cls, entry: Any) -> Any:
        if isinstance(entry, str):
            return {"evaluation": entry.replace("-", "_")}
        if isinstance(entry, Mapping) and "evaluation" not in entry:
            if len(entry) != 1:
                raise ValueError("it is the name of an evaluation, or one name with `latents` and `where`")
            ((name, settings),) = entry.items()
            if not isinstance(settings, Mapping | None):
                raise ValueError(f"{name} takes `latents` and `where`, such as {{latents: 32, where: {{k: 8}}}}")
            return {"evaluation": str(name).replace("-", "_"), **(settings or {})}
        return entry

    @field_validator("where", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given or {}

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        try:
            self.conditions()
        except SaescaleError as error:
            raise ValueError(f"{self.evaluation}: {error}") from error
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        settings = {key: value for key, value in handler(self).items() if key != "evaluation" and value}
        return {self.evaluation: settings} if settings else self.evaluation

    @classmethod
    def of(cls, entry: Any) -> Self:
        """Of an entry as it stands in a sweep file. Raises SaescaleError."""
        if isinstance(entry, cls):
            return entry
        try:
            return cls.model_validate(entry)
        except ValidationError as error:
            raise SaescaleError(f"evaluations: {json.dumps(entry, default=str)}: {problem_of(error)}") from error

    def conditions(self) -> list[Condition]:
        """`where` as conditions, of which several of one column are alternatives. Raises SaescaleError."""
        if isinstance(self.where, list):
            return [parse_condition(text) for text in self.where]
        found = []
        for column, given in self.where.items():
            values = given if isinstance(given, list) else [given]
            if not values or not all(isinstance(value, str | int | float) for value in values):
                raise SaescaleError(f"where: {column} has no value; give one, or a list of them")
            found += [Condition(column, "=", str(value), f"{column}={value}") for value in values]
        return found

    def check(self) -> None:
        """Raises SaescaleError where there is no such evaluation, or it looks at no latents one by one. Imports
        nothing."""
        EVALUATIONS.check(self.evaluation)
        if self.latents is not None and not looks_at_latents(self.evaluation):
            some = [name for name in EVALUATIONS.names() if looks_at_latents(name)]
            raise SaescaleError(
                f"{self.evaluation} looks at all latents, so there is no number to give; {', '.join(some)} look at some"
            )

    def select(self, rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
        """Ids of the cells of `rows` (of results.parquet) that it is asked of; `where` names them in errors.

        Raises SaescaleError for a column that there is not.
        """
        ids = [row["cell_id"] for row in rows]
        if not self.where:
            return ids
        holds = rows_where(Table.from_rows(map(dict, rows), where), self.conditions())
        return [cell for cell, held in zip(ids, holds.tolist(), strict=True) if held]

    def check_cells(self, planned: Sequence[Mapping[str, Any]]) -> None:
        """Raises SaescaleError where none of the `planned` cells can meet the conditions, or there is no such column;
        columns that only results have are left out."""
        conditions = self.conditions()
        later = {column.name for column in columns_of("results")} - planned[0].keys()
        conditions = [condition for condition in conditions if folded(condition.column) not in later]
        table = Table.from_rows(map(dict, planned), f"evaluations: {self.evaluation}")
        if not rows_where(table, conditions).any():
            raise SaescaleError(no_row(table, conditions, "cell of the grid"))

    def no_cell(self, rows: Sequence[Mapping[str, Any]], where: str) -> str:
        """That `select` finds none, in words."""
        return no_row(Table.from_rows(map(dict, rows), where), self.conditions())


Entry = str | Mapping[str, Any] | Wanted  # as it stands in a sweep file, or read already


def looks_at_latents(evaluation: str) -> bool:
    """Whether it looks at some latents of a cell, so that their number can be asked for."""
    return EVALUATIONS.defines(evaluation, "latents")


def each_once(entries: Iterable[Wanted]) -> list[Wanted]:
    """Raises SaescaleError where an evaluation stands twice with other settings: a cell has one set of its rows."""
    found: dict[str, Wanted] = {}
    for entry in entries:
        if found.setdefault(entry.evaluation, entry) != entry:
            raise SaescaleError(f"{entry.evaluation} stands there twice with other settings; name it once")
    return list(found.values())


def entries(
    run: RunDirectory, asked: Sequence[Entry] = (), latents: int | None = None, where: Sequence[str] = ()
) -> list[Wanted]:
    """What is asked of a run: evaluations by their names or as entries, or "all"; none: `DEFAULT` and those that the
    sweep file names, with what it says of them.

    `latents`: of those that look at some; `where`: conditions for all of them, in place of the sweep file's. Raises
    SaescaleError for what there is not.
    """
    if list(asked) == [ALL]:
        asked = EVALUATIONS.names()
    found = each_once([Wanted.of(entry) for entry in asked] if asked else _by_default(run.read_spec() or {}))
    for entry in found:
        entry.check()
    if latents is not None:
        some = [looks_at_latents(entry.evaluation) for entry in found]
        found = [
            entry.model_copy(update={"latents": latents}) if looks or not any(some) else entry
            for entry, looks in zip(found, some, strict=True)
        ]
        found[0].check()
    return [entry.model_copy(update={"where": list(where)}) for entry in found] if where else found


def _by_default(document: Mapping[str, Any]) -> list[Wanted]:
    section = document.get("eval")
    recorded = section.get("evaluations") if isinstance(section, Mapping) else section
    of_sweep = [Wanted.of(entry) for entry in recorded or ()]
    named = {entry.evaluation for entry in of_sweep}
    return [*(Wanted.of(name) for name in DEFAULT if name not in named), *of_sweep]
