"""`train.settings`: what each architecture of a grid is told, where several of them have settings of one name.

    settings: {coefficient: 0.1, gated: {coefficient: [0.01, 0.1]}, switch: {experts: 4}}

A setting goes to every architecture that has one of that name; what stands below an architecture's name is for that one
alone, and wins. A list is an axis, unless the setting itself takes a list.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from saescale.cluster.sweep.axes import several
from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.cell import require_known, traits_of


def resolve_settings(
    settings: Mapping[str, Any], general: Mapping[str, Any], architecture: str, architectures: Sequence[str]
) -> dict[str, list[Any]]:
    """The values of each setting of `architecture` that `settings` or `general` name; settings win.

    Raises ValueError, in one line, for a setting that none of `architectures` has, for a value that this one cannot
    take, and for one name that means different things in two of them.
    """
    own, shared = _parted(settings, architectures)
    names = _names(architecture)
    mine = own.get(architecture, {})
    for other, section in own.items():  # also of one that the grid does not have now: a slip would wait for the day
        require_known(section, _names(other), [other])
        if other not in architectures:
            for name, value in section.items():
                _values(other, name, value, ())
    there = {name for other in architectures for name in _names(other)}
    sections = {name for name, value in shared.items() if isinstance(value, Mapping)}
    require_known(sections, sorted({*there, *architectures, *ARCHITECTURES.names()}), architectures)
    require_known(shared.keys() - sections, sorted(there), architectures)
    takers = {
        name: [other for other in architectures if name in _names(other) and name not in own.get(other, {})]
        for name in (*shared, *general)
    }
    for name, value in shared.items():
        _require_one_meaning(name, value, takers[name])
    asked = {**general, **shared, **mine}
    return {
        name: _values(architecture, name, asked[name], () if name in mine else takers[name])
        for name in names
        if name in asked
    }


def defaults(architecture: str) -> dict[str, Any]:
    """What each setting of an architecture is where nobody says it; None where somebody has to."""
    fields = _model(architecture).model_fields
    return {name: None if fields[name].is_required() else fields[name].get_default() for name in _names(architecture)}


def told_apart(settings: str, others: Iterable[str], architecture: str) -> dict[str, Any]:
    """Those of `settings` (JSON, without defaults, as `others`) that not all of the others have so."""
    default = defaults(architecture)
    mine, theirs = {**default, **json.loads(settings)}, [{**default, **json.loads(other)} for other in others]
    return {name: value for name, value in mine.items() if any(each[name] != value for each in theirs)}


def _parted(
    settings: Mapping[str, Any], architectures: Sequence[str]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """What is for one architecture alone, by its name, also where the grid does not have it, and what is for all."""
    own: dict[str, Mapping[str, Any]] = {}
    shared: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if isinstance(value, Mapping) and name in {*architectures, *ARCHITECTURES.names()}:
            own[name] = value
        else:
            shared[str(key)] = value
    return own, shared


def _names(architecture: str) -> tuple[str, ...]:
    """Of its settings. Loads the architecture, and torch."""
    try:
        return traits_of(architecture).settings
    except SaescaleError as error:  # a user's file that fails
        raise ValueError(str(error)) from error


def _require_one_meaning(name: str, value: Any, takers: Sequence[str]) -> None:
    for other in takers[1:]:
        if _meaning(takers[0], name) != _meaning(other, name):
            raise ValueError(
                f"setting {name} means different things in {takers[0]} and {other}: write it below their names, such "
                f"as {{{other}: {{{name}: {value}}}}}"
            )


def _values(architecture: str, name: str, value: Any, takers: Sequence[str]) -> list[Any]:
    """The values of an axis, or the one value, that are for `takers` too."""
    if not isinstance(value, list) or _problem(architecture, name, value) is None:
        values = [value]
    elif value:
        values = value
    else:
        raise ValueError(f"setting {name} of {architecture}: the list is empty")
    for each in values:
        if (problem := _problem(architecture, name, each)) is not None:
            others = [other for other in takers if other != architecture and _problem(other, name, each) is None]
            hint = f"; for {others[0]} alone write {{{others[0]}: {{{name}: {each}}}}}" if others else ""
            raise ValueError(f"setting {name} of {architecture}: {problem} (given: {each!r}){hint}")
    # 1, 1.0 and the text that YAML makes of 1e0 are one value.
    return several([_understood(architecture, name, each) for each in values])


def _problem(architecture: str, name: str, value: Any) -> str | None:
    """Why the setting cannot have that value; None where it can."""
    try:
        _understood(architecture, name, value)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None


def _understood(architecture: str, name: str, value: Any) -> Any:
    """As the architecture has it, in JSON. Raises ValidationError; also for true where a number is meant."""
    if name == "k_aux" and value == "auto":  # what it comes to depends on the store
        return value
    adapter = _adapter(_model(architecture), name)
    taken = adapter.validate_python(value, strict=True if isinstance(value, bool) else None)
    return adapter.dump_python(taken, mode="json")


def _model(architecture: str) -> type[BaseModel]:
    from saescale.trainers.architectures.architecture import find_architecture

    return find_architecture(architecture).Settings


def _meaning(architecture: str, name: str) -> Any:
    return _model(architecture).model_fields[name].annotation


@lru_cache(maxsize=1024)
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    annotation: Any = field.annotation
    return TypeAdapter(Annotated[annotation, *field.metadata] if field.metadata else annotation)
