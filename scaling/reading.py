"""A table that somebody wrote, as a file: Parquet, or text with whatever separator, encoding and compression."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa

from saescale.scaling.headers import KNOWN
from saescale.scaling.values import has_decimal_comma
from saescale.scaling.words import listed
from saescale.storage.columns import columns_of, folded
from saescale.storage.documents import parquet_table
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.files import read_bytes
from saescale.storage.secrets import hide_secrets

TABLES = (".csv", ".tsv", ".txt", ".parquet", ".pq")
_PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
_SUFFIXES = (".gz", ".bz2", ".xz")
# What is found under the name of a table and is none.
_OTHERS = {
    b"PK\x03\x04": "an archive or a spreadsheet (.zip, .xlsx); save it as .csv",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls); save it as .csv",
    b"<!doctype": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"version https://git-lfs": "a pointer of Git LFS; run: git lfs pull",
}
_LONGEST_SHOWN = 24  # characters of a value in a message
_SEPARATORS = (",", "\t", ";", "|", " ")
_NUMBERS = frozenset(column.name for column in columns_of("results") if column.is_number)


class Written(NamedTuple):
    """What a file holds: `table` with the columns as they are called there (all text, where the file is text), whether
    its numbers have decimal commas, and what was passed over, in words."""

    table: pa.Table
    decimal_comma: bool = False
    notes: tuple[str, ...] = ()


def is_table(source: str) -> bool:
    """Whether the name of a source is that of a table: .csv, .tsv, .txt or .parquet, also .csv.gz and so on."""
    name = source.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(TABLES)


def read_file(url: str) -> Written:
    """Parquet is told by its content, text by a header that names columns of results.parquet; lines that begin with #
    are comments. Raises SaescaleError where there is no such file or it holds no table."""
    try:
        content = read_bytes(url)
    except FileNotFoundError:
        raise SaescaleError(f"{hide_secrets(url)}: no such file") from None
    content = _unpacked(hide_secrets(url), content)
    if content[:4] == b"PAR1" or url.lower().endswith((".parquet", ".pq")):
        return Written(_parquet(hide_secrets(url), content))
    return _text_table(hide_secrets(url), _decoded(content))


def _unpacked(url: str, content: bytes) -> bytes:
    for magic, unpack in _PACKED.items():
        if content.startswith(magic):
            try:
                content = unpack(content)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise SaescaleError(f"{url}: cut short or damaged ({one_line(error)}); copy it again") from error
    if not content.strip():
        raise SaescaleError(f"{url}: not a readable table: it is empty")
    for magic, what in _OTHERS.items():
        if content[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(magic.lower()):
            raise SaescaleError(f"{url}: not a table but {what}")
    return content


def _parquet(url: str, content: bytes) -> pa.Table:
    try:
        table = parquet_table(content)
        table.validate()
        return table
    # What a damaged file makes of its reader: errors of Arrow, of the system, of sizes, of names that are no text.
    except Exception as error:
        words = one_line(error)[:200]
        raise SaescaleError(f"{url}: not a readable table ({words}); write or copy it again") from error


def _decoded(content: bytes) -> str:
    """Text in UTF-8 or UTF-16, with or without a mark of its order, else in the encoding of Western Windows."""
    for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
                       (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig")):  # fmt: skip
        if content.startswith(mark):
            return content.decode(name, "replace")
    head = content[:1000]
    if head[1::2].count(0) > len(head) // 4:
        return content.decode("utf-16-le", "replace")
    if head[0::2].count(0) > len(head) // 4:
        return content.decode("utf-16-be", "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _text_table(url: str, text: str) -> Written:
    head = text[:1000]
    if sum(not (letter.isprintable() or letter.isspace()) for letter in head) > len(head) // 50:
        raise SaescaleError(f"{url}: not a readable table: it holds no text; write or copy it again")
    lines = [line + "\n" for line in re.split("\r\n|\n|\r", text.replace("\0", "")) if line.strip()]
    if _is_json(text):
        raise SaescaleError(f"{url}: not a table but JSON; write it as .csv, as pandas.read_json(...).to_csv(...) does")
    told = lines[0].strip().strip('"').lower() if lines else ""
    separators: Sequence[str] = _SEPARATORS
    if told.startswith("sep=") and len(told) == 5:  # as spreadsheets write it
        separators, lines = (told[4],), lines[1:]
    if not lines:
        raise SaescaleError(f"{url}: not a readable table: it is empty")
    first, separator = _header(lines, separators)
    names = [name.strip() for name in _fields(lines[first], separator)]
    if all(_is_plain_number(name) for name in names):
        raise SaescaleError(
            f"{url}: its first row ({_shown(names, ', ')}) holds numbers, not the names of columns; put such as "
            "n_latents,k,nmse above it"
        )
    body, comments = _without_comments(lines[first + 1 :])
    rows = _rows(url, body, separator, names)
    comma = any(has_decimal_comma(row[i]) for i, name in enumerate(names) if folded(name) in _NUMBERS for row in rows)
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(names))]
    alike = sum(len(_fields(line, separator)) == len(names) for line in comments)
    notes = (f"{url}: taken for comments, since they begin with #: {alike} of its rows",) if alike else ()
    return Written(pa.table(columns, names=names), comma, notes)


def _is_json(text: str) -> bool:
    """Whether the text is a document of JSON, or has one on each line."""
    for part in (text, text.strip().partition("\n")[0]):
        with suppress(ValueError, RecursionError):
            return isinstance(json.loads(part), dict | list)
    return False


def _header(lines: Sequence[str], separators: Sequence[str]) -> tuple[int, str]:
    """(the line that names the columns, their separator): the first that is no comment, or a comment above it that
    names more columns that are known; the separator under which most names are."""
    plain = next((i for i, line in enumerate(lines) if not line.lstrip().startswith("#")), 0)
    best = (0, 0, plain, separators[0])
    for row in range(plain, -1, -1):
        for separator in separators:
            names = _fields(lines[row], separator)
            found = sum(folded(name) in KNOWN for name in names)
            # Of a header without a name that is known, the fields of the first plain line say how it is separated.
            fields = len(names) if row == plain and separator != " " else 0
            if (found, fields) > best[:2]:
                best = (found, fields, row, separator)
    return best[2], best[3]


def _fields(line: str, separator: str) -> list[str]:
    """The fields of one line, of a comment too; without empty ones at its end."""
    line = line.lstrip("# ") if line.lstrip().startswith("#") else line
    try:
        found = next(csv.reader([line.strip("\r\n ")], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
    while found and not found[-1].strip():
        found.pop()
    return found


def _without_comments(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """(rows, comments). Where every row begins with #, these are names of cells; within quotes # is text."""
    rows, comments, quotes = list[str](), list[str](), 0
    for line in lines:
        comment = line.lstrip().startswith("#") and quotes % 2 == 0
        (comments if comment else rows).append(line)
        quotes += 0 if comment else line.count('"')
    return (rows, comments) if rows else (comments, [])


def _rows(url: str, lines: Sequence[str], separator: str, names: Sequence[str]) -> list[list[str]]:
    """The rows, each as long as the header. Raises SaescaleError for one that has more to say."""
    try:
        text = io.StringIO("".join(lines), newline="")
        read = list(csv.reader(text, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise SaescaleError(f"{url}: not a readable table ({error}); look for a quote that is not closed") from error
    rows = [[value.strip() for value in row] for row in read]
    # Headers again, where files were put together.
    rows = [row for row in rows if any(row) and row[: len(names)] != list(names)]
    if separator in "\t " and rows and all(len(row) == len(names) + 1 and row[-1] for row in rows):
        rows = [row[1:] for row in rows]  # names of rows without a header, as R writes them
    for i, row in enumerate(rows, 1):
        if any(row[len(names) :]):
            raise SaescaleError(
                f"{url}: row {i} has {len(row)} fields and the header {len(names)} ({_shown(row, ' | ')}); quote a "
                "value that holds the separator, and write decimals with a point"
            )
        rows[i - 1] = row[: len(names)] + [""] * (len(names) - len(row))
    return rows


def _shown(values: Sequence[str], between: str) -> str:
    """Some of the values of a row, each on one line and no longer than needed."""
    return listed((" ".join(value.split())[:_LONGEST_SHOWN] for value in values), between)


def _is_plain_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
