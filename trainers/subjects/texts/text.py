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
from saescale.trainers.subjects.texts.text_files import START, Fragment, Where, find_files
from saescale.trainers.subjects.texts.text_formats import Odd

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


class Place(NamedTuple):
    """Where a piece of a corpus begins: so much of it, and the number of its document, of which pieces stand before it
    or not (`inside`)."""

    where: Where
    doc: int
    inside: bool


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
    return (piece for piece, _ in placed_pieces(corpus, seed, column, cut))


def placed_pieces(
    corpus: str, seed: int, column: str = TEXT_COLUMN, cut: int | None = None, begin: Place | None = None
) -> Iterator[tuple[Piece, Place]]:
    """The same with the place of each, from `begin` on, the place of a piece: what stands before it is not read, or
    where it has to be (packed files, CSV, arrays of JSON) not looked at."""
    odd, where = Odd(), START if begin is None else begin.where
    if corpus == PYTHON_PROSE:
        prose = python_prose()
        order = np.random.default_rng(seed).permutation(len(prose)).tolist()
        found = (
            Fragment(at, prose[order[at]][skipped:], Where(0, at, -1, skipped))
            for at in range(where.record, len(order))
            for skipped in [where.character if at == where.record else 0]
        )
        return _numbered(found, cut, corpus, odd, begin)
    return _numbered(find_files(corpus, odd).fragments(column, odd, where), cut, corpus, odd, begin)


def corpus_digest(corpus: str) -> str:
    """By which it shows that a corpus has other files, or other prose, than when a `Place` was noted; texts that were
    changed in a file do not show. Raises what `pieces` raises."""
    parts = python_prose() if corpus == PYTHON_PROSE else find_files(corpus, Odd()).paths
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode("utf-8", "surrogateescape"))


def check_corpus(corpus: str, column: str = TEXT_COLUMN) -> None:
    """Raises what `pieces` raises for files that are not there, and up to the first text, and SaescaleError where there
    is none. Reads no more than that."""
    if corpus == PYTHON_PROSE:
        return
    odd = Odd()
    found = find_files(corpus, odd)
    if not any(fragment.text.strip() for fragment in found.fragments(column, odd)):
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


def _numbered(
    fragments: Iterable[Fragment], cut: int | None, corpus: str, odd: Odd, begin: Place | None
) -> Iterator[tuple[Piece, Place]]:
    inside = begin is not None and begin.inside
    doc = -1 if begin is None else begin.doc - (not inside)
    try:
        for _, document in groupby(fragments, key=lambda each: each.document):
            for text, where in _cut_words(document, cut) if cut else _cut_lines(document):
                if text.strip():
                    inside = inside and not cut
                    doc += not inside
                    yield Piece(doc, text), Place(where, doc, inside)
                    inside = True
            inside = False
    finally:
        for line in odd.said():
            warnings.warn(f"{corpus}: {line}", SaescaleWarning, stacklevel=2)


def _cut_lines(document: Iterator[Fragment]) -> Iterator[tuple[str, Where]]:
    """Pieces of a .txt file, which comes line by line; other documents come whole, and stay so."""
    parts: list[str] = []
    where, characters = START, 0
    for line in document:
        where = where if parts else line.where
        parts.append(line.text)
        plain = _plain(line.text)
        characters += len(plain) + bool(plain)
        if characters > TXT_CHARACTERS_MOST or (characters > TXT_CHARACTERS and not plain):
            yield "".join(parts), where
            parts, characters = [], 0
    yield "".join(parts), where


def _cut_words(document: Iterator[Fragment], most: int) -> Iterator[tuple[str, Where]]:
    """Parts of at most so many characters; texts that are equal but for whitespace are cut alike."""
    word = re.compile(rf"\S{{1,{most}}}\s*|\s+")
    parts: list[str] = []
    where, characters = START, 0
    for fragment in document:
        for found in word.finditer(fragment.text):
            plain = len(found[0].rstrip())
            if plain and characters + plain > most:
                yield "".join(parts), where
                parts, characters = [], 0
            if not parts:
                where = fragment.where._replace(character=fragment.where.character + found.start())
            parts.append(found[0])
            characters += plain + bool(plain)
    yield "".join(parts), where


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
