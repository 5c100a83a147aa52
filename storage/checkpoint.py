"""Checkpoints of one cell: the newest two generations in safetensors, found by an atomic pointer, and whose turn it is.

A pointer is written last, and a file that it names is never written again, so a kill at any moment leaves the old
generations or the new ones. Whoever trains the cell takes a turn first: it creates the pointer `latest-TURN.json` of
the next number, which nobody else then can, and which only it writes. Readers go by the highest. The result takes the
number after the turn's, so that a turn that was followed by another one can end nothing. RUN.md says why that is safe.

Tensors are written and read one at a time, since a cell's state is most of a worker's memory: the library of
safetensors would hold one to three more copies of it.
"""

import json
import math
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files
from saescale.storage.documents import CHECKSUM, checksum, read_model
from saescale.storage.errors import Damaged, SaescaleError, SaescaleWarning, Superseded, one_line

_FORMAT = 1
_LONGEST_HEADER = 100_000_000  # bytes; that of the format itself
POINTER = "latest.json"  # of no turn: of version 0.1.0, and of a folder that nobody else writes
KEPT = 2
_POINTER = re.compile(r"latest(?:-(\d+))?\.json")
_CHUNK_BYTES = 64 * 2**20  # read at a time; one request of an object store
# What safetensors calls them; bfloat16 is none of numpy's.
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"{letter.upper()}{8 * size}": np.dtype(f"<{letter}{size}") for letter in "iu" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class Part(BaseModel):
    """A file of tensors: its name, size in bytes, and xxh3-64 (hex)."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    file: str
    bytes: int = Field(ge=0, le=2**62)
    xxh3: str


class Generation(Part):
    """One checkpoint: its file, the step, and the caller's JSON.

    `more`: the files of the other processes, where several share the cell, in the order of their latents. A tensor that
    several files have is their rows one after another, whatever the number of processes was.
    """

    step: int = Field(ge=0, le=2**62)
    meta: dict[str, Any]
    more: list[Part] = []

    def parts(self) -> list[Part]:
        return [Part(file=self.file, bytes=self.bytes, xxh3=self.xxh3), *self.more]


class Pointer(BaseModel):
    """Content of a pointer, newest generation first. `ended`: the result, in the one that takes the last number."""

    # NaN in `meta` (a diverged loss) must come back as NaN.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    format: int = _FORMAT
    generations: list[Generation] = []
    ended: dict[str, Any] | None = None
    by: str = ""  # no two are alike, so that whoever created one knows it again

    def files(self) -> set[str]:
        """Of all its generations."""
        return {part.file for generation in self.generations for part in generation.parts()}

    def content(self) -> bytes:
        document = json.loads(self.model_dump_json())
        for generation in document["generations"]:
            if not generation["more"]:
                del generation["more"]
        return json.dumps(document | {CHECKSUM: checksum(document)}).encode()


class Turn(NamedTuple):
    """Whose turn it is at a cell: its number, and the cell's result where the last turn has ended."""

    number: int
    ended: dict[str, Any] | None = None


def take(url: str) -> Turn:
    """Takes the next turn at the cell with the folder `url`, with the checkpoints that the last one had.

    Takes none where the last turn has ended with a result, unless that says `failed`.
    """
    while True:
        last = _last_turn(files.list_names(url))
        before = _read(url, last)
        if before.ended is not None and before.ended.get("status") != "failed":
            return Turn(last, before.ended)
        mine = Pointer(generations=before.generations, by=uuid.uuid4().hex)
        where = files.join(url, pointer_name(last + 1))
        if files.create(where, mine.content()):
            break
    # What was saved between reading and taking may have replaced what was read, and nothing will from now on.
    if (now := _read(url, last).generations) != before.generations:
        files.write_atomic(where, mine.model_copy(update={"generations": now}).content())
    return Turn(last + 1)


def end(url: str, turn: int, result: dict[str, Any], keep: bool = False) -> None:
    """Ends a turn with the cell's result (JSON); `keep`: its checkpoints stay, for another try.

    Raises Superseded where another turn was taken.
    """
    generations = _read(url, turn).generations if keep else []
    pointer = Pointer(generations=generations, ended=result, by=uuid.uuid4().hex)
    if not files.create(files.join(url, pointer_name(turn + 1)), pointer.content()):
        raise _superseded(url)


def clear(url: str, failed: bool) -> None:
    """Removes the checkpoints of a cell that has its result; of one that failed, which may be tried again, only those
    that are not kept for it, and no numbers of turns."""
    if not failed:
        files.remove(url)
        return
    present = files.list_names(url)
    _remove_generations(url, present, _read(url, _last_turn(present)).files())


def save(
    url: str, step: int, tensors: Mapping[str, np.ndarray], meta: dict[str, Any], keep: int | None = None, turn: int = 0
) -> None:
    """Adds a checkpoint to the folder `url` and removes all but the newest two; `meta` is JSON.

    A generation at this step or a later one is replaced: whoever saves step s has gone back to before it. `keep`: the
    step to go back to, when this is one of several folders that go back together. A generation between the two is of
    an attempt that was given up, and would push that one out. Raises Superseded where a turn after `turn` was taken.
    """
    commit(url, step, [write_part(url, step, tensors, turn)], meta, keep, turn)


def write_part(
    url: str, step: int, tensors: Mapping[str, np.ndarray], turn: int = 0, shard: int = 0, shards: int = 1
) -> Part:
    """Writes what one of `shards` processes has of a checkpoint, which counts when `commit` was told of all parts."""
    present = _present(url, turn)
    of_shard = f"-shard-{shard:05d}-of-{shards:05d}" if shards > 1 else ""
    return write_tensors(url, next(name for name in _names(step, turn, of_shard) if name not in present), tensors)


def write_tensors(url: str, name: str, tensors: Mapping[str, np.ndarray]) -> Part:
    """Writes the safetensors file `name` in the folder `url`."""
    checksum = xxhash.xxh3_64()
    size = files.write_atomic(files.join(url, name), lambda file: _write(file, tensors, checksum))
    return Part(file=name, bytes=size, xxh3=checksum.hexdigest())


def join(url: str, parts: Sequence[Part], name: str, metadata: Mapping[str, str]) -> None:
    """Makes one safetensors file of parts that processes wrote of what they share, and removes these when it is whole.

    Some megabytes at a time, so nobody needs the memory for all of it. Raises SaescaleError where a part is damaged.
    """
    whole = Tensors(url, Generation(**parts[0].model_dump(), step=0, meta={}, more=list(parts[1:])))
    files.write_large(files.join(url, name), lambda file: whole.copy(file, metadata))
    for part in parts:
        files.remove(files.join(url, part.file))


def commit(
    url: str, step: int, parts: Sequence[Part], meta: dict[str, Any], keep: int | None = None, turn: int = 0
) -> None:
    """Makes parts that were written, in the order of their shards, the newest checkpoint; see `save`."""
    present = _present(url, turn)
    bound = step - 1 if keep is None else min(keep, step - 1)
    mine = _read(url, turn)
    older = [generation for generation in mine.generations if generation.step <= bound]
    newest = Generation(**parts[0].model_dump(), step=step, meta=meta, more=list(parts[1:]))
    pointer = Pointer(generations=[newest, *older[: KEPT - 1]], by=mine.by)
    files.write_atomic(files.join(url, pointer_name(turn)), pointer.content())
    # Whoever takes a turn after this finds the new pointer; whoever took one before may need what the old one names.
    _present(url, turn)
    _remove_generations(url, present, pointer.files())
    for stale in present:
        if (match := _POINTER.fullmatch(stale)) and int(match[1] or 0) < turn:
            files.remove(files.join(url, stale))


def pointer_name(turn: int) -> str:
    """The file of a turn's pointer."""
    return f"latest-{turn:05d}.json" if turn else POINTER


def _last_turn(names: Iterable[str]) -> int:
    """The highest turn of those files; 0 where nobody has taken one."""
    return max((int(match[1] or 0) for name in names if (match := _POINTER.fullmatch(name))), default=0)


def _present(url: str, turn: int) -> list[str]:
    """The names in the folder. Raises Superseded where a turn after `turn` was taken."""
    names = files.list_names(url)
    if _last_turn(names) > turn:
        raise _superseded(url)
    return names


def _superseded(url: str) -> Superseded:
    return Superseded(f"{url}: the cell has been taken over by another worker; this one stops")


def _remove_generations(url: str, present: Iterable[str], kept: set[str]) -> None:
    for stale in sorted(set(present) - kept):
        if stale.startswith("step-") and stale.endswith(".safetensors"):
            files.remove(files.join(url, stale))


def _names(step: int, turn: int, of_shard: str) -> Iterator[str]:
    """What a part may be called: the first of these that is free, since no file is ever written again."""
    of_turn = (f"-turn-{turn:05d}" if turn else "") + of_shard
    yield f"step-{step:08d}{of_turn}.safetensors"
    for number in range(1, 10**6):
        yield f"step-{step:08d}{of_turn}-{number}.safetensors"


def has_any(names: Iterable[str]) -> bool:
    """Whether there is a checkpoint among the files of a cell (`RunDirectory.cell_files`)."""
    return any(name.startswith("checkpoint/step-") for name in names)


def steps(url: str) -> list[int]:
    """The steps that can be loaded, newest first; [] when there is no checkpoint."""
    return [generation.step for generation in _generations(url)]


def load(
    url: str, step: int | None = None, rows: slice | None = None
) -> tuple["Tensors", dict[str, Any], int]:  # fmt: skip
    """(tensors, meta, step) of the checkpoint at `step`, or of the newest sound one.

    Whole files are checked now; a tensor is read when it is asked for, into memory of its own. `rows`: the latents of
    which the caller wants to know, when several processes share the cell; files of others are left alone. A damaged
    newest is passed over with a warning when `step` is None. SaescaleError when nothing sound is there.
    """
    generations = _generations(url)
    wanted = [generation for generation in generations if step is None or generation.step == step]
    if not wanted:
        found = ", ".join(str(generation.step) for generation in generations) or "none"
        raise SaescaleError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {url} (steps there: {found}); "
            "give one of those steps, or train the cell again"
        )
    faults = []
    for generation in wanted:
        try:
            return Tensors(url, generation, rows), generation.meta, generation.step
        except SaescaleError as error:
            faults.append(str(error))
            if generation is not wanted[-1]:
                warnings.warn(f"{error}; going back to the checkpoint before it", SaescaleWarning, stacklevel=2)
    raise SaescaleError(f"no sound checkpoint in {url}: {'; '.join(faults)}; remove the folder to start anew")


def _generations(url: str) -> list[Generation]:
    return _read(url, _last_turn(files.list_names(url))).generations


def _read(url: str, turn: int) -> Pointer:
    where = files.join(url, pointer_name(turn))
    try:
        return read_model(where, Pointer, "its cell has no checkpoint any more and starts from the beginning", _FORMAT)
    except FileNotFoundError:
        return Pointer()
    except Damaged as error:
        warnings.warn(str(error), SaescaleWarning, stacklevel=4)
        return Pointer()


class _File:
    """One file of tensors, whose header alone is read until `check`."""

    def __init__(self, url: str, part: Part) -> None:
        self.url, self._part = files.join(url, part.file), part
        found = files.size(self.url)
        if found != part.bytes:
            raise SaescaleError(f"{self.url} has {found} bytes, not {part.bytes}")
        with self.open() as file:
            entries, self._first = read_header(file, part.bytes, self.url)
        self.entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            with files.reading(self.url), files.open_input(self.url, known_size=self._part.bytes) as file:
                yield file
        except FileNotFoundError as error:
            raise SaescaleError(f"{self.url} is missing") from error

    def check(self) -> None:
        checksum = xxhash.xxh3_64()
        with self.open() as file:
            while chunk := file.read(_CHUNK_BYTES):
                checksum.update(chunk)
        if checksum.hexdigest() != self._part.xxh3:
            raise SaescaleError(f"{self.url} has a wrong checksum")

    def rows(self, name: str) -> int:
        """Of a tensor; 1 of a scalar, and 0 where it is not here."""
        return (self.entries[name]["shape"] or [1])[0] if name in self.entries else 0

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        entry = self.entries[name]
        start, end = entry["data_offsets"]
        each = (end - start) // max(1, self.rows(name))
        with self.open() as file:
            file.seek(self._first + start + first * each)
            # A bytearray, since torch needs memory that it may write.
            content = bytearray(file.read((last - first) * each))
        shape = [last - first, *entry["shape"][1:]] if entry["shape"] else []
        return np.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).reshape(shape)

    def copy(self, name: str, to: BinaryIO) -> None:
        start, end = self.entries[name]["data_offsets"]
        with self.open() as file:
            file.seek(self._first + start)
            for left in range(end - start, 0, -_CHUNK_BYTES):
                to.write(file.read(min(left, _CHUNK_BYTES)))


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one generation by name, each read from its files whenever it is asked for.

    Raises SaescaleError where a file is missing, or not as it was written, or none has the tensor.
    """

    def __init__(self, url: str, generation: Generation, rows: slice | None = None) -> None:
        self._url = files.join(url, generation.file)
        self._files = [_File(url, part) for part in generation.parts()]
        self._names = dict.fromkeys(name for file in self._files for name in file.entries)
        for number, file in enumerate(self._files):
            # The first one has what is not cut into shards.
            if number == 0 or rows is None or self._reaches(number, rows):
                file.check()

    def _reaches(self, number: int, rows: slice) -> bool:
        return any(
            first < rows.stop and rows.start < last
            for name in self._files[number].entries
            for file, first, last in self._places(name)
            if file is self._files[number]
        )

    def _places(self, name: str) -> Iterator[tuple[_File, int, int]]:
        """Each file that has some of the tensor, and which of its rows."""
        first = 0
        for file in self._files:
            if name in file.entries:
                yield file, first, first + file.rows(name)
                first += file.rows(name)

    def rows(self, name: str, wanted: slice | None = None) -> np.ndarray:
        """Some rows of a tensor (None: all), from the files that have them."""
        if name not in self._names:
            raise SaescaleError(f"{self._url} lacks the tensor {name}")
        found = []
        for file, first, last in self._places(name):
            low, high = (first, last) if wanted is None else (max(first, wanted.start), min(last, wanted.stop))
            if low < high or wanted is None:
                found.append(file.read(name, low - first, high - first))
        count = sum(len(part) for part in found) if wanted is not None else 0
        if wanted is not None and count != wanted.stop - wanted.start:
            raise SaescaleError(f"{self._url} lacks rows {wanted.start} to {wanted.stop} of the tensor {name}")
        return found[0] if len(found) == 1 else np.concatenate(found)

    def copy(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """Writes all to one file."""
        of = {name: [part.entries[name] for part, _, _ in self._places(name)] for name in self}
        shapes = {name: [sum(e["shape"][0] for e in all), *all[0]["shape"][1:]] for name, all in of.items()}
        file.write(_header({name: (all[0]["dtype"], shapes[name]) for name, all in of.items()}, metadata))
        for name in self:
            for part, _, _ in self._places(name):
                part.copy(name, file)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
            if not 0 <= start <= end or math.prod(entry["shape"]) * _BYTES[entry["dtype"]] != end - start:
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


def _write(file: BinaryIO, tensors: Mapping[str, np.ndarray], checksum: xxhash.xxh3_64) -> None:
    """The layout of safetensors: the header's length in 8 bytes, the header in JSON, the tensors one after another."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header = _header({name: (codes[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()})
    checksum.reset()
    for content in (header, *(_content(tensor) for tensor in tensors.values())):
        checksum.update(content)
        file.write(content)


def _header(tensors: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Of tensors with that type and shape, one after another."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (code, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _BYTES[code]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _content(tensor: np.ndarray) -> Any:  # numpy's types do not say that an array is a buffer
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
