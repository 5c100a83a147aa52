"""The texts in files of each format, with what is wrong in one named by its line or row.

One rule for all of them: texts that are null are passed over and counted, texts that are no strings are a mistake.
"""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from saescale.storage.documents import without_repeated
from saescale.storage.errors import SaescaleError, one_line

_BATCH_ROWS = 256  # of Parquet, read at a time

Lines = Iterator[tuple[int, str]]  # with their numbers from 1
Record = tuple[int, str]  # the number of a line, row or entry of a file, and its text


class Odd:
    """What a corpus holds that is no text as it should be: counted, so that it is said once."""

    def __init__(self) -> None:
        self._found: dict[str, list[Any]] = {}  # what: how often, and where first

    def count(self, what: str, where: str) -> None:
        """Once more `what`, here."""
        self._found.setdefault(what, [0, where])[0] += 1

    def said(self) -> list[str]:
        """A line for each kind."""
        lines = (f"{what}: {times:,} (the first: {where})" for what, (times, where) in self._found.items())
        return [line.encode(errors="backslashreplace").decode() for line in lines]  # names of files may be no text


def read_json(
    lines: Lines, path: str, may_be_one: bool, column: str, odd: Odd, first: int, by_lines: bool
) -> Iterator[Record]:
    """A record a line; or one array of records, known by its bracket, and in .json also one record over many lines.

    From record number `first` on; `by_lines`: the lines begin there, and each is a record.
    """
    started = by_lines
    for number, line in lines:
        if not line.strip():
            continue
        if not started and line.lstrip().startswith("["):
            yield from _array(_rest(number, line, lines, path), path, column, odd, first)
            return
        if number < first:
            started = True
            continue
        try:
            record = _parsed(line, path, number)
        except SaescaleError:
            if not may_be_one or started:
                raise
            record = _rest(number, line, lines, path)
        started = True
        if (text := _field(record, f"{path}, line {number}", column, odd)) is not None:
            yield number, text


def _array(records: list[Any], path: str, column: str, odd: Odd, first: int) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        if number >= first and (text := _field(record, f"{path}, entry {number}", column, odd)) is not None:
            yield number, text


def _rest(number: int, line: str, lines: Lines, path: str) -> Any:
    """All from this line on as one JSON value; the numbers of lines stay."""
    return _parsed("\n" * (number - 1) + line + "".join(text for _, text in lines), path)


def _parsed(content: str, path: str, number: int | None = None) -> Any:
    try:
        # Whole numbers of thousands of digits are no mistake of a text beside them.
        return json.loads(content, object_pairs_hook=without_repeated, parse_int=float)
    except (ValueError, RecursionError) as error:
        line = number or getattr(error, "lineno", 1)
        raise SaescaleError(f"{path}, line {line}: not JSON ({one_line(error)})") from error


def _field(record: Any, where: str, column: str, odd: Odd) -> str | None:
    if not isinstance(record, dict):
        raise SaescaleError(f"{where}: {_kind(record)} where an object with a field {column!r} should be")
    if column not in record:
        texts = [name for name, value in record.items() if isinstance(value, str)]
        raise SaescaleError(f"{where}: no field {column!r}; {_names(record, column, texts)}")
    text = record[column]
    if text is None:
        odd.count("texts that are null, passed over", where)
    elif not isinstance(text, str):
        raise SaescaleError(f"{where}: the field {column!r} holds {_kind(text)}, not a string")
    return None if text is None else _sound(text, where, odd)


def _sound(text: str, where: str, odd: Odd) -> str:
    """The text with halves of surrogate pairs, which no tokenizer and no file takes, replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        odd.count("texts with halves of surrogate pairs, read as U+FFFD", where)
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _names(names: Iterable[str], column: str, texts: list[str]) -> str:
    """What there is in place of a column, and which of those that hold `texts` may be meant."""
    there = list(names)
    shown = (", ".join(there[:8]) or "none") + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    if not texts:
        return f"it has {shown}, and no text in any of them"
    by_case = {name.strip().lower(): name for name in reversed(texts)}
    near = difflib.get_close_matches(column.lower(), by_case, n=1, cutoff=0.5)
    likely = by_case[near[0]] if near else texts[0] if len(texts) == 1 else "NAME"
    return f"it has {shown}: name the one that is meant with --text-column {likely}"


def read_csv(lines: Lines, path: str, kind: str, column: str, first: int) -> Iterator[Record]:
    """A record a row, by the line on which it begins; from that of line `first` on."""
    csv.field_size_limit(2**31 - 1)  # of this process; texts are longer than csv's own limit
    header = next((each for each in lines if each[1].strip()), None)
    if header is None:
        return
    separator, names = _header(header[1], kind, path, column)
    at, line = names.index(column), header[0]
    reader = csv.reader((text for _, text in lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            began, line = line + 1, header[0] + reader.line_num
            if row and len(row) != len(names):
                fields = f"{len(row)} field{'s' * (len(row) != 1)} where the header has {len(names)}"
                raise SaescaleError(
                    f"{path}, line {began}: {fields}; quote texts that hold {separator!r} or a line end"
                )
            if row and began >= first:
                yield began, row[at]
    except csv.Error as error:
        where = f"{path}, line {line + 1}"
        raise SaescaleError(f"{where}: not {kind.removeprefix('.').upper()} ({one_line(error)})") from error


def _header(line: str, kind: str, path: str, column: str) -> tuple[str, list[str]]:
    """The separator with which the header has the column, and its names."""
    read = {
        separator: [name.strip() for name in next(csv.reader([line], delimiter=separator))]
        for separator in ("\t" if kind == ".tsv" else ",;\t|")
    }
    separator = next((each for each, names in read.items() if column in names), max(read, key=lambda s: len(read[s])))
    _one_column(path, read[separator], column, read[separator])
    return separator, read[separator]


def _one_column(path: str, names: list[str], column: str, texts: list[str]) -> None:
    if column not in names:
        raise SaescaleError(f"{path}: no column {column!r}; {_names(names, column, texts)}")
    if names.count(column) > 1:
        raise SaescaleError(f"{path}: {names.count(column)} columns are called {column!r}; give them different names")


def read_parquet(file: BinaryIO, path: str, column: str, odd: Odd, first: int) -> Iterator[Record]:
    """A record a row, from row `first` on."""
    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    texts = [field.name for field in schema if _holds_text(field.type)]
    _one_column(path, schema.names, column, texts)
    if column not in texts:
        kind = schema.field(column).type
        raise SaescaleError(
            f"{path}: the column {column!r} holds {kind}, no text; {_names(schema.names, column, texts)}"
        )
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    groups, row = list(range(len(sizes))), 0
    while groups and row + sizes[groups[0]] <= first:
        row += sizes[groups.pop(0)]
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[column], use_threads=False):
        for value in _bytes(batch.column(0)):
            where = f"{path}, row {row} (from 0)"
            if row >= first and value is None:
                odd.count("texts that are null, passed over", where)
            elif row >= first and value is not None:
                yield row, _decoded(value, where)
            row += 1


_TEXTS = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
    pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary, pa.types.is_null,
)  # fmt: skip


def _holds_text(kind: pa.DataType) -> bool:
    stored = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(stored) for is_kind in _TEXTS)


def _bytes(column: pa.Array) -> list[bytes | None]:
    """Texts as their bytes: what Arrow calls a string need not be UTF-8 in a file of another writer."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    return list(column.cast(pa.large_binary()).to_pylist())


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise SaescaleError(f"{where}: the text is not UTF-8 ({reason}); convert it") from error
