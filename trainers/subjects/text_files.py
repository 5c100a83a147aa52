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
from saescale.trainers.subjects.text_formats import Odd, Record, read_csv, read_json, read_parquet

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


class Files(NamedTuple):
    """The files of a corpus in the order of their names."""

    fs: AbstractFileSystem
    paths: list[str]

    def fragments(self, column: str, odd: Odd) -> Iterator[tuple[object, str]]:
        """Each text, that of `column` where a format has columns, behind what tells its document from others; a .txt
        file line by line."""
        for path in self.paths:
            for record, text in _read(self.fs, path, column, odd):
                yield (path, record), text


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


def _read(fs: AbstractFileSystem, path: str, column: str, odd: Odd) -> Iterator[Record]:
    try:
        with fs.open(path, "rb") as file:
            if (kind := _format(path)) == ".parquet":
                if not _name(path).endswith(kind):
                    raise SaescaleError(f"{path}: Parquet compresses by itself and is not read packed; unpack the file")
                yield from read_parquet(file, path, column, odd)
                return
            with _unpacked(file, path) as stream:
                lines = _lines(stream, path)
                if kind == ".txt":
                    yield from ((0, line) for _, line in lines)
                elif kind in (".csv", ".tsv"):
                    yield from read_csv(lines, path, kind, column, odd)
                else:
                    yield from read_json(lines, path, kind == ".json", column, odd)
    except SaescaleError:
        raise
    except Exception as error:  # compressors, Arrow and object stores raise classes of their own
        raise SaescaleError(f"{path}: cannot be read ({one_line(error)})") from error


# --- bytes and lines


@contextmanager
def _unpacked(file: BinaryIO, path: str) -> Iterator[io.BufferedReader]:
    with io.BufferedReader(cast(Any, file), _BUFFER) as stream:
        packed = _packed_by(stream, path)
        if packed is None:
            yield stream
            return
        with io.BufferedReader(_COMPRESSED[packed][1](cast(BinaryIO, stream)), _BUFFER) as unpacked:
            yield unpacked


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


def _lines(stream: io.BufferedReader, path: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, ended by `\\n` alone; UTF-8, or what a byte order mark says."""
    ahead = stream.peek()
    begins = ahead[:64]
    marked = next((encoding for mark, encoding in _MARKS.items() if begins.startswith(mark)), None)
    if marked is None and begins.count(0) > len(begins) // 4:
        raise SaescaleError(f"{path}: no UTF-8 text (is it binary, or UTF-16 without a byte order mark?); convert it")
    # Lines end in `\r` alone where the first do; in others, it is a character. One at the end may be half of `\r\n`.
    start = ahead.decode(marked or "utf-8", "ignore")
    end = "\r" if "\r" in start[:-1] and "\n" not in start else "\n"
    number = 0
    try:
        if marked is None and end == "\n":
            for number, line in enumerate(stream, start=1):
                yield number, _one_end((line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8"))
        else:
            for number, text in enumerate(io.TextIOWrapper(stream, marked or "utf-8-sig", newline=end), start=1):
                yield number, _one_end(text) if end == "\n" else text.replace("\r", "\n")
    except UnicodeDecodeError as error:
        # A text wrapper decodes ahead of the line, and bytes are decoded in it.
        ahead_of = marked is not None or end == "\r"
        where, at = (f"after line {number}", "") if ahead_of else (f"line {number}", f" at byte {error.start}")
        encoding = (marked or "utf-8").upper()
        raise SaescaleError(f"{path}, {where}: not {encoding} ({error.reason}{at}); convert the file") from error


def _one_end(line: str) -> str:
    return f"{line[:-2]}\n" if line.endswith("\r\n") else line
