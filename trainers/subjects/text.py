"""Text for a harvest: a corpus that every Python ships, or any text files reachable through fsspec."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec import AbstractFileSystem
from fsspec.compression import compr

from saescale.storage import files
from saescale.storage.errors import SaescaleError, one_line

PYTHON_PROSE = "python-prose"
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
FORMATS = (".txt", ".jsonl", ".parquet")

DOCSTRING_CHARACTERS = 200  # shorter ones are hardly prose
TXT_CHARACTERS = 8_000  # a long .txt file comes in pieces, cut at the first blank line after this many
TXT_CHARACTERS_MOST = 32_000  # ... or at the first line's end after this many

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Piece(NamedTuple):
    """Text of document number `doc` of a corpus: all of it, or a piece of a long .txt file, which is one document."""

    doc: int
    text: str


def pieces(corpus: str, seed: int) -> Iterator[Piece]:
    """The documents of a corpus in an order that is a pure function of (corpus, seed); no piece is blank.

    `corpus` is "python-prose" (permuted by `seed`), or a path, glob, folder or fsspec URL of .txt (a document each),
    .jsonl (field `text`) and .parquet (column `text`) files, read in the order of their names; all but Parquet may be
    compressed (.gz, .bz2, .xz, .zst). A .txt file longer than 8,000 characters comes in pieces, cut at blank lines.
    Raises SaescaleError naming the file (and line) that cannot be read; no match is told at once.
    """
    if corpus == PYTHON_PROSE:
        prose = python_prose()
        order = np.random.default_rng(seed).permutation(len(prose)).tolist()
        return (Piece(doc, prose[index]) for doc, index in enumerate(order))
    return _numbered(*_find(corpus))


def content_key(text: str) -> int:
    """The XXH3-64 by which equal texts are known: of the first 8,000 characters, runs of whitespace as one space.

    The first piece of a file has as many, so it has one key with a .jsonl document of the whole text.
    """
    return xxhash.xxh3_64_intdigest(_plain(text)[:TXT_CHARACTERS].encode("utf-8", "surrogatepass"))


def _plain(text: str) -> str:
    return " ".join(text.split())


# --- what CPython ships


@cache
def python_prose() -> tuple[str, ...]:
    """English prose in the order topics, docstrings: `pydoc_data.topics` and the standard library's docstrings.

    Docstrings are taken from the source files (over 200 characters each, tests left out); no text comes twice.
    About 400 k SmolLM2 tokens in all.
    """
    from pydoc_data.topics import topics

    found = dict.fromkeys(topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            found.update(dict.fromkeys(_docstrings(path)))
    return tuple(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old invalid escapes are not the user's concern
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # some distributions ship templates and broken examples with the name .py
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > DOCSTRING_CHARACTERS:
                yield text


# --- files


def _numbered(fs: AbstractFileSystem, paths: list[str]) -> Iterator[Piece]:
    doc, before = -1, None
    for path in paths:
        for record, text in _read(fs, path):
            if text.strip():
                doc += (path, record) != before
                before = path, record
                yield Piece(doc, text)


def _find(corpus: str) -> tuple[AbstractFileSystem, list[str]]:
    fs, path = files.filesystem(corpus)
    try:
        if any(character in path for character in "*?["):
            candidates = [str(name) for name in fs.glob(path) if not fs.isdir(name)]
        elif fs.isdir(path):
            candidates = [name for name in map(str, fs.find(path)) if _format(name)]
        else:
            candidates = [path] if fs.exists(path) else []
    except Exception as error:  # object stores raise classes of their own
        raise SaescaleError(f"cannot look for the corpus {corpus}: {one_line(error)}") from error
    if not candidates:
        raise SaescaleError(
            f"no text file matches the corpus {corpus!r}: give a path, glob or URL of {', '.join(FORMATS)} files, "
            f"or {PYTHON_PROSE!r}"
        )
    for name in candidates:
        if _format(name) is None:
            raise SaescaleError(f"{name}: the corpus must be {', '.join(FORMATS)} files (or such a file with .gz)")
    return fs, sorted(candidates)


def _format(path: str) -> str | None:
    """Which of FORMATS the name says, compression put aside; None when it says none."""
    for compressed in COMPRESSED:
        path = path.removesuffix(compressed)
    return next((name for name in FORMATS if path.endswith(name)), None)


def _read(fs: AbstractFileSystem, path: str) -> Iterator[tuple[int, str]]:
    """Texts of the file, each with the number of its document in it."""
    kind = _format(path)
    readers: dict[Any, Any] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    compression = next((name for end, name in COMPRESSED.items() if path.endswith(end)), None)
    if compression is not None and compression not in compr:
        raise SaescaleError(f"{path}: this Python cannot read {compression}; pip install zstandard, or use .gz")
    try:
        with fs.open(path, "rb", compression=compression) as file:
            yield from readers[kind](file, path)
    except SaescaleError:
        raise
    except Exception as error:  # compressors, Arrow and object stores raise classes of their own
        raise SaescaleError(f"{path}: cannot be read ({one_line(error)})") from error


def _read_txt(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    return ((0, piece) for piece in _cut(_decode(line, path, number) for number, line in enumerate(file, start=1)))


def _cut(lines: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    characters = 0
    for line in lines:
        parts.append(line)
        plain = _plain(line)
        characters += len(plain) + bool(plain)
        if characters > TXT_CHARACTERS_MOST or (characters > TXT_CHARACTERS and not plain):
            yield "".join(parts)
            parts, characters = [], 0
    yield "".join(parts)


def _read_jsonl(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        content = _decode(line, path, number)
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise SaescaleError(f"{path}, line {number}: not JSON ({one_line(error)})") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise SaescaleError(f"{path}, line {number}: no field 'text' that holds a string")
        yield number, text


def _read_parquet(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    kind = schema.field("text").type if "text" in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SaescaleError(f"{path}: no column 'text' of strings (it has {', '.join(schema.names)})")
    groups = (table.read_row_group(group, columns=["text"]).column(0) for group in range(table.num_row_groups))
    for row, text in enumerate(text for group in groups for text in group):
        yield row, text.as_py() or ""


def _decode(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SaescaleError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from error
