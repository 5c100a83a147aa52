"""Axes: a number in `grid` or `train` may be a list of numbers, and each of them makes cells of its own."""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Discriminator, Field, Tag

T = TypeVar("T")


def _form(value: Any) -> str:
    return "several values" if isinstance(value, list | tuple) else "one value"


# One T, or a list of them. Which of the two was meant is told apart first, so that a mistake is named once.
Axis = Annotated[
    Annotated[T, Tag("one value")] | Annotated[list[T], Field(min_length=1), Tag("several values")],
    Discriminator(_form),
]


def several(value: T | list[T]) -> list[T]:
    """The values of an axis, each once."""
    return list({repr(one): one for one in value}.values()) if isinstance(value, list) else [value]


def singles(value: Any) -> list[Any]:
    """All that a value with lists in it may be: itself where there is none, a section once for each combination."""
    if isinstance(value, list):
        return several([one for each in value for one in singles(each)])
    if isinstance(value, BaseModel):
        fields = {name: singles(getattr(value, name)) for name in type(value).model_fields}
        combinations = itertools.product(*fields.values())
        return [value.model_copy(update=dict(zip(fields, chosen, strict=True))) for chosen in combinations]
    return [value]


def count(value: Any) -> int:
    """How many `singles` makes, at most, before they are made."""
    if isinstance(value, list):
        return sum(map(count, value))
    if isinstance(value, BaseModel):
        return math.prod(count(getattr(value, name)) for name in type(value).model_fields)
    return 1


def has_lists(value: Any) -> bool:
    """Whether a part of a document holds an axis."""
    if isinstance(value, Mapping):
        return any(map(has_lists, value.values()))
    return isinstance(value, list)
