"""Hidden states of an inference server as the rows of a live source, without a subject in this process.

vLLM's `extract_hidden_states` leaves a file for each request, REQUEST.safetensors with `token_ids` [tokens] and
`hidden_states` [tokens, layers, d_model], in a folder; of a layer id i it has what enters block i, resid_post of layer
i - 1. The folder is watched: each file, once it is whole, gets the next number and is a document whose first position
is left out. `served/` of the live source keeps which file has which number, so that a block is made again from the
same rows for as long as the files are there. What they take counts as the source's disk (live.py).
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.rows import Rows, raw_dtype, write_shard
from saescale.storage.waiting import waiting
from saescale.trainers.harvest.assignment import Stretches
from saescale.trainers.harvest.conduct import NOTHING_S
from saescale.trainers.harvest.contexts import Block, Counted, block_file
from saescale.trainers.harvest.make_shard import (
    Facts,
    Made,
    ShardJob,
    ShardRecord,
    mixed,
    moments,
    raw_rows,
    versions,
)
from saescale.trainers.harvest.spec import HarvestSpec, note_plan

SERVED = "served"  # a folder of the names of files by their numbers, a file for each thousand
_SUFFIX = ".safetensors"
_HEADER_MOST = 2**20
LOOK_S = 0.1


class ServedFile(NamedTuple):
    """File number `block`, of `tokens` positions."""

    block: int
    path: str
    tokens: int


class Shape(NamedTuple):
    """Of `hidden_states` in a file."""

    tokens: int
    layers: int
    d_model: int
    dtype: str  # as safetensors names it: BF16, F32, F8_E4M3

    @property
    def row_bytes(self) -> int:
        """That a position takes in the file, at least."""
        bits = re.search(r"\d+", self.dtype)
        return self.layers * self.d_model * int(bits[0] if bits else 8) // 8


class Served:
    """The files of a server's folder by their numbers: those that the live source `url` has taken, then those that
    come. `removes`: files may be removed behind those who stream, the first ones first; else none is missing but by
    somebody's hand."""

    def __init__(self, folder: str, url: str, removes: bool = False) -> None:
        self._folder, self._url = Path(folder), url
        self._names: list[str] = []
        self._looked = 0.0
        self._noted: set[str] = set()
        for thousand in sorted(files.list_names(files.join(url, SERVED))):
            where = files.join(url, SERVED, thousand)
            self._names += read_json(where, f"remove {url}, or name another folder")["names"]
        self._taken = set(self._names)
        self._sizes: dict[str, int] = {}  # of whole files: they stay
        self.removed = self._without() if removes else 0  # all files before that number were
        self._names_removed = set(self._names[: self.removed])
        self.shape: Shape | None = None  # of the first one: all have its layers and width

    @property
    def count(self) -> int:
        """How many files have a number."""
        return len(self._names)

    def path(self, number: int) -> str:
        return str(self._folder / self._names[number])

    def each(self, first: int = 0) -> Iterator[ServedFile | None]:
        """All files from number `first` on; None while the next one is not there."""
        number = first
        while True:
            if number == len(self._names) and not self._take():
                yield None
                continue
            path = self.path(number)
            yield ServedFile(number, path, max(0, self._checked(path).tokens - 1))
            number += 1

    def first(self) -> Shape:
        """The shape of the first file, which is waited for."""
        with waiting(f"the first file of hidden states in {self._folder}"):
            while (there := self._first_there()) is None:
                self._take()
                time.sleep(NOTHING_S)
        return self._checked(there)

    def _first_there(self) -> str | None:
        """Of those that have a number; earlier ones may have been removed."""
        return next((path for path in map(self.path, range(len(self._names))) if os.path.exists(path)), None)

    def forget(self, before: int) -> None:
        """Removes the files before that number, which nobody needs any more, the first ones first: so the notes of
        their names are all that a later process has to know."""
        for number in range(self.removed, before):
            files.remove(self.path(number))
            self._names_removed.add(self._names[number])
        self.removed = max(self.removed, before)

    def unnamed(self) -> None:
        """Takes back the numbers that were given here: nothing was made of the files."""
        for where in self._noted:
            files.remove(where)
            if (local := files.local_path(where)) is not None:
                with suppress(OSError):  # something else lies there
                    os.rmdir(os.path.dirname(local))

    def _without(self) -> int:
        """How many files a process before this one removed: all up to the last one that is missing."""
        there = set(os.listdir(self._folder)) if self._folder.is_dir() else set()
        return max((number for number, name in enumerate(self._names, 1) if name not in there), default=0)

    def bytes(self) -> int:
        """What all files of the folder take, those that the server is still writing included."""
        found: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:  # that it is gone is said elsewhere
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary one of the server's
                    found[entry.name] = self._sizes.get(entry.name) or entry.stat().st_size
        self._sizes = {name: size for name, size in found.items() if name in self._taken}
        return sum(found.values())

    def _take(self) -> bool:
        """Gives numbers to the files that are new and whole."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        if not self._folder.is_dir():
            raise SaescaleError(f"{self._folder}: there is no such folder; give that to which the server writes")
        there = sorted(name for name in os.listdir(self._folder) if name.endswith(_SUFFIX))
        if again := [name for name in there if name in self._names_removed]:
            raise SaescaleError(
                f"{self._folder / again[0]}: a file of that name was taken and removed before, and a name stands for "
                "one file: give each request of the server a name of its own, rename this file, and run again; nothing "
                "is lost"
            )
        new = [name for name in there if name not in self._taken and _is_whole(self._folder / name)]
        for thousand in {number // 1000 for number in range(len(self._names), len(self._names) + len(new))}:
            known = (self._names + new)[thousand * 1000 : (thousand + 1) * 1000]
            where = files.join(self._url, SERVED, f"{thousand:05d}.json")
            files.write_atomic(where, json.dumps({"names": known}).encode())
            self._noted.add(where)
        self._names += new
        self._taken |= set(new)
        return bool(new)

    def _checked(self, path: str) -> Shape:
        shape = shape_of(path)
        self.shape = self.shape or shape
        if shape[1:] != self.shape[1:]:
            raise SaescaleError(
                f"{path} holds {_words(shape)}, and the first file of its folder {_words(self.shape)}: of another "
                "model, or of other layer ids; remove the file, or give the server a folder of its own"
            )
        return shape


class ServedCrew:
    """Makes shards from the files, in this process. `index`: which of their layers."""

    def __init__(self, served: Served, index: int, spool: str) -> None:
        self._served, self._index, self._spool = served, index, spool

    def load(self, specs: Sequence[HarvestSpec], computed_in: str) -> Facts:
        """Waits for the first file. Raises SaescaleError where it has no such layer."""
        self._spec = specs[0]
        self.shape = shape = self._served.first()
        if self._index >= shape.layers:
            raise SaescaleError(
                f"hidden_states_index = {self._index}, and the files have layers 0 to {shape.layers - 1}; correct it"
            )
        return Facts("served", shape.d_model, shape.dtype, [], ["first"], versions(), True)

    def tokenize(self, blocks: Iterator[Block | ServedFile]) -> Iterator[Counted]:
        raise AssertionError("a live source asks for both as they come")

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[Made]:
        raise AssertionError("a live source asks for both as they come")

    def serve(self, items: Iterator[Any]) -> Iterator[Counted | Made]:
        for item in items:
            if item is None:
                time.sleep(NOTHING_S)
            elif isinstance(item, ShardJob):
                yield self._make(item)
            else:
                yield self._count(item)

    def _count(self, file: ServedFile) -> Counted:
        with _opened(file.path) as found:
            ids = found.get_tensor("token_ids").numpy().astype(np.int32)[1:]
        files.write_atomic(block_file(self._spool, file.block), ids.tobytes())
        number = np.array([len(ids)])
        return Counted(
            file.block, np.array([file.block]), number, number, None, [xxhash.xxh3_64_intdigest(ids.tobytes())]
        )

    def _make(self, job: ShardJob) -> Made:
        began, spec, tokens = time.monotonic(), self._spec, job.tokens
        act, columns = self._rows(tokens.stretches)
        order = mixed(spec.seed, tokens.split, tokens.ordinal, len(act))
        note_plan(spec.out, {**job.plan, "layer": spec.layer})
        rows = Rows(act[order], **{name: column[order] for name, column in columns.items()})
        shard = write_shard(spec.out, tokens.name, tokens.split, rows, spec.dtype, spec.row_group_rows)
        return Made((ShardRecord(shard, *moments(rows.act, spec.dtype)),), 1, time.monotonic() - began)

    def _rows(self, stretches: Stretches) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rows of the stretches in their order, [rows, d_model] raw, and `token`, `pos` and `doc` of each."""
        count = int(stretches.rows.sum())
        act = np.empty((count, self.shape.d_model), raw_dtype(self._spec.dtype))
        at = 0
        pos = np.empty(count, np.int16)
        for number, start, rows in zip(
            stretches.block.tolist(), stretches.start.tolist(), stretches.rows.tolist(), strict=True
        ):
            with _opened(self._served.path(number)) as found:
                states = found.get_slice("hidden_states")[1 + start : 1 + start + rows, self._index]
            act[at : at + rows] = raw_rows(states.float(), self._spec)
            pos[at : at + rows] = np.arange(1 + start, 1 + start + rows)
            at += rows
        token = np.concatenate(list(stretches.ids(self._spool)))
        return act, {"token": token, "pos": pos, "doc": np.concatenate(list(stretches.docs()))}


def shape_of(path: str) -> Shape:
    """Of the hidden states in the file. Raises SaescaleError where it is none of a server's."""
    with _opened(path) as found:
        names = set(found.keys())
        if not {"token_ids", "hidden_states"} <= names:
            listed = ", ".join(sorted(names)) or "nothing"
            raise SaescaleError(
                f"{path} holds {listed}, and no token_ids and hidden_states as extract_hidden_states writes"
            )
        states = found.get_slice("hidden_states")
        tokens, shape = found.get_slice("token_ids").get_shape(), states.get_shape()
        if len(shape) != 3 or len(tokens) != 1 or shape[0] != tokens[0]:
            raise SaescaleError(
                f"{path}: hidden_states is {shape} and token_ids {tokens}; they must be [tokens, layers, d_model] and "
                "[tokens]"
            )
        return Shape(shape[0], shape[1], shape[2], str(states.get_dtype()))


def _words(shape: Shape) -> str:
    return f"hidden states of {shape.layers} layers of width {shape.d_model} ({shape.dtype})"


def _opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise SaescaleError(
            f"{path}: the file of hidden states is gone, and its rows are asked for again; bring it back, or leave "
            "remove_hidden_states out where cells do not all train at one time, or go over the tokens twice"
        ) from error
    except (SafetensorError, OSError) as error:
        raise SaescaleError(f"{path}: no readable safetensors file ({one_line(error)}); remove it") from error


def _is_whole(path: Path) -> bool:
    """Whether all bytes are there that its header speaks of: a server writes into the file that one sees."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _HEADER_MOST)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return os.fstat(file.fileno()).st_size >= 8 + length + max(ends, default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False  # whatever else lies there is nobody's file yet
