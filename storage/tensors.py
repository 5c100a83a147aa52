"""Tensors in safetensors files: one file, or several that have a tensor's rows one after another.

They are written and read one at a time, or some megabytes of one, since they are most of what a worker has in memory:
the library of safetensors would hold one to three more copies.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files
from saescale.storage.errors import Damaged, SaescaleError, one_line

_LONGEST_HEADER = 100_000_000  # bytes; that of the format itself
_CHUNK_BYTES = 64 * 2**20  # read at a time; one request of an object store
# What safetensors calls them; bfloat16 is none of numpy's.
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"{letter.upper()}{8 * size}": np.dtype(f"<{letter}{size}") for letter in "iu" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_CUT = re.compile(r"(.+)\[(\d+):(\d+)\]")


class Part(BaseModel):
    """A file of tensors: its name, size in bytes, and xxh3-64 (hex; empty where nobody has said it)."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    file: str
    bytes: int = Field(ge=0, le=2**62)
    xxh3: str


class Piece(NamedTuple):
    """Rows `first` to `last` of a tensor, and what a file calls them."""

    tensor: str
    first: int
    last: int
    key: str


def cut_name(tensor: str, first: int, last: int) -> str:
    """What a file calls those rows of a tensor of which other files have the rest: W_enc[0:4096]."""
    return f"{tensor}[{first}:{last}]"


def write_tensors(
    url: str, name: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Part:
    """Writes the safetensors file `name` in the folder `url`."""
    checksum = xxhash.xxh3_64()
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header = _header({key: (codes[tensor.dtype], list(tensor.shape)) for key, tensor in tensors.items()}, metadata)

    def write(file: BinaryIO) -> None:
        checksum.reset()
        for content in chain([header], map(_content, tensors.values())):
            checksum.update(content)
            file.write(content)

    size = files.write_atomic(files.join(url, name), write)
    return Part(file=name, bytes=size, xxh3=checksum.hexdigest())


class File:
    """One file of tensors, whose header alone is read until `check`."""

    def __init__(self, url: str, part: Part) -> None:
        self.url, self._part = files.join(url, part.file), part
        with self.open() as file:
            found = files.size(self.url)
            if found != part.bytes:
                raise Damaged(f"{self.url} has {found} bytes, not {part.bytes}", self.url)
            entries, self._first = read_header(file, part.bytes, self.url)
        self.metadata: dict[str, str] = entries.pop("__metadata__", {})
        self.entries = entries

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            with files.reading(self.url), files.open_input(self.url, known_size=self._part.bytes) as file:
                yield file
        except FileNotFoundError as error:
            raise Damaged(f"{self.url} is missing", self.url) from error

    def check(self) -> None:
        """Raises SaescaleError where its content is not what was written."""
        if not self._part.xxh3:
            return
        checksum = xxhash.xxh3_64()
        with self.open() as file:
            while chunk := file.read(_CHUNK_BYTES):
                checksum.update(chunk)
        if checksum.hexdigest() != self._part.xxh3:
            raise Damaged(f"{self.url} has a wrong checksum", self.url)

    def rows(self, key: str) -> int:
        """Of a tensor; 1 of a scalar."""
        return (self.entries[key]["shape"] or [1])[0]

    def read(self, key: str, first: int, last: int) -> np.ndarray:
        entry = self.entries[key]
        found = np.empty([last - first, *entry["shape"][1:]] if entry["shape"] else [], dtype=_DTYPES[entry["dtype"]])
        content, end = found.reshape(-1).view(np.uint8), 0
        for chunk in self.chunks(key, first, last):
            content[end : end + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            end += len(chunk)
        if end < len(content):
            raise Damaged(f"{self.url} was cut short while it was read", self.url)
        return found

    def chunks(self, key: str, first: int, last: int) -> Iterator[bytes]:
        """The bytes of some rows, so many at a time as one request reads."""
        start, end = self.entries[key]["data_offsets"]
        each = (end - start) // max(1, self.rows(key))
        with self.open() as file:
            file.seek(self._first + start + first * each)
            left = (last - first) * each
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk


class _Place(NamedTuple):
    """Which file has some rows of a tensor."""

    file: File
    key: str
    first: int
    last: int


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of some files of the folder `url` by name, each read whenever it is asked for.

    What a file calls W[0:5] are those rows of the tensor W; what several files call W are its rows one after another.
    Files are checked now; `rows`: the latents of which the caller wants to know, when several processes share a cell,
    and files of others alone are left alone. Raises SaescaleError where a file is missing, or not as it was written, or
    none has what is asked for.
    """

    def __init__(self, url: str, parts: Sequence[Part], rows: slice | None = None) -> None:
        self._url = files.join(url, parts[0].file)
        self._files = [File(url, part) for part in parts]
        self._places: dict[str, list[_Place]] = {}
        for file in self._files:
            for key in file.entries:
                cut = _CUT.fullmatch(key)
                before = self._places.setdefault(cut[1] if cut else key, [])
                first = int(cut[2]) if cut else before[-1].last if before else 0
                before.append(_Place(file, key, first, first + file.rows(key)))
        for name, places in self._places.items():
            places.sort(key=lambda place: place.first)
            ends = [0, *(place.last for place in places)]
            if any(place.first != end for place, end in zip(places, ends, strict=False)):
                raise Damaged(f"{self._url} lacks rows of the tensor {name}, or has some twice", self._url)
        for number, file in enumerate(self._files):
            # The first one has what is not cut into shards.
            if number == 0 or rows is None or self._reaches(file, rows):
                file.check()

    @property
    def metadata(self) -> dict[str, str]:
        """That of the first file."""
        return self._files[0].metadata

    def _reaches(self, file: File, rows: slice) -> bool:
        mine = (place for places in self._places.values() for place in places if place.file is file)
        return any(place.first < rows.stop and rows.start < place.last for place in mine)

    def entries(self) -> dict[str, tuple[str, list[int]]]:
        """Type and shape of each tensor."""
        found = {}
        for name, places in self._places.items():
            kind, shape = (places[0].file.entries[places[0].key][what] for what in ("dtype", "shape"))
            found[name] = kind, [places[-1].last, *shape[1:]] if shape else []
        return found

    def rows(self, name: str, wanted: slice | None = None) -> np.ndarray:
        """Some rows of a tensor (None: all), from the files that have them."""
        if name not in self._places:
            raise SaescaleError(f"{self._url} lacks the tensor {name}")
        places = self._places[name]
        start, stop = (0, places[-1].last) if wanted is None else (wanted.start, wanted.stop)
        parts = [
            (place, max(place.first, start), min(place.last, stop))
            for place in places
            if wanted is None or (place.first < stop and start < place.last)
        ]
        if sum(high - low for _, low, high in parts) != stop - start:
            raise SaescaleError(f"{self._url} lacks rows {start} to {stop} of the tensor {name}")
        if len(parts) == 1:
            place, low, high = parts[0]
            return place.file.read(place.key, low - place.first, high - place.first)
        kind, shape = self.entries()[name]
        whole = np.empty([stop - start, *shape[1:]], dtype=_DTYPES[kind])
        for place, low, high in parts:
            whole[low - start : high - start] = place.file.read(place.key, low - place.first, high - place.first)
        return whole

    def copy(self, url: str, name: str, pieces: Iterable[Piece], metadata: Mapping[str, str] | None = None) -> Part:
        """Writes some rows of tensors to the file `name` in the folder `url`, some megabytes at a time."""
        pieces, of = list(pieces), self.entries()
        shapes = {
            piece.key: (of[piece.tensor][0], [piece.last - piece.first, *shape[1:]] if shape else [])
            for piece in pieces
            for shape in [of[piece.tensor][1]]
        }
        header, checksum = _header(shapes, metadata), xxhash.xxh3_64()

        def write(file: BinaryIO) -> None:
            checksum.reset()
            for content in chain([header], *map(self._chunks, pieces)):
                checksum.update(content)
                file.write(content)

        files.write_large(files.join(url, name), write)
        size = len(header) + sum(math.prod(shape) * BYTES[code] for code, shape in shapes.values())
        return Part(file=name, bytes=size, xxh3=checksum.hexdigest())

    def _chunks(self, piece: Piece) -> Iterator[bytes]:
        for place in self._places[piece.tensor]:
            low, high = max(place.first, piece.first), min(place.last, piece.last)
            if low < high:
                yield from place.file.chunks(place.key, low - place.first, high - place.first)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of `size` bytes and where its tensors begin. Raises SaescaleError, before
    anything is made of what the header says, where that is not in the file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise Damaged(f"{where} is truncated: {size} bytes", where)
    if length > _LONGEST_HEADER:
        raise Damaged(f"{where} is no safetensors file, or damaged at its beginning", where)
    if length > size - 8:
        raise Damaged(f"{where} is truncated: {size:,} bytes, of which its header alone would be {length:,}", where)
    try:
        entries = dict(json.loads(file.read(length)))
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        for name, entry in tensors.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end or math.prod(entry["shape"]) * BYTES[entry["dtype"]] != end - start:
                raise ValueError(f"the tensor {name} has not the bytes of its shape")
        last = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(
            f"{where} is damaged: its header is no header of safetensors ({one_line(error)})", where
        ) from error
    if last != size:
        fault = "truncated" if size < last else "too long"
        raise Damaged(f"{where} is {fault}: {size:,} bytes, and its header says {last:,}", where)
    return entries, 8 + length


def _header(tensors: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Of tensors with that type and shape, one after another; the bytes that the library of safetensors writes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (code, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[code]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _content(tensor: np.ndarray) -> Any:  # numpy's types do not say that an array is a buffer
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
