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
from collections.abc import Iterable, Iterator, Mapping
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


class Generation(BaseModel):
    """One checkpoint: file name, step, size in bytes, xxh3-64 (hex) of the file, and the caller's JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    file: str
    step: int = Field(ge=0, le=2**62)
    bytes: int = Field(ge=0, le=2**62)
    xxh3: str
    meta: dict[str, Any]


class Pointer(BaseModel):
    """Content of a pointer, newest generation first. `ended`: the result, in the one that takes the last number."""

    # NaN in `meta` (a diverged loss) must come back as NaN.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    format: int = _FORMAT
    generations: list[Generation] = []
    ended: dict[str, Any] | None = None
    by: str = ""  # no two are alike, so that whoever created one knows it again

    def content(self) -> bytes:
        document = json.loads(self.model_dump_json())
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
    kept = {generation.file for generation in _read(url, _last_turn(present)).generations}
    _remove_generations(url, present, kept)


def save(
    url: str, step: int, tensors: Mapping[str, np.ndarray], meta: dict[str, Any], keep: int | None = None, turn: int = 0
) -> None:
    """Adds a checkpoint to the folder `url` and removes all but the newest two; `meta` is JSON.

    A generation at this step or a later one is replaced: whoever saves step s has gone back to before it. `keep`: the
    step to go back to, when this is one of several folders that go back together. A generation between the two is of
    an attempt that was given up, and would push that one out. Raises Superseded where a turn after `turn` was taken.
    """
    present = _present(url, turn)
    bound = step - 1 if keep is None else min(keep, step - 1)
    mine = _read(url, turn)
    older = [generation for generation in mine.generations if generation.step <= bound]
    name = next(name for name in _names(step, turn) if name not in present)
    checksum = xxhash.xxh3_64()
    size = files.write_atomic(files.join(url, name), lambda file: _write(file, tensors, checksum))
    newest = Generation(file=name, step=step, bytes=size, xxh3=checksum.hexdigest(), meta=meta)
    pointer = Pointer(generations=[newest, *older[: KEPT - 1]], by=mine.by)
    files.write_atomic(files.join(url, pointer_name(turn)), pointer.content())
    # Whoever takes a turn after this finds the new pointer; whoever took one before may need what the old one names.
    _present(url, turn)
    _remove_generations(url, present, {generation.file for generation in pointer.generations})
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


def _names(step: int, turn: int) -> Iterator[str]:
    """What a generation may be called: the first of these that is free, since no file is ever written again."""
    of_turn = f"-turn-{turn:05d}" if turn else ""
    yield f"step-{step:08d}{of_turn}.safetensors"
    for number in range(1, 10**6):
        yield f"step-{step:08d}{of_turn}-{number}.safetensors"


def has_any(names: Iterable[str]) -> bool:
    """Whether there is a checkpoint among the files of a cell (`RunDirectory.cell_files`)."""
    return any(name.startswith("checkpoint/step-") for name in names)


def steps(url: str) -> list[int]:
    """The steps that can be loaded, newest first; [] when there is no checkpoint."""
    return [generation.step for generation in _generations(url)]


def load(url: str, step: int | None = None) -> tuple[Mapping[str, np.ndarray], dict[str, Any], int]:
    """(tensors, meta, step) of the checkpoint at `step`, or of the newest sound one.

    The whole file is checked now; a tensor is read when it is asked for, into memory of its own. A damaged newest is
    passed over with a warning when `step` is None. SaescaleError when nothing sound is there.
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
            return Tensors(url, generation), generation.meta, generation.step
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


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one generation by name, each read from the file whenever it is asked for.

    Raises SaescaleError where the file is missing, or not as it was written, or lacks the tensor.
    """

    def __init__(self, url: str, generation: Generation) -> None:
        self._url, self._bytes = files.join(url, generation.file), generation.bytes
        with self._open() as file:
            self._check(file, generation.xxh3)
            file.seek(0)
            self._entries, self._first = read_header(file, self._bytes, self._url)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with files.reading(self._url), files.open_input(self._url, known_size=self._bytes) as file:
                yield file
        except FileNotFoundError as error:
            raise SaescaleError(f"{self._url} is missing") from error

    def _check(self, file: BinaryIO, expected: str) -> None:
        found = files.size(self._url)
        if found != self._bytes:
            raise SaescaleError(f"{self._url} has {found} bytes, not {self._bytes}")
        checksum = xxhash.xxh3_64()
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
        if checksum.hexdigest() != expected:
            raise SaescaleError(f"{self._url} has a wrong checksum")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise SaescaleError(f"{self._url} lacks the tensor {name}")
        entry: dict[str, Any] = self._entries[name]
        start, end = entry["data_offsets"]
        with self._open() as file:
            file.seek(self._first + start)
            # A bytearray, since torch needs memory that it may write.
            content = bytearray(file.read(end - start))
        return np.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


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
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    checksum.reset()
    for content in (len(header).to_bytes(8, "little"), header, *(_content(tensor) for tensor in tensors.values())):
        checksum.update(content)
        file.write(content)


def _content(tensor: np.ndarray) -> Any:  # numpy's types do not say that an array is a buffer
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
