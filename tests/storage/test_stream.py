"""The stream: which rows come when, at any world size, from any start; and what happens when reading fails."""

import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saescale.storage import stream as stream_module
from saescale.storage.errors import SaescaleError
from saescale.storage.rows import RowGroup, to_float32
from saescale.storage.source import SourceBatch
from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from saescale.storage.waiting import waits

BuildStore = Callable[..., ActivationStore]


def numbers(batches: list[SourceBatch], dtype: str = "float16") -> list[list[int]]:
    """The row numbers of each batch (see the fixture that builds the stores)."""
    rows = [to_float32(batch.x, dtype) for batch in batches]
    return [(act[:, 0] * 128 + act[:, 1]).astype(int).tolist() for act in rows]


def joined(slices: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(slices))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("saescale-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reading_threads() == []


@pytest.fixture
def store(build_store: BuildStore) -> ActivationStore:
    return build_store(f"memory://{uuid.uuid4().hex}", train=(40, 24, 17))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_order_is_a_bijection_and_a_pure_function(build_store: BuildStore, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float16", "bfloat16"]))
    sizes = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="shards"))
    store = build_store(
        f"memory://{uuid.uuid4().hex}", train=sizes, dtype=dtype, row_group_rows=data.draw(st.integers(1, 9))
    )
    world_size = data.draw(st.integers(1, 4), label="world_size")
    batch_tokens = world_size * data.draw(st.integers(1, 12), label="slice")
    order = {
        "batch_tokens": batch_tokens,
        "seed": data.draw(st.integers(0, 2**40), label="seed"),
        "mix_row_groups": data.draw(st.integers(1, 5), label="mix"),
    }
    total = store.rows("train")
    batches = -(-2 * total // batch_tokens)
    with Stream(store, batches=batches, **order) as whole:
        global_batches = numbers(list(whole), dtype)

    # Every epoch holds each row once, and the batches tile the epochs without a gap.
    flat = joined(global_batches)
    assert len(flat) == batches * batch_tokens
    assert sorted(flat[:total]) == sorted(flat[total : 2 * total]) == list(range(total))

    # The slices of the ranks make up the global batches, from any start.
    start = data.draw(st.integers(0, batches), label="start")
    slices = []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "start": start, "prefetch": data.draw(st.integers(1, 9))}
        with Stream(store, batches=batches, **place, **order) as part:
            slices.append(numbers(list(part), dtype))
    assert [joined(parts) for parts in zip(*slices, strict=True)] == global_batches[start:]


def test_resume_continues_at_any_world_size(store: ActivationStore) -> None:
    with Stream(store, batch_tokens=12, seed=3, batches=20) as stream:
        expected = numbers([next(stream) for _ in range(20)])
    with Stream(store, batch_tokens=12, seed=3) as stream:
        begun = numbers([next(stream) for _ in range(7)])
        state = stream.state()
    assert begun == expected[:7]
    assert state["batch"] == 7
    assert (state["seed"], state["store"]) == (3, store.fingerprint)
    slices = []
    for rank in range(3):
        with Stream.resume(store, state, batches=20, rank=rank, world_size=3) as part:
            slices.append(numbers(list(part)))
            assert part.state()["batch"] == 20
    assert [joined(parts) for parts in zip(*slices, strict=True)] == expected[7:]


def test_resume_refuses_another_store(store: ActivationStore, build_store: BuildStore) -> None:
    other = build_store(f"memory://{uuid.uuid4().hex}", train=(41,))
    with Stream(store, batch_tokens=4, seed=0) as stream, pytest.raises(SaescaleError, match="another activation"):
        Stream.resume(other, stream.state())


def test_resume_reads_only_the_windows_it_needs(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RowGroup] = []
    original = ActivationStore.read_row_group

    def recorded(self: ActivationStore, split: str, group: RowGroup) -> np.ndarray:
        read.append(group)
        return original(self, split, group)

    monkeypatch.setattr(ActivationStore, "read_row_group", recorded)
    with Stream(store, batch_tokens=8, seed=0, start=10**9, batches=10**9 + 1, mix_row_groups=2) as stream:
        assert len(list(stream)) == 1
    assert len(read) <= 4


def test_the_same_batches_from_every_file_system(store: ActivationStore, build_store: BuildStore, any_url: str) -> None:
    copy = build_store(any_url, train=(40, 24, 17))
    assert copy.fingerprint == store.fingerprint
    with (
        Stream(store, batch_tokens=9, seed=1, batches=20) as left,
        Stream(copy, batch_tokens=9, seed=1, batches=20) as right,
    ):
        assert numbers(list(left)) == numbers(list(right))


def test_a_batch_mixes_many_row_groups_and_seeds_and_epochs_differ(build_store: BuildStore) -> None:
    store = build_store(f"memory://{uuid.uuid4().hex}", train=(128 * 32, 128 * 9), row_group_rows=128)
    batches = store.rows("train") // 128
    with Stream(store, batch_tokens=128, seed=0, batches=2 * batches) as stream:
        rows = numbers(list(stream))
    groups = [len({row // 128 for row in batch}) for batch in rows]
    # 41 row groups make 6 windows of 6 or 7; 128 draws miss one of them in about one batch of a million.
    assert min(groups) >= 6
    assert max(groups) <= 14
    runs = sum(int((np.diff(batch) == 1).sum()) for batch in rows)
    assert runs < 0.02 * 2 * store.rows("train"), "neighbours in the store must not stay neighbours"
    assert rows[:batches] != rows[batches:]
    with Stream(store, batch_tokens=128, seed=1, batches=2) as stream:
        assert numbers(list(stream)) != rows[:2]


def test_the_order_never_changes(build_store: BuildStore) -> None:
    """A pinned order: a ledger written today must resume with any later version of numpy or of this file."""
    store = build_store(f"memory://{uuid.uuid4().hex}", train=(6, 5), row_group_rows=2)
    with Stream(store, batch_tokens=11, seed=7, batches=2, mix_row_groups=3) as stream:
        assert numbers(list(stream)) == PINNED


PINNED = [[1, 7, 8, 0, 6, 9, 4, 2, 5, 3, 10], [6, 4, 3, 5, 2, 7, 10, 1, 0, 9, 8]]


def test_batches_belong_to_the_consumer(store: ActivationStore) -> None:
    with (
        Stream(store, batch_tokens=5, seed=0, batches=40) as stream,
        Stream(store, batch_tokens=5, seed=0, batches=40) as untouched,
    ):
        for (mine, _), (theirs, _) in zip(stream, untouched, strict=True):
            assert np.array_equal(mine, theirs)
            assert mine.dtype == np.float16
            assert mine.shape == (5, 4)
            mine[:] = np.nan


def test_ends_and_empty_ranges(store: ActivationStore) -> None:
    with Stream(store, "heldout", batch_tokens=16, seed=0, batches=1) as stream:
        assert sorted(numbers(list(stream))[0]) == list(range(16))
        with pytest.raises(StopIteration):
            next(stream)
    for start in (5, 6):
        with Stream(store, batch_tokens=16, seed=0, start=start, batches=5) as stream:
            assert list(stream) == []


def test_impossible_arguments(store: ActivationStore, build_store: BuildStore) -> None:
    with pytest.raises(SaescaleError, match="multiple of the number of ranks"):
        Stream(store, batch_tokens=10, seed=0, world_size=3)
    with pytest.raises(ValueError, match="rank=2"):
        Stream(store, batch_tokens=10, seed=0, rank=2, world_size=2)
    empty = build_store(f"memory://{uuid.uuid4().hex}", heldout=())
    with pytest.raises(SaescaleError, match="has no heldout rows"):
        Stream(empty, "heldout", batch_tokens=10, seed=0)


def test_a_reading_error_reaches_the_consumer_after_the_good_batches(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"batch_tokens": 8, "seed": 0, "mix_row_groups": 2}
    with Stream(store, batches=10, **order) as stream:
        expected = numbers(list(stream))
    original = ActivationStore.read_row_group
    reads: list[RowGroup] = []

    def failing(self: ActivationStore, split: str, group: RowGroup) -> np.ndarray:
        reads.append(group)
        if len(reads) > 4:
            raise SaescaleError("the disk is gone")
        return original(self, split, group)

    monkeypatch.setattr(ActivationStore, "read_row_group", failing)
    got: list[SourceBatch] = []
    stream = Stream(store, batches=10, **order)
    with pytest.raises(SaescaleError, match="the disk is gone"):
        got.extend(stream)
    assert 2 <= len(got) <= 4, "two windows of at most 16 rows were good"
    assert numbers(got) == expected[: len(got)]
    with pytest.raises(SaescaleError, match="the disk is gone"):
        next(stream)


def test_bad_values_name_file_and_row_group_on_the_first_reading_only(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ActivationStore.read_row_group
    checks: list[RowGroup] = []

    def poisoned(self: ActivationStore, split: str, group: RowGroup) -> np.ndarray:
        act = original(self, split, group).copy()
        if (group.shard, group.index) == (1, 2):
            act[3, 1] = np.inf
        return act

    monkeypatch.setattr(ActivationStore, "read_row_group", poisoned)
    with (
        pytest.raises(SaescaleError, match=r"train-00001\.parquet: row group 2 has NaN or Inf in row 3"),
        Stream(store, batch_tokens=8, seed=0, batches=100) as stream,
    ):
        list(stream)
    monkeypatch.undo()
    check = ActivationStore.check_values
    monkeypatch.setattr(ActivationStore, "check_values", lambda *args: (checks.append(args[1]), check(*args)))
    with Stream(store, batch_tokens=8, seed=0, batches=40) as stream:
        assert len(list(stream)) == 40
    assert len(checks) == len(set(checks))
    assert RowGroup(1, 2, 8) in checks


def test_close_does_not_hang_whatever_the_thread_does(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for consumed in (0, 1, 9):
        stream = Stream(store, batch_tokens=8, seed=0)
        for _ in range(consumed):
            next(stream)
        stream.close()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)

    original = ActivationStore.read_row_group

    def slow(self: ActivationStore, split: str, group: RowGroup) -> np.ndarray:
        time.sleep(0.1)
        return original(self, split, group)

    monkeypatch.setattr(ActivationStore, "read_row_group", slow)
    stream = Stream(store, batch_tokens=8, seed=0)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_process_that_forgets_to_close_ends_all_the_same(build_store: BuildStore, tmp_path: Path) -> None:
    build_store(str(tmp_path))
    program = (
        "import sys\n"
        "from saescale.storage.store import ActivationStore\n"
        "from saescale.storage.stream import Stream\n"
        "print(next(Stream(ActivationStore.open(sys.argv[1]), batch_tokens=4, seed=0)).x.shape)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(stream_module.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(4, 4)\n", "")


def test_waiting_is_counted(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stream._read_window

    def slow(self: Stream, *args: object) -> np.ndarray:
        while not (waits(0.0) or self._closed):  # the consumer does not wait yet
            time.sleep(0.01)
        time.sleep(0.1)
        return original(self, *args)

    monkeypatch.setattr(stream_module.Stream, "_read_window", slow)
    with Stream(store, batch_tokens=8, seed=0) as stream:
        assert stream.wait_seconds == 0
        next(stream)
        assert stream.wait_seconds > 0.05


def test_at_most_three_windows_are_in_memory(build_store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that batches are cut from, the next, and one that is read; two while the consumer is slow. So many the
    planner counts with."""
    # Of whole row groups: after a window of less than a batch another one is read at once.
    store = build_store(f"memory://{uuid.uuid4().hex}", train=(40, 24, 16))
    original, windows, at_once = Stream._read_window, list[weakref.ref[np.ndarray]](), list[int]()

    def alive(most: int) -> int:
        """A thread of the pool that finds no processor holds on to what it has read for a moment longer."""
        for _ in range(5_000):
            if (there := sum(window() is not None for window in windows)) <= most:
                break
            time.sleep(0.001)
        return there

    def read(self: Stream, *args: object) -> np.ndarray:
        at_once.append(alive(2) + 1)
        rows = original(self, *args)
        windows.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(stream_module.Stream, "_read_window", read)
    with Stream(store, batch_tokens=8, seed=0, mix_row_groups=2, prefetch=1) as stream:
        for _ in range(50):
            batch = next(stream)
            while not stream._ready:  # the thread reads
                time.sleep(0.001)
            assert alive(2) == 2
            assert len(batch.x) == 8
    assert len(windows) > 10
    assert max(at_once) <= 3
