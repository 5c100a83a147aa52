"""The deterministic stream of training batches: well mixed, resumable at any batch, for any number of ranks.

The order of rows is endless and fixed by (store, split, seed, mix_row_groups). Each epoch puts the row groups
in a seeded permutation and cuts that into windows; the rows of a window are permuted together. Batch i is the
rows [i * batch_tokens, (i + 1) * batch_tokens) of that order, so its place follows from its index alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Dtype
from saescale.storage.rows import RowGroup, raw_dtype
from saescale.storage.secrets import hide_secrets
from saescale.storage.source import SourceBatch
from saescale.storage.waiting import waiting

_READERS = 4
# Row groups whose values this process has found good: (url, store fingerprint, shard, row group).
_checked: set[tuple[str, str, int, int]] = set()


class RowGroups(Protocol):
    """What a stream reads: rows in groups that can be read in any order, from several threads."""

    @property
    def url(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Identifies the rows."""

    @property
    def d_model(self) -> int: ...

    @property
    def dtype(self) -> Dtype: ...

    def row_groups(self, split: str) -> list[RowGroup]:
        """All of the split, in stored order."""

    def read_row_group(self, split: str, group: RowGroup) -> np.ndarray:
        """One of them, [rows, d_model] raw dtype."""

    def check_values(self, group: RowGroup, act: np.ndarray) -> None:
        """Raises SaescaleError where a row is no activation."""


class Window(NamedTuple):
    """Row groups mixed together; `first` is the place of the first row in the endless order."""

    epoch: int
    number: int
    first: int
    groups: list[RowGroup]


class Windows(Protocol):
    """Which row groups are mixed together, in which order."""

    def within(self, first: int, end: int | None) -> Iterator[Window]:
        """Those that hold rows of `first` to `end` (None: without end) of the endless order. The reading thread takes
        the next one when it has read the one before."""


class Shuffled:
    """Of a store that lies there whole: each epoch puts its row groups in a seeded permutation."""

    def __init__(self, groups: list[RowGroup], seed: int, mix: int) -> None:
        self._groups, self._seed = groups, seed
        # Windows of nearly equal size: a small last one would mix its rows less than the others.
        self._count = -(-len(groups) // mix)

    def within(self, first: int, end: int | None) -> Iterator[Window]:
        epoch, skipped = divmod(first, sum(group.rows for group in self._groups))
        start = first - skipped
        while True:
            order = permutation(len(self._groups), self._seed, epoch, 0)
            for number, members in enumerate(np.array_split(order, self._count)):
                if end is not None and start >= end:
                    return
                groups = [self._groups[member] for member in members]
                rows = sum(group.rows for group in groups)
                if start + rows > first:
                    yield Window(epoch, number, start, groups)
                start += rows
            epoch += 1


class Closed(Exception):
    """Rows were waited for, and the stream was closed."""


class Stream:
    """Iterator of batches whose x is [batch_tokens // world_size, d_model], raw dtype, owned by the consumer.

    It starts at global batch `start` and stops after global batch `batches` (absolute; None: endless). Rank r
    gets the r-th of `world_size` equal slices of every global batch: the concatenation over ranks is the same
    at any world size, and all ranks get equally many batches. Every rank reads every row group. A thread
    keeps at least `prefetch` batches ready, rounded up to whole windows of `mix_row_groups` row groups: two to
    three windows are in memory. `windows` says what is mixed where it is otherwise (live.py). `wait_seconds` is how
    long the consumer waited, and `while_waiting` what it does meanwhile. Close it, or use a `with`.

    Raises SaescaleError for a split without rows and, from `__next__`, for what the reading thread met; a row
    group's values (NaN, Inf, zero norm) are checked the first time that a process reads it.
    """

    def __init__(
        self,
        store: RowGroups,
        split: str = "train",
        *,
        batch_tokens: int,
        seed: int,
        batches: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mix_row_groups: int = 8,
        prefetch: int = 4,
        windows: Windows | None = None,
    ) -> None:
        if batch_tokens < 1 or world_size < 1 or batch_tokens % world_size:
            raise SaescaleError(
                f"a batch of {batch_tokens} tokens cannot be cut into {world_size} equal slices; "
                "make batch_tokens a multiple of the number of ranks"
            )
        if not 0 <= rank < world_size or start < 0 or seed < 0 or mix_row_groups < 1 or prefetch < 1:
            raise ValueError(f"{rank=} {world_size=} {start=} {seed=} {mix_row_groups=} {prefetch=} out of range")
        if windows is None:
            groups = store.row_groups(split)
            if not groups:
                raise SaescaleError(f"the activation store {store.url} has no {split} rows; harvest some first")
            windows = Shuffled(groups, seed, mix_row_groups)
        self._windows = windows
        self._store = store
        self._split = split
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._end = None if batches is None else max(batches, start)
        self._next = start
        self._first_row = start * batch_tokens
        self._end_row = None if self._end is None else self._end * batch_tokens
        self._slice = batch_tokens // world_size
        self._rank = rank
        self._mix = mix_row_groups
        self._ready_rows = prefetch * self._slice
        self.wait_seconds = 0.0
        self.while_waiting: Callable[[Callable[[float], bool]], None] | None = None

        self._window = np.empty((0, store.d_model), raw_dtype(store.dtype))
        self._used = 0
        self._changed = threading.Condition()
        self._ready: deque[np.ndarray] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="saescale-stream", daemon=True)
        self._thread.start()

    @classmethod
    def resume(cls, store: RowGroups, state: dict[str, Any], **settings: Any) -> "Stream":
        """The stream that goes on where `state()` was taken, at any world size.

        `settings` are those that do not change the order: batches, rank, world_size, prefetch. Raises
        SaescaleError where it was taken of another store.
        """
        if state["store"] != store.fingerprint:
            raise SaescaleError(
                f"{store.url} is another activation store than the one this position belongs to "
                f"({store.fingerprint}, not {state['store']}); give the original store or start anew"
            )
        order = {key: state[key] for key in ("split", "batch_tokens", "seed", "mix_row_groups")}
        return cls(store, start=state["batch"], **order, **settings)

    def state(self) -> dict[str, Any]:
        """The position: `batch` is the next global batch; the rest is what the order depends on."""
        return {
            "batch": self._next,
            "seed": self._seed,
            "store": self._store.fingerprint,
            "split": self._split,
            "batch_tokens": self._batch_tokens,
            "mix_row_groups": self._mix,
        }

    def passed(self, batch: int) -> None:
        """Of a store nothing goes."""

    def close(self) -> None:
        """Ends the reading thread and drops what it had read; may be called more than once, and early."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> SourceBatch:
        if self._next == self._end or (self._closed and self._error is None):
            self.close()
            raise StopIteration
        parts: list[np.ndarray] = []
        missing = self._slice
        while missing:
            if self._used == len(self._window):
                self._window, self._used = self._take_window(), 0
            part = self._window[self._used : self._used + missing]
            self._used += len(part)
            missing -= len(part)
            parts.append(part)
        self._next += 1
        return SourceBatch(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _take_window(self) -> np.ndarray:
        began = time.perf_counter()
        with waiting(f"activations of {hide_secrets(self._store.url)}"):
            if self.while_waiting is None:
                self._is_there()
            else:
                self.while_waiting(self._is_there)
            self.wait_seconds += time.perf_counter() - began
            with self._changed:
                if self._ready:
                    self._changed.notify_all()
                    return self._ready.popleft()
        raise StopIteration  # closed

    def _is_there(self, timeout_s: float | None = None) -> bool:
        """Whether a window is, or none will be, after so long at most. Raises what the reading thread met."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: bool(self._ready) or self._error is not None or self._closed, timeout_s
            )
            error = None if self._ready else self._error
        if error is not None:
            self.close()
            raise error
        return there

    # --- the reading thread

    def _read_ahead(self) -> None:
        try:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="saescale-read") as pool:
                for window in self._windows.within(self._first_row, self._end_row):
                    with self._changed:
                        while not self._closed and self._ready and self._enough_ready():
                            self._changed.wait()
                        if self._closed:
                            return
                    rows = self._read_window(window, pool)
                    with self._changed:
                        if self._closed:
                            return
                        self._ready.append(rows)
                        self._changed.notify_all()
        except Closed:
            return
        except BaseException as error:  # whatever it is, the consumer must hear of it or it waits for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _enough_ready(self) -> bool:
        return sum(len(rows) for rows in self._ready) >= self._ready_rows

    def _read_window(self, window: Window, pool: ThreadPoolExecutor) -> np.ndarray:
        """This rank's rows of the window in stream order, [rows, d_model]."""
        starts = np.cumsum([0] + [group.rows for group in window.groups])
        order = permutation(int(starts[-1]), self._seed, window.epoch, window.number + 1)
        place = np.arange(window.first, window.first + len(order))
        mine = (place % self._batch_tokens) // self._slice == self._rank
        mine &= place >= self._first_row
        if self._end_row is not None:
            mine &= place < self._end_row
        order = order[mine]
        out = np.empty((len(order), self._store.d_model), self._window.dtype)
        # Sorted by source: each row group is read once and scattered straight to where its rows belong.
        target = np.argsort(order)
        source = order[target]
        cuts = np.searchsorted(source, starts)

        def fill(index: int) -> None:
            low, high = cuts[index], cuts[index + 1]
            if low == high or self._closed:
                return
            group = window.groups[index]
            act = self._store.read_row_group(self._split, group)
            self._check(group, act)
            rows = source[low:high] - starts[index]
            out[target[low:high]] = act if len(rows) == len(act) else act[rows]

        for _ in pool.map(fill, range(len(window.groups))):
            pass
        return out

    def _check(self, group: RowGroup, act: np.ndarray) -> None:
        key = (self._store.url, self._store.fingerprint, group.shard, group.index)
        if key not in _checked:
            self._store.check_values(group, act)
            _checked.add(key)


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that is the same on every machine and with every version of numpy.

    numpy keeps bit generators stable but not `Generator.permutation`, hence the sort of raw 64-bit draws.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
