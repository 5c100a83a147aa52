"""What is wrong with a file that a user wrote, such as a sweep file: one phrase for each wrong key, with its path, the
nearest name, what to write."""

import difflib
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from saescale.storage.secrets import ADVICE, names_secret

# Of a problem whose input must not be repeated.
SECRET = "secret"

# As people write numbers, which YAML takes for text.
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:[,_ ' ]\d{3})+")
_MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9}


def problems(error: ValidationError, model: type[BaseModel], whole: str = "the sweep") -> list[str]:
    """One phrase for each wrong key of a `model`, without the repetition that unions bring; `whole` names it itself."""
    phrases: dict[str, str] = {}
    for problem in error.errors():
        # The last part of a union's location names the member that did not fit, which no user wrote.
        path = [part for part in problem["loc"] if isinstance(part, int) or part in _keys(model)]
        wrong = [part for part in problem["loc"] if problem["type"] == "extra_forbidden"][-1:]
        name = ".".join(str(part) for part in [*path, *(part for part in wrong if part not in path)]) or whole
        if problem["type"] == "extra_forbidden":
            fields = _fields(model, problem["loc"][:-1])
            close = difflib.get_close_matches(str(wrong[0]), fields, n=1, cutoff=0.5)
            hint = f", did you mean {close[0]}?" if close else f", valid are {', '.join(fields)}"
            if not close and names_secret(str(wrong[0])):
                hint = f"; {ADVICE}"
            phrases.setdefault(name, f"{name} is not a key{hint}")
        elif problem["type"] == "missing":
            phrases.setdefault(name, f"{name} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            echoed = problem["type"] != SECRET and isinstance(given, str | int | float | bool | None)
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


def _fields(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The valid keys of the section at `location`."""
    for part in location:
        field = model.model_fields.get(str(part))
        model = next(_models(field.annotation), model) if field else model
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of that type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


@lru_cache
def _keys(model: type[BaseModel]) -> frozenset[str]:
    """All keys of a section and of those in it."""
    inner = (_keys(section) for field in model.model_fields.values() for section in _models(field.annotation))
    return frozenset(model.model_fields).union(*inner)
