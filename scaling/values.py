"""The values of a column of somebody's table: read where there is one way to read them, and no digit lost.

Integers are not floats: those that float64 cannot hold stay text, digit by digit, unless they are calculated with.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

_EXACT = 2**53  # up to which float64 holds every integer
_LONGEST = 4_000  # characters of a text that are kept: an array of texts is as wide as its longest
# What people write where there is no value.
_MISSING = frozenset((
    "nan", "na", "n/a", "n.a.", "nil", "null", "none", "missing", "nm", "n.m.", "-", "--", "?", ".", "#n/a", "<na>",
    "nat",
))  # fmt: skip
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([,.'\s]\d{3})+")  # thousands, or a number with three decimals


class Numbers(NamedTuple):
    """`values` float64 [rows], NaN where there is none; `unread` [rows] what stands there instead and is no number, ""
    elsewhere, or None where there is nothing of the kind."""

    values: np.ndarray
    unread: np.ndarray | None


def texts(column: pa.ChunkedArray) -> np.ndarray:
    """Every value as text, missing ones as ""; whole numbers without a fraction."""
    return np.array([_text(value) for value in _plain(column)], dtype=str)


def numbers(column: pa.ChunkedArray, decimal_comma: bool = False) -> Numbers:
    """A column that is calculated with. `decimal_comma`: as the file writes its numbers."""
    if (exact := _as_floats(column)) is not None:
        return Numbers(exact, None)
    parsed = _parsed([_text(value) for value in _plain(column)], decimal_comma)
    values = np.array([np.nan if isinstance(v, str) else _float(v) for v in parsed], dtype=np.float64)
    unread = np.array([v if isinstance(v, str) else "" for v in parsed], dtype=str)
    return Numbers(values, unread if (unread != "").any() else None)


def either(column: pa.ChunkedArray, decimal_comma: bool = False) -> np.ndarray:
    """A column that is not: float64 where all its values are numbers that float64 holds, else text."""
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    written = [_text(value) for value in _plain(column)]
    parsed = _parsed(written, decimal_comma)
    if any(isinstance(v, str) or (isinstance(v, int) and abs(v) > _EXACT) for v in parsed):
        return np.array(written, dtype=str)
    return np.array([_float(v) for v in parsed if not isinstance(v, str)], dtype=np.float64)


def is_grouped(text: str) -> bool:
    """Whether a text may be a number with a separator of thousands."""
    return bool(_GROUPED.fullmatch(text.strip()))


def has_decimal_comma(text: str) -> bool:
    """Whether a text can only be a number with a decimal comma, such as "0,25"."""
    return bool(_DECIMAL_COMMA.fullmatch(text.strip())) and not is_grouped(text)


def _as_floats(column: pa.ChunkedArray) -> np.ndarray | None:
    """Of numbers that Arrow knows as such; None for anything else."""
    kind = column.type
    if pa.types.is_integer(kind):
        # Laws take logarithms: what is lost beyond 53 bits is nothing to them.
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return None


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """The values as Python's, whatever they are wrapped in; none where Arrow itself cannot give them."""
    try:
        return _unwrapped(column)
    except (pa.ArrowException, ValueError, OverflowError):
        return [None] * len(column)


def _unwrapped(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if isinstance(kind, pa.ExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # Nanoseconds that Python's datetime cannot hold, and text that is no UTF-8.
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.int64() if pa.types.is_duration(column.type) else pa.string())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif isinstance(value, float):
        value = "" if np.isnan(value) else f"{value:.0f}" if value % 1 == 0 and abs(value) < _EXACT else repr(value)
    return str(value)[:_LONGEST].strip()


def _parsed(written: list[str], decimal_comma: bool) -> list[int | float | str]:
    """Each as a number, NaN where it is missing, and as it is where it is no number that can be read one way only."""
    there = [text for text in written if text.lower() not in _MISSING and text]
    percent = bool(there) and all(text.endswith("%") for text in there)
    return [_number(text, decimal_comma, percent) for text in written]


def _number(text: str, decimal_comma: bool, percent: bool) -> int | float | str:
    if not text or text.lower() in _MISSING:
        return np.nan
    digits = text.removesuffix("%").rstrip() if percent else text
    if decimal_comma:
        if is_grouped(digits):
            return text
        digits = digits.replace(",", ".")
    try:
        return float(digits) / 100 if percent else int(digits)
    except ValueError:
        pass
    try:
        return float(digits)
    except ValueError:
        return text


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf
