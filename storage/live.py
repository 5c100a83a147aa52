"""A live source: an activation store of which only those blocks lie on the disk that somebody needs (LIVE.md).

Its folder is that of a harvest under way: the held-out shards, which stay, and train shards, the blocks, which a
producer (trainers/harvest/live.py) makes ahead of whoever streams and removes behind. A block is a pure function of
what live.json says and of its number, so that one which is gone can be made again with the same bytes. Producers and
consumers know nothing of each other but the files of this folder, and either may be killed at any moment.
"""

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files
from saescale.storage.documents import read_model
from saescale.storage.errors import SaescaleError, Unavailable, one_line
from saescale.storage.manifest import MANIFEST, MOST, Dtype, Manifest
from saescale.storage.rows import RowGroup, raw_dtype
from saescale.storage.source import Order
from saescale.storage.store import ActivationStore
from saescale.storage.stream import Closed, Stream, Window

LIVE = "live.json"
PRODUCER = "producer.json"  # what the producer does now
CONSUMERS = "consumers"  # a folder with a file for each stream
_FORMAT = 1
BEAT_S = 1.0  # between two words of a consumer or producer
GONE_S = 20.0  # without one, it is taken for gone
_LOOK_S = (0.005, 0.2)  # between two looks for a block that is not there yet: the first, and at most
_TRIES = 8  # to read a block that is there
_FOOTER_BYTES, _PAGE_BYTES = 16_384, 1_024  # of a shard beside its rows, at most; of a row group


class Live(BaseModel):
    """Content of live.json. `identity` names the rows and their order; `manifest` is that of the held-out shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = Field(default=_FORMAT, ge=1, le=_FORMAT)
    identity: str
    tokens: int = Field(gt=0, le=MOST)  # train rows of one pass
    block_rows: int = Field(gt=0, le=MOST)
    window_blocks: int = Field(gt=0, le=MOST)  # whose rows are mixed
    manifest: Manifest

    @property
    def blocks(self) -> int:
        """How many a pass has; the last one may be smaller."""
        return -(-self.tokens // self.block_rows)

    def rows_of(self, block: int) -> int:
        return min(self.block_rows, self.tokens - block * self.block_rows)

    def block_of(self, row: int) -> int:
        """The block that holds `row` of the endless order, both counted on over passes."""
        passes, within = divmod(row, self.tokens)
        return passes * self.blocks + within // self.block_rows

    def window_of(self, row: int) -> int:
        """The first block of the window that it is in."""
        passes, block = divmod(self.block_of(row), self.blocks)
        return passes * self.blocks + block - block % self.window_blocks

    def window_end(self, row: int) -> int:
        """One more than its last block."""
        passes = row // self.tokens
        return min(self.window_of(row) + self.window_blocks, (passes + 1) * self.blocks)


def name_of(block: int) -> str:
    """The file of a block: it is a train shard."""
    return f"train-{block:05d}.parquet"


def most_bytes(rows: int, d_model: int, row_group_rows: int) -> int:
    """What the file of a shard of so many rows takes at most: known before it is written."""
    return rows * (2 * d_model + 12) + _FOOTER_BYTES + _PAGE_BYTES * -(-rows // row_group_rows)


class Place(BaseModel):
    """Where a consumer is, in consumers/ID.json. Blocks are counted on over passes.

    `need`: the first block of the window that it reads, or reads next. `passed`: of no earlier block it will ask again,
    wherever it begins again. `beat` goes up while it lives. `cells`: whom the rows are for, by their ids; another
    consumer that names one of them has taken its place.
    """

    need: int = Field(ge=0, le=MOST)
    end: int | None = Field(None, ge=0, le=MOST)  # one more than the last block that it will need; None: without end
    passed: int = Field(ge=0, le=MOST)
    beat: int = 0
    cells: list[str] = []


class Making(BaseModel):
    """What a producer does, in producer.json; `bytes` are those that it counts with, of blocks, temporary files and a
    server's files."""

    beat: int = 0
    state: str = "starting"  # in words
    made: int = 0  # tokens that it computed, those of blocks that were made again included
    again: int = 0  # of them, in blocks that had been made before
    tokens_per_s: float = 0.0
    first: int = 0  # the block that the slowest consumer needs
    blocks: int = 0  # on the disk
    bytes: int = 0
    max_bytes: int | None = None
    server_max_bytes: int | None = None  # that all files of an inference server may take
    consumers: int = 0
    error: str | None = None  # why it ended


def is_source(url: str) -> bool:
    """Whether there is a live source or a sealed store at `url`, as far as this process sees."""
    return files.exists(files.join(url, MANIFEST)) or is_live(url)


def is_live(url: str) -> bool:
    """Whether there is a live source at `url`."""
    return files.exists(files.join(url, LIVE))


def open_source(url: str, cells: Sequence[str] = ()) -> ActivationStore:
    """The live source whose folder `url` is, or the sealed store there; `cells`: for whom it is read, by their ids.
    Raises what opening either raises."""
    try:
        live = read_model(files.join(url, LIVE), Live, "remove the folder and begin anew", _FORMAT)
        return LiveSource(url, live, cells)
    except FileNotFoundError:
        return ActivationStore.open(url)


class LiveSource(ActivationStore):
    """Its held-out rows are those of a store; its train rows come in blocks, which are waited for."""

    def __init__(self, url: str, live: Live, cells: Sequence[str] = ()) -> None:
        super().__init__(url, live.manifest)
        self.live, self.cells = live, list(cells)
        self.fingerprint = live.identity

    @property
    def mixed_rows(self) -> int:
        return min(self.live.window_blocks * self.live.block_rows, self.live.tokens)

    def rows(self, split: str) -> int:
        return self.live.tokens if split == "train" else super().rows(split)

    def batches(self, order: Order, start: int = 0, stop: int | None = None, rank: int = 0, ranks: int = 1) -> Stream:
        """Blocks in their order, whose rows are mixed within windows; `order.mix_row_groups` says nothing here."""
        if order.split != "train":
            return super().batches(order, start, stop, rank, ranks)
        return LiveStream(self, order, start, stop, rank, ranks)

    def resume(self, state: dict[str, Any], stop: int | None = None, rank: int = 0, ranks: int = 1) -> Stream:
        if state["store"] != self.fingerprint:
            raise SaescaleError(
                f"{self.url} is another live source than the one this position belongs to ({self.fingerprint}, not "
                f"{state['store']}); give the original one or start anew"
            )
        order = Order(state["split"], state["seed"], state["batch_tokens"], state["mix_row_groups"])
        return self.batches(order, state["batch"], stop, rank, ranks)


class LiveStream(Stream):
    """A consumer of a live source: says where it is for as long as it is open."""

    def __init__(self, source: LiveSource, order: Order, start: int, stop: int | None, rank: int, ranks: int) -> None:
        first = source.live.window_of(start * order.batch_tokens)
        self._live = source.live
        last = None if stop is None else max(stop, start) * order.batch_tokens - 1
        end = None if last is None else source.live.window_end(last)
        self._consumer = _Consumer(source.url, Place(need=first, passed=first, end=end, cells=source.cells))
        super().__init__(
            _Blocks(source, self._consumer), order.split, batch_tokens=order.batch_tokens, seed=order.seed,
            batches=stop, start=start, rank=rank, world_size=ranks, mix_row_groups=order.mix_row_groups,
            windows=_InOrder(source.live, self._consumer),
        )  # fmt: skip

    def passed(self, batch: int) -> None:
        self._consumer.say(passed=self._live.window_of(batch * self._batch_tokens))

    def close(self) -> None:
        self._consumer.close()
        super().close()

    def _check(self, group: RowGroup, act: np.ndarray) -> None:
        """The producer found the values good when it wrote them; there are too many to keep a list."""


class _InOrder:
    """Windows of consecutive blocks; the consumer stands at the one that is being read."""

    def __init__(self, live: Live, consumer: "_Consumer") -> None:
        self._live, self._consumer = live, consumer

    def within(self, first: int, end: int | None) -> Iterator[Window]:
        live = self._live
        size, count = live.window_blocks, -(-live.blocks // live.window_blocks)
        passes, skipped = divmod(first, live.tokens)
        number = skipped // (size * live.block_rows)
        start = first - skipped + number * size * live.block_rows
        while end is None or start < end:
            blocks = range(number * size, min((number + 1) * size, live.blocks))
            groups = [group for block in blocks for group in _groups(live, block)]
            self._consumer.say(need=passes * live.blocks + number * size)
            yield Window(passes, number, start, groups)
            start += sum(group.rows for group in groups)
            passes, number = (passes, number + 1) if number + 1 < count else (passes + 1, 0)


def _groups(live: Live, block: int) -> list[RowGroup]:
    size, rows = live.manifest.row_group_rows, live.rows_of(block)
    return [RowGroup(block, index, min(size, rows - first)) for index, first in enumerate(range(0, rows, size))]


class _Blocks:
    """The blocks as a stream reads them: each is waited for."""

    def __init__(self, source: LiveSource, consumer: "_Consumer") -> None:
        self.url, self.fingerprint, self.d_model = source.url, source.fingerprint, source.d_model
        self.dtype: Dtype = source.dtype
        self._consumer = consumer

    def row_groups(self, split: str) -> list[RowGroup]:
        raise AssertionError("windows name them")

    def check_values(self, group: RowGroup, act: np.ndarray) -> None:
        raise AssertionError("the producer did")

    def read_row_group(self, split: str, group: RowGroup) -> np.ndarray:
        """Raises SaescaleError where the producer ended with one, or the block cannot be read."""
        where, tries = files.join(self.url, name_of(group.shard)), 0
        for _ in self._consumer.looks():
            try:
                return self._read(where, group)
            except FileNotFoundError:  # not there yet, or not any more: it is made again
                continue
            except Unavailable:
                tries += 1
                if tries == _TRIES:
                    raise
        raise Closed

    def _read(self, where: str, group: RowGroup) -> np.ndarray:
        local = files.local_path(where)
        try:
            with pa.memory_map(local) if local else files.open_input(where) as source:
                parquet = pq.ParquetFile(source)
                array = parquet.read_row_group(group.index, columns=["act"], use_threads=False).column("act")
        except (FileNotFoundError, SaescaleError):
            raise
        except Exception as error:  # object stores raise classes of their own
            files.require_memory(where, error)
            of_arrow = type(error) is OSError and error.errno is None
            if not of_arrow and files.may_pass(where, error):
                raise Unavailable(f"{where}: row group {group.index} was not answered ({one_line(error)})") from error
            raise SaescaleError(
                f"{where}: row group {group.index} cannot be read ({one_line(error)}); remove the file, and it is made "
                "again"
            ) from error
        column = array.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        if len(column) != group.rows or column.type != pa.binary(2 * self.d_model):
            raise SaescaleError(
                f"{where}: row group {group.index} has {len(column)} rows of {column.type}, not {group.rows} of "
                f"d_model = {self.d_model}; remove the file, and it is made again"
            )
        first = column.offset * self.d_model
        values = np.frombuffer(column.buffers()[1], raw_dtype(self.dtype))
        return values[first : first + group.rows * self.d_model].reshape(group.rows, self.d_model)


class _Consumer:
    """Keeps the file that says where a stream is."""

    def __init__(self, url: str, place: Place) -> None:
        self._url, self._place = url, place
        self._where = files.join(url, CONSUMERS, f"{uuid.uuid4().hex}.json")
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep, name="saescale-live", daemon=True)
        self._thread.start()

    def say(self, **where: int) -> None:
        self._place = self._place.model_copy(update=where)
        self._changed.set()

    def looks(self) -> Iterator[None]:
        """As often as one should look for a block, until the stream is closed. SaescaleError when no producer will
        make it."""
        pause, most = _LOOK_S
        asked = time.monotonic()
        while not self._ended.is_set():
            yield
            if self._ended.wait(pause):
                return
            pause = min(most, 1.5 * pause)
            if time.monotonic() - asked > BEAT_S:
                asked = time.monotonic()
                making = read_making(self._url)
                if making is not None and making.error is not None:
                    raise SaescaleError(making.error)

    def close(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._changed.set()
        self._thread.join()
        with suppress(SaescaleError):  # it ends without a beat too
            files.remove(self._where)

    def _keep(self) -> None:
        while not self._ended.is_set():
            self._changed.wait(BEAT_S)
            self._changed.clear()
            if not self._ended.is_set():
                with suppress(SaescaleError):  # said again at the next beat
                    self._write()

    def _write(self) -> None:
        self._place = self._place.model_copy(update={"beat": self._place.beat + 1})
        files.write_atomic(self._where, self._place.model_dump_json().encode())


# --- who else is there


class Heard:
    """Who lives, by what has changed since it was looked at: no two clocks are compared."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def lives(self, name: str, beat: int) -> bool:
        """Whether `name`, which is at that beat, has moved within GONE_S; of one that is new it is supposed."""
        now = time.monotonic()
        if name not in self._last or self._last[name][0] != beat:
            self._last[name] = beat, now
        return now - self._last[name][1] < GONE_S


class Places(NamedTuple):
    """The consumers of a source, those that live and those that were killed, by their names."""

    living: dict[str, Place]
    gone: dict[str, Place]

    @classmethod
    def of(cls, url: str, heard: Heard) -> Self:
        """As their files in the folder `url` say."""
        folder = files.join(url, CONSUMERS)
        living: dict[str, Place] = {}
        gone: dict[str, Place] = {}
        for name in files.list_names(folder):
            with suppress(FileNotFoundError):  # it has just ended
                place = read_model(files.join(folder, name), Place, "remove it")
                (living if heard.lives(name, place.beat) else gone)[name] = place
        return cls(living, gone)


def read_making(url: str) -> Making | None:
    """What the producer of the source at `url` says; None where it has had none."""
    try:
        return read_model(files.join(url, PRODUCER), Making, "remove it")
    except FileNotFoundError:
        return None
