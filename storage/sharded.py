"""Tensors in files of some size with an index beside them, as Hugging Face's libraries write and read them.

    sae-00001-of-00003.safetensors, sae-00002-of-00003.safetensors ...
    sae.safetensors.index.json     {"metadata": {"total_size": ...}, "weight_map": {"W_dec": "sae-00002-of-...", ...}}

A tensor that is larger than a file may be lies in several, under a name for each piece: W_enc[0:4096], its rows 0 to
4096. Beside what others know the index says of each file its size and checksum, and is written when all are there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files
from saescale.storage.documents import CHECKSUM, checksum, damaged, read_model
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.tensors import BYTES, Part, Piece, Tensors, cut_name

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
MOST = 99_999  # files that five digits can number


class Sum(BaseModel):
    """What a file was written as."""

    bytes: int = Field(ge=0, le=2**62)
    xxh3: str


class Index(BaseModel):
    """Content of an index; other libraries' have neither `files` nor what is saescale's in `metadata`."""

    model_config = ConfigDict(extra="ignore")
    metadata: dict[str, Any] = Field(default={})
    weight_map: dict[str, str] = Field(min_length=1)
    files: dict[str, Sum] = Field(default={})

    @classmethod
    def of(cls, parts: Sequence[Part], keys: Sequence[Sequence[str]], metadata: Mapping[str, Any]) -> Self:
        """Of files and the names of the tensors in each."""
        return cls(
            metadata=dict(metadata),
            weight_map={key: part.file for part, own in zip(parts, keys, strict=True) for key in own},
            files={part.file: Sum(bytes=part.bytes, xxh3=part.xxh3) for part in parts},
        )

    def content(self) -> bytes:
        document = self.model_dump(mode="json")
        return json.dumps(document | {CHECKSUM: checksum(document)}, indent=1).encode()

    def tensors(self, url: str, rows: slice | None = None) -> Tensors:
        """Those of the files beside the index at `url`; `rows` as Tensors takes them. Raises SaescaleError."""
        folder, _ = split(url)
        names = list(dict.fromkeys(self.weight_map.values()))
        parts = []
        for name in names:
            there = self.files.get(name)
            if there is None and not files.exists(files.join(folder, name)):
                raise Damaged(f"{files.join(folder, name)} is missing, which {url} names", url)
            size = files.size(files.join(folder, name)) if there is None else there.bytes
            parts.append(Part(file=name, bytes=size, xxh3=there.xxh3 if there else ""))
        return Tensors(folder, parts, rows)


def read_index(url: str, remedy: str = "write it again") -> Index:
    """Raises FileNotFoundError, and Damaged with `remedy` where it is none."""
    index = read_model(url, Index, remedy)
    if outside := [name for name in index.weight_map.values() if "/" in name or not name.endswith(SUFFIX)]:
        raise damaged(url, f"it names {outside[0]!r}, which is no file with tensors beside it", remedy)
    return index


def shard_name(name: str, number: int, of: int) -> str:
    """sae.safetensors, 0, 3 -> sae-00001-of-00003.safetensors"""
    return f"{name.removesuffix(SUFFIX)}-{number + 1:05d}-of-{of:05d}{SUFFIX}"


def index_name(name: str) -> str:
    """sae.safetensors -> sae.safetensors.index.json"""
    return name.removesuffix(SUFFIX) + INDEX


def copy(tensors: Tensors, url: str, metadata: Mapping[str, str], max_bytes: int | None = None) -> list[str]:
    """Writes all to the file `url`, or where they take more than `max_bytes` to files of at most so many with an index.

    Some megabytes at a time, so nobody needs the memory for all of it. What the folder had before under that name goes.
    The URLs of what was written, an index last. Raises SaescaleError where one is damaged or cannot be written.
    """
    folder, name = split(url)
    shards, before = planned(tensors.entries(), max_bytes), _before(url)
    if len(shards) == 1:
        # By their names: one file is the same bytes, whatever it was copied from.
        tensors.copy(folder, name, sorted(shards[0]), metadata)
        made = [name]
    else:
        written = [
            tensors.copy(folder, shard_name(name, number, len(shards)), pieces, {"format": "pt"})
            for number, pieces in enumerate(shards)
        ]
        keys = [[piece.key for piece in pieces] for pieces in shards]
        index = Index.of(written, keys, {"total_size": _total(tensors), **metadata})
        files.write_atomic(files.join(folder, index_name(name)), index.content())
        made = [*(part.file for part in written), index_name(name)]
    for stale in before - set(made):
        files.remove(files.join(folder, stale))
    return [files.join(folder, each) for each in made]


def planned(entries: Mapping[str, tuple[str, list[int]]], max_bytes: int | None) -> list[list[Piece]]:
    """Which pieces go to which file: tensors in their order, as many as a file may have, and those that are larger than
    one cut by rows, of which a file has at least one. Raises SaescaleError for more files than can be numbered."""
    made: list[list[Piece]] = [[]]
    free = math.inf if max_bytes is None else max_bytes
    for name, (code, shape) in entries.items():
        rows = shape[0] if shape else 1
        each = math.prod(shape[1:]) * BYTES[code]
        if max_bytes is None or rows * each <= max_bytes:
            step, keys = max(1, rows), False
        else:
            step, keys = max(1, int(max_bytes // max(1, each))), True
        for first in range(0, max(1, rows), step):
            last = min(rows, first + step)
            size = (last - first) * each
            if size > free and made[-1]:
                made.append([])
                free = max_bytes or 0
            if len(made) > MOST:
                raise SaescaleError(
                    f"files of at most {max_bytes:,} bytes would be more than {MOST:,}; give a larger size"
                )
            made[-1].append(Piece(name, first, last, cut_name(name, first, last) if keys else name))
            free -= size
    return made


def split(url: str) -> tuple[str, str]:
    """The folder of a file, and its name."""
    folder, slash, name = url.rpartition("/")
    return folder or slash or ".", name


def _total(tensors: Tensors) -> int:
    return sum(math.prod(shape) * BYTES[code] for code, shape in tensors.entries().values())


def _before(url: str) -> set[str]:
    """The files that make what lies at `url` now."""
    folder, name = split(url)
    found = {name} if files.exists(url) else set()
    index = files.join(folder, index_name(name))
    try:
        return found | set(read_index(index).weight_map.values()) | {index_name(name)}
    except FileNotFoundError:
        return found
    except Damaged:  # what it named is not known any more
        return found | {index_name(name)}
