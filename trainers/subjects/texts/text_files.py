"""Which files a corpus names, and their lines: unpacked, decoded, ended alike. A mistake names file and line."""

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
from fsspec import AbstractFileSystem

from saescale.storage import files
from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.subjects.texts.text_formats import Odd, read_csv, read_json, read_parquet

FORMATS = (".txt", ".jsonl", ".ndjson", ".parquet")
# What often lies beside a corpus to describe it: of a folder read only where there is nothing of FORMATS.
OTHER_FORMATS = (".json", ".csv", ".tsv")

# Of each compression how its files begin; no UTF-8 text begins like the three that are known without a name.
_COMPRESSED: dict[str, tuple[bytes, Callable[[BinaryIO], Any]]] = {
    ".gz": (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    ".xz": (b"\xfd7zXZ\x00", lzma.LZMAFile),
    ".zst": (b"\x28\xb5\x2f\xfd", lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")),
    ".bz2": (b"BZh", bz2.BZ2File),
}
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_BUFFER = 2**16


class Where(NamedTuple):
    """A place in a corpus: number `file` of its files; the line, row or entry `record` there; the byte at which that
    begins, -1 where one cannot begin to read there (packed files, arrays); a character of its text."""

    file: int
    record: int
    byte: int
    character: int


class Fragment(NamedTuple):
    """A text, or a line of a .txt file, and where it begins. `document` is equal for all that belongs to one document
    and stands together."""

    document: object
    text: str
    where: Where


START = Where(0, 0, -1, 0)


class Files(NamedTuple):
    """The files of a corpus in the order of their names."""

    fs: AbstractFileSystem
    paths: list[str]

    def fragments(self, column: str, odd: Odd, begin: Where = START) -> Iterator[Fragment]:
        """Each text, that of `column` where a format has columns; a .txt file line by line. From `begin` on, where an
        earlier reading found one."""
        for file in range(begin.file, len(self.paths)):
            first = begin if file == begin.file else START
            for document, text, record, byte in _read(self.fs, self.paths[file], column, odd, first.record, first.byte):
                skipped = first.character if record == first.record else 0
                yield Fragment((file, document), text[skipped:], Where(file, record, byte, skipped))


def find_files(corpus: str, odd: Odd) -> Files:
    """The files that `corpus` names: a file, a folder (without what is hidden, and what is no text), or a pattern.

    Raises SaescaleError where there are none, where one that is named is of no known format, and where the store
    cannot be asked.
    """
    if not corpus.strip():
        raise SaescaleError("the corpus has no name: give a path, pattern or URL, or python-prose")
    fs, path = files.filesystem(corpus)
    try:
        found = _candidates(fs, path, odd)
    except SaescaleError:
        raise
    except Exception as error:  # object stores raise classes of their own
        raise SaescaleError(f"cannot look for the corpus {corpus}: {one_line(error)}") from error
    if not found:
        raise SaescaleError(
            f"no text file matches the corpus {corpus!r}: give a path, pattern, folder or URL of "
            f"{', '.join(FORMATS + OTHER_FORMATS)} files, or 'python-prose'{_of_hub(corpus)}"
        )
    for name in found:
        if _format(name) is None:
            known = ", ".join(FORMATS + OTHER_FORMATS)
            raise SaescaleError(f"{name}: no format of a corpus: it must be {known}, or such a file with .gz")
    return Files(fs, found)


def _of_hub(corpus: str) -> str:
    """What to do about what may be the name of a data set."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", corpus) or _format(corpus):
        return ""
    return f"; of a data set of the Hugging Face hub download the files, or give 'hf://datasets/{corpus}/**/*.parquet'"


def _candidates(fs: AbstractFileSystem, path: str, odd: Odd) -> list[str]:
    """A name is first taken as it is, since files may be called `b[1].jsonl`."""
    if fs.isfile(path):
        return [path]
    if fs.isdir(path):
        return _in_folder(fs, path, odd)
    if any(character in path for character in "*?["):
        # Brackets may also be part of a folder's name before a pattern.
        found = fs.glob(path, detail=True) or fs.glob(path.replace("[", "[[]"), detail=True)
        if names := _regular(fs, found, odd):
            return names
    try:
        kind = fs.info(path)["type"]
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # of a web server that refused
            raise error.__cause__ from None
        return []
    raise SaescaleError(f"{path}: neither a file nor a folder ({kind}), so it cannot be read twice; make it a file")


def _in_folder(fs: AbstractFileSystem, folder: str, odd: Odd) -> list[str]:
    below = len(folder.rstrip("/")) + 1
    found = fs.find(folder, detail=True)
    seen = {n: about for n, about in found.items() if not any(part.startswith(".") for part in n[below:].split("/"))}
    names = _regular(fs, seen, odd)
    taken = [name for name in names if _format(name) in FORMATS] or [name for name in names if _format(name)]
    for name in sorted({*names}.difference(taken)) if taken else ():
        odd.count("files of the folder that were not read, being of another format", name)
    return taken


def _regular(fs: AbstractFileSystem, found: dict[str, Any], odd: Odd) -> list[str]:
    """What can be read, in the order of the names; links are followed to files, not into folders."""
    names = []
    for name, about in sorted(found.items()):
        if about["type"] == "file" or (about["type"] == "other" and fs.isfile(name)):
            names.append(str(name))
        elif about["type"] != "directory":
            odd.count("what is no file (a pipe, a link to a folder or to nothing) and was not read", name)
    return names


def _format(path: str) -> str | None:
    """Which format the name says, whatever its case, compression put aside; None when it says none."""
    name = _name(path)
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return next((end for end in FORMATS + OTHER_FORMATS if name.endswith(end)), None)


def _name(path: str) -> str:
    web = path.lower().startswith(("http://", "https://"))
    return (path.partition("?")[0] if web else path).lower()


def _read(
    fs: AbstractFileSystem, path: str, column: str, odd: Odd, first: int, byte: int
) -> Iterator[tuple[int, str, int, int]]:
    """From record `first` on, which begins at `byte` if that is known: which of the file's documents, the text, the
    number of its record, and the byte at which that begins, if one can begin there."""
    try:
        with fs.open(path, "rb") as file:
            if (kind := _format(path)) == ".parquet":
                if not _name(path).endswith(kind):
                    raise SaescaleError(f"{path}: Parquet compresses by itself and is not read packed; unpack the file")
                yield from ((row, text, row, -1) for row, text in read_parquet(file, path, column, odd, first))
                return
            with _begun(file, path, first, byte) as lines:
                if kind == ".txt":
                    yield from ((0, line, number, lines.byte) for number, line in lines if number >= first)
                elif kind in (".csv", ".tsv"):
                    yield from ((row, text, row, -1) for row, text in read_csv(iter(lines), path, kind, column, first))
                else:
                    found = read_json(iter(lines), path, kind == ".json", column, odd, first, by_lines=byte > 0)
                    yield from ((row, text, row, lines.byte) for row, text in found)
    except SaescaleError:
        raise
    except Exception as error:  # compressors, Arrow and object stores raise classes of their own
        raise SaescaleError(f"{path}: cannot be read ({one_line(error)})") from error


# --- bytes and lines


class _Lines:
    """Lines with their numbers from 1, ended by `\\n` alone; `byte` is where the last one begins, -1 behind the end
    and where one cannot begin to read there."""

    def __init__(self, found: Iterator[tuple[int, str, int]]) -> None:
        self._found, self.byte = found, -1

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, text, byte in self._found:
            self.byte = byte
            yield number, text
        self.byte = -1


@contextmanager
def _begun(file: BinaryIO, path: str, number: int, byte: int) -> Iterator[_Lines]:
    """The lines of the file: all, or those from line `number` on where that begins at a known byte."""
    if byte <= 0:
        with _unpacked(file, path) as (stream, packed):
            yield _Lines(_lines(stream, path, packed))
        return
    file.seek(byte - 1)
    with io.BufferedReader(cast(Any, file), _BUFFER) as stream:
        if stream.read(1) != b"\n":
            raise SaescaleError(f"{path}: no line begins at byte {byte} any more; restore the corpus as it was")
        yield _Lines(_utf8_lines(stream, path, number, byte))


@contextmanager
def _unpacked(file: BinaryIO, path: str) -> Iterator[tuple[io.BufferedReader, bool]]:
    """And whether it was packed."""
    with io.BufferedReader(cast(Any, file), _BUFFER) as stream:
        packed = _packed_by(stream, path)
        if packed is None:
            yield stream, False
            return
        with io.BufferedReader(_COMPRESSED[packed][1](cast(BinaryIO, stream)), _BUFFER) as unpacked:
            yield unpacked, True


def _packed_by(stream: io.BufferedReader, path: str) -> str | None:
    begins = stream.peek(6)
    named = next((end for end in _COMPRESSED if _name(path).endswith(end)), None)
    if not begins:
        return None
    if begins.startswith(b"PAR1\x15"):
        raise SaescaleError(f"{path}: is a Parquet file; give it a name that ends in .parquet")
    if named is None:
        if begins.startswith(b"PK\x03\x04"):
            raise SaescaleError(f"{path}: is a zip archive; unpack it")
        return next((end for end in (".gz", ".xz", ".zst") if begins.startswith(_COMPRESSED[end][0])), None)
    if not begins.startswith(_COMPRESSED[named][0]):
        raise SaescaleError(f"{path}: is not what {named} says; give the file the name of what it is")
    return named


def _lines(stream: io.BufferedReader, path: str, packed: bool) -> Iterator[tuple[int, str, int]]:
    """As `_Lines` has them; UTF-8, or what a byte order mark says."""
    ahead = stream.peek()
    begins = ahead[:64]
    marked = next((encoding for mark, encoding in _MARKS.items() if begins.startswith(mark)), None)
    if marked is None and begins.count(0) > len(begins) // 4:
        raise SaescaleError(f"{path}: no UTF-8 text (is it binary, or UTF-16 without a byte order mark?); convert it")
    # Lines end in `\r` alone where the first do; in others, it is a character. One at the end may be half of `\r\n`.
    start = ahead.decode(marked or "utf-8", "ignore")
    end = "\r" if "\r" in start[:-1] and "\n" not in start else "\n"
    if marked is None and end == "\n":
        for number, text, byte in _utf8_lines(stream, path, 1, 0):
            yield number, text, -1 if packed else byte
        return
    number = 0
    try:
        for number, text in enumerate(io.TextIOWrapper(stream, marked or "utf-8-sig", newline=end), start=1):
            yield number, _one_end(text) if end == "\n" else text.replace("\r", "\n"), -1
    except UnicodeDecodeError as error:
        raise _not_text(f"after line {number}", path, marked, error, "") from error  # it decodes ahead of the line


def _utf8_lines(stream: io.BufferedReader, path: str, number: int, byte: int) -> Iterator[tuple[int, str, int]]:
    """From line `number` on, which begins at `byte`."""
    for line in stream:
        try:
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_text(f"line {number}", path, None, error, f" at byte {error.start}") from error
        yield number, _one_end(text), byte
        number, byte = number + 1, byte + len(line)


def _not_text(where: str, path: str, marked: str | None, error: UnicodeDecodeError, at: str) -> SaescaleError:
    encoding = (marked or "utf-8").upper()
    return SaescaleError(f"{path}, {where}: not {encoding} ({error.reason}{at}); convert the file")


def _one_end(line: str) -> str:
    return f"{line[:-2]}\n" if line.endswith("\r\n") else line
