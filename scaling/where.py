"""Rows by what their columns say: `--where architecture=topk`, `--where 'k>=16'`."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from saescale.scaling.headers import nearest
from saescale.scaling.tables import Table, shown
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, folded
from saescale.storage.errors import SaescaleError

_TESTS: dict[str, Callable[[np.ndarray, float | str], np.ndarray]] = {
    "=": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|>=|<=|==|=|>|<)\s*(.*?)\s*")
_COLUMNS = {column.symbol: column.name for column in COLUMNS.values() if column.symbol} | {"N": "n_latents"}


class Condition(NamedTuple):
    """A column, how it is compared, and with what; `text` is how the user wrote it."""

    column: str
    test: str
    value: str
    text: str


def parse_condition(text: str) -> Condition:
    """`architecture=topk`, `k>=16`, `cell_id!=3f2a91`. Raises SaescaleError."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise SaescaleError(f"--where {text}: write a column, =, !=, <, <=, > or >=, and a value, as architecture=topk")
    column, test, value = match.groups()
    return Condition(column, "=" if test == "==" else test, value, text)


def select_where(table: Table, conditions: Sequence[Condition]) -> Table:
    """The rows for which all conditions hold. Raises what `rows_where` raises, and SaescaleError where none is left."""
    if not (mask := rows_where(table, conditions)).any():
        raise SaescaleError(no_row(table, conditions))
    return replace(table.select(mask), excluded=table.excluded)


def rows_where(table: Table, conditions: Sequence[Condition]) -> np.ndarray:
    """For which rows all conditions hold, bool [rows]; of several on one column with = one is enough.

    Numbers are compared as such, names as text. Raises SaescaleError for a column that is not there, and for an order
    of text.
    """
    equal: dict[str, np.ndarray] = {}
    mask = np.ones(len(table), dtype=bool)
    for condition in conditions:
        name = _column(table, condition)
        holds = _holds(table[name], name, condition)
        if condition.test == "=":
            equal[name] = equal.get(name, False) | holds
        else:
            mask &= holds
    for holds in equal.values():
        mask &= holds
    return mask


def no_row(table: Table, conditions: Sequence[Condition], what: str = "finished cell") -> str:
    """That the conditions hold for none, and what there is of the first one's column."""
    asked = " ".join(f"--where {condition.text}" for condition in conditions)
    name = _column(table, conditions[0])
    there = listed(map(shown, np.unique(table[name]).tolist()), ", ")
    return f"{table.source}: no {what} with {asked}; {name} is {there}"


def _column(table: Table, condition: Condition) -> str:
    for name in (condition.column, folded(condition.column), _COLUMNS.get(condition.column)):
        if name is not None and name in table:
            return name
    close = nearest(condition.column, table.columns)
    hint = f"; did you mean {close}?" if close else ""
    raise SaescaleError(
        f"{table.source}: --where {condition.text}: there is no column {condition.column}{hint} (there are "
        f"{listed(table.columns, ', ', most=40)})"
    )


def _holds(values: np.ndarray, name: str, condition: Condition) -> np.ndarray:
    if values.dtype.kind != "f":
        if condition.test not in ("=", "!="):
            raise SaescaleError(f"--where {condition.text}: {name} holds text, which has no order; use = or !=")
        return _TESTS[condition.test](values, condition.value)
    try:
        value = float(condition.value)
    except ValueError:
        raise SaescaleError(f"--where {condition.text}: {name} holds numbers, not {condition.value!r}") from None
    return _TESTS[condition.test](values, value)
