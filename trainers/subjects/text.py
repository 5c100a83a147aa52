"""Text for a harvest: a corpus that every Python ships, or any text files reachable through fsspec."""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.trainers.subjects.text_files import find_files
from saescale.trainers.subjects.text_formats import Odd

PYTHON_PROSE = "python-prose"
TEXT_COLUMN = "text"

DOCSTRING_CHARACTERS = 200  # shorter ones are hardly prose
TXT_CHARACTERS = 8_000  # a long .txt file comes in pieces, cut at the first blank line after this many
TXT_CHARACTERS_MOST = 32_000  # ... or at the first line's end after this many

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Piece(NamedTuple):
    """Text of document number `doc` of a corpus: all of it, or a piece of a long .txt file, which is one document."""

    doc: int
    text: str


def pieces(corpus: str, seed: int, column: str = TEXT_COLUMN, cut: int | None = None) -> Iterator[Piece]:
    """The documents of a corpus in an order that is a pure function of (corpus, seed); no piece is blank.

    `corpus` is "python-prose" (permuted by `seed`), or a path, pattern, folder or fsspec URL of files that are read in
    the order of their names: .txt (a document each), and .jsonl, .json, .parquet, .csv and .tsv with the texts in
    `column`; all but Parquet may be compressed (.gz, .bz2, .xz, .zst). A .txt file longer than 8,000 characters comes
    in pieces, cut at blank lines. With `cut`, documents longer than so many characters (runs of whitespace as one) are
    cut between words, and every part is a document.

    Halves of surrogate pairs are read as U+FFFD, since they are no text. They, null texts, and files of a folder that
    were not read are said in a SaescaleWarning when the reading ends. Raises SaescaleError naming the file and line
    that cannot be read; no match is told at once.
    """
    odd = Odd()
    if corpus == PYTHON_PROSE:
        prose = python_prose()
        order = np.random.default_rng(seed).permutation(len(prose)).tolist()
        return _numbered(((index, prose[index]) for index in order), cut, corpus, odd)
    return _numbered(find_files(corpus, odd).fragments(column, odd), cut, corpus, odd)


def check_corpus(corpus: str, column: str = TEXT_COLUMN) -> None:
    """Raises what `pieces` raises for files that are not there, and up to the first text, and SaescaleError where there
    is none. Reads no more than that."""
    if corpus == PYTHON_PROSE:
        return
    odd = Odd()
    found = find_files(corpus, odd)
    if not any(text.strip() for _, text in found.fragments(column, odd)):
        files = f"{len(found.paths)} file{'s' * (len(found.paths) != 1)}"
        passed = "".join(f"; {line}" for line in odd.said())
        raise SaescaleError(f"the corpus {corpus} holds no text: {files}, of empty or blank texts{passed}")


def content_key(text: str) -> int:
    """The XXH3-64 by which equal texts are known: of the first 8,000 characters, runs of whitespace as one space.

    The first piece of a file has as many, so it has one key with a .jsonl document of the whole text.
    """
    return xxhash.xxh3_64_intdigest(_plain(text)[:TXT_CHARACTERS].encode())


def _plain(text: str) -> str:
    return " ".join(text.split())


# --- documents, their numbers and their pieces

_Fragment = tuple[object, str]  # of which document, equal for all that belongs to one and stands together; and text


def _numbered(fragments: Iterable[_Fragment], cut: int | None, corpus: str, odd: Odd) -> Iterator[Piece]:
    doc = -1
    try:
        for _, group in groupby(fragments, key=lambda each: each[0]):
            document = (text for _, text in group)
            started = False
            for text in _cut_words(document, cut) if cut else _cut_lines(document):
                if text.strip():
                    doc += bool(cut) or not started
                    started = True
                    yield Piece(doc, text)
    finally:
        for line in odd.said():
            warnings.warn(f"{corpus}: {line}", SaescaleWarning, stacklevel=2)


def _cut_lines(document: Iterator[str]) -> Iterator[str]:
    """Pieces of a .txt file, which comes line by line; other documents come whole, and stay so."""
    parts: list[str] = []
    characters = 0
    for line in document:
        parts.append(line)
        plain = _plain(line)
        characters += len(plain) + bool(plain)
        if characters > TXT_CHARACTERS_MOST or (characters > TXT_CHARACTERS and not plain):
            yield "".join(parts)
            parts, characters = [], 0
    yield "".join(parts)


def _cut_words(document: Iterator[str], most: int) -> Iterator[str]:
    """Parts of at most so many characters; texts that are equal but for whitespace are cut alike."""
    word = re.compile(rf"\S{{1,{most}}}\s*|\s+")
    parts: list[str] = []
    characters = 0
    for fragment in document:
        for found in word.finditer(fragment):
            plain = len(found[0].rstrip())
            if plain and characters + plain > most:
                yield "".join(parts)
                parts, characters = [], 0
            parts.append(found[0])
            characters += plain + bool(plain)
    yield "".join(parts)


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
