"""Checkpoints of one cell: the newest two generations in safetensors, found by an atomic pointer.

The pointer `latest.json` is written last, and a file that it names is never written again, so a kill at any
moment leaves the old generations or the new ones. Tensors are written and read one at a time, since a cell's state is
most of a worker's memory: the library of safetensors would hold one to three more copies of it.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning

POINTER = "latest.json"
KEPT = 2
_CHUNK_BYTES = 64 * 2**20  # read at a time; one request of an object store
# What safetensors calls them; bfloat16 is none of numpy's.
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"{letter.upper()}{8 * size}": np.dtype(f"<{letter}{size}") for letter in "iu" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}


class Generation(BaseModel):
    """One checkpoint: file name, step, size in bytes, xxh3-64 (hex) of the file, and the caller's JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    file: str
    step: int
    bytes: int
    xxh3: str
    meta: dict[str, Any]


class Pointer(BaseModel):
    """Content of latest.json, newest generation first."""

    # NaN in `meta` (a diverged loss) must come back as NaN.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    generations: list[Generation]


def save(url: str, step: int, tensors: Mapping[str, np.ndarray], meta: dict[str, Any], keep: int | None = None) -> None:
    """Adds a checkpoint to the folder `url` and removes all but the newest two; `meta` is JSON.

    A generation at this step or a later one is replaced: whoever saves step s has gone back to before it. `keep`: the
    step to go back to, when this is one of several folders that go back together. A generation between the two is of
    an attempt that was given up, and would push that one out.
    """
    bound = step - 1 if keep is None else min(keep, step - 1)
    older = [generation for generation in _generations(url) if generation.step <= bound]
    present = set(files.list_names(url))
    name = next(name for name in _names(step) if name not in present)
    checksum = xxhash.xxh3_64()
    size = files.write_atomic(files.join(url, name), lambda file: _write(file, tensors, checksum))
    newest = Generation(file=name, step=step, bytes=size, xxh3=checksum.hexdigest(), meta=meta)
    pointer = Pointer(generations=[newest, *older[: KEPT - 1]])
    files.write_atomic(files.join(url, POINTER), pointer.model_dump_json().encode())
    kept = {generation.file for generation in pointer.generations}
    for stale in sorted(present - kept):
        if stale.startswith("step-") and stale.endswith(".safetensors"):
            files.remove(files.join(url, stale))


def _names(step: int) -> Iterator[str]:
    """What a generation may be called: the first of these that is free, since no file is ever written again."""
    yield f"step-{step:08d}.safetensors"
    for number in range(1, 10**6):
        yield f"step-{step:08d}-{number}.safetensors"


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
    where = files.join(url, POINTER)
    try:
        return Pointer.model_validate_json(files.read_bytes(where)).generations
    except FileNotFoundError:
        return []
    except ValueError:
        warnings.warn(f"{where} is damaged: its cell has no checkpoint any more", SaescaleWarning, stacklevel=3)
        return []


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one generation by name, each read from the file whenever it is asked for.

    Raises SaescaleError where the file is missing, or not as it was written, or lacks the tensor.
    """

    def __init__(self, url: str, generation: Generation) -> None:
        self._url, self._bytes = files.join(url, generation.file), generation.bytes
        with self._open() as file:
            self._check(file, generation.xxh3)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            try:
                self._entries = dict(json.loads(file.read(length)))
            except (ValueError, TypeError) as error:
                raise SaescaleError(f"{self._url} is no safetensors file ({error})") from error
        self._first = 8 + length

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
