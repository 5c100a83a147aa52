"""The activation store: exact round trips, and one clear line for everything that can be wrong with one."""

import json
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Manifest, write_manifest
from saescale.storage.rows import RowGroup, to_float32, write_shard
from saescale.storage.store import ActivationStore
from tests.storage.small_rows import rows_of, varied
from tests.trainers.synthetic import sparse_rows, write_store

BuildStore = Callable[..., ActivationStore]


def rewrite_manifest(store: ActivationStore, **changes: Any) -> None:
    where = files.join(store.url, "manifest.json")
    files.write_atomic(where, json.dumps(json.loads(files.read_bytes(where)) | changes).encode())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_store_comes_back_on_every_file_system(build_store: BuildStore, any_url: str, dtype: str) -> None:
    store = build_store(any_url, train=(40, 20), dtype=dtype)
    assert (store.rows("train"), store.rows("heldout"), store.d_model) == (60, 16, 4)
    assert [group.rows for group in store.row_groups("train")] == [8, 8, 8, 8, 8, 8, 8, 4]
    act = to_float32(store.read_split("train"), dtype)
    assert act.dtype == np.float32
    assert np.array_equal(act[:, 0] * 128 + act[:, 1], np.arange(60))
    assert np.array_equal(store.read_split("train", 11), store.read_split("train")[:11])
    assert store.read_split("heldout", 0).shape == (0, 4)
    assert np.array_equal(store.read_row_group("train", RowGroup(1, 2, 4)), store.read_split("train")[56:])
    seen: list[tuple[int, int]] = []
    store.verify(full=False)
    store.verify(full=True, progress=lambda done, total: seen.append((done, total)))
    total = sum(shard.bytes for shard in store.manifest.shards)
    assert len(seen) == 3
    assert seen[-1] == (total, total)
    assert ActivationStore.open(any_url).fingerprint == store.fingerprint
    assert pickle.loads(pickle.dumps(store)).rows("train") == 60


@settings(max_examples=40, deadline=None)
@given(
    bits=hnp.arrays(np.uint16, st.tuples(st.integers(1, 70), st.integers(2, 9))),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    row_group_rows=st.integers(1, 80),
)
def test_any_finite_rows_come_back_bit_for_bit(bits: np.ndarray, dtype: str, row_group_rows: int) -> None:
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    bits[(bits & exponent) == exponent] = 1
    bits[~((bits & 0x7FFF).any(axis=1)), 0] = 0x8001
    bits[(bits == bits[:, :1]).all(axis=1), 0] ^= 1
    act = bits.view(np.float16) if dtype == "float16" else bits
    url = f"memory://{uuid.uuid4().hex}"
    rows = rows_of(act)
    shard = write_shard(url, "a.parquet", "train", rows, dtype, row_group_rows)
    d_model = bits.shape[1]
    manifest = Manifest(
        subject="s", fingerprint="f", site={"layer": 0, "positions": "all"}, d_model=d_model, dtype=dtype,
        context_length=8, dropped=[], corpus="c", seed=0, row_group_rows=row_group_rows, shards=[shard],
        mean=[0.0] * d_model, mean_square=0.0, created_with={},
    )  # fmt: skip
    write_manifest(url, manifest)
    store = ActivationStore.open(url)
    store.verify(full=True)
    assert store.manifest == manifest
    assert np.array_equal(store.read_split("train").view(np.uint16), bits)
    table = pq.read_table(pa.BufferReader(files.read_bytes(files.join(url, "a.parquet"))))
    assert table.schema.field("act").type == pa.binary(2 * d_model)
    for name in ("token", "pos", "doc"):
        assert np.array_equal(table[name].to_numpy(), getattr(rows, name))
    files.remove(url)


def plant(store: ActivationStore, act: np.ndarray) -> None:
    """Puts `act` in place of the first train shard and makes the manifest agree, as a foreign writer could."""
    width = 2 * act.shape[1]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(act), [None, pa.py_buffer(act)])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"act": column}), sink, row_group_size=8, compression="none")
    content = sink.getvalue().to_pybytes()
    name = store.manifest.shards[0].name
    files.write_atomic(files.join(store.url, name), content)
    shards = [shard.model_dump() for shard in store.manifest.shards]
    shards[0] |= {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}
    rewrite_manifest(store, shards=shards)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "NaN or Inf"),
        (np.inf, "NaN or Inf"),
        (0, "zero norm"),
        (7, r"zero norm once its mean is subtracted \(all its values are equal\)"),
    ],
)
def test_bad_values_in_a_store_name_file_and_row_group(
    build_store: BuildStore, tmp_path: Path, value: float, what: str
) -> None:
    store = build_store(str(tmp_path))
    act = varied(40, 4)
    act[21] = value
    plant(store, act)
    store = ActivationStore.open(str(tmp_path))
    store.verify(full=False)
    pattern = rf"train-00000\.parquet: row group 2 has {what} in row 5; "
    with pytest.raises(SaescaleError, match=pattern):
        store.verify(full=True)
    with pytest.raises(SaescaleError, match=pattern):
        store.read_split("train")
    assert len(store.read_split("train", 16)) == 16


def test_wrong_width_and_wrong_row_groups(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store(str(tmp_path))
    plant(store, np.ones((40, 5), np.float16))
    with pytest.raises(SaescaleError, match=r"train-00000\.parquet: column act .* d_model = 4 .*wrong width"):
        ActivationStore.open(str(tmp_path)).verify(full=False)
    plant(store, np.ones((39, 4), np.float16))
    store = ActivationStore.open(str(tmp_path))
    with pytest.raises(SaescaleError, match=r"train-00000\.parquet: row group 4 has 7 rows, not 8"):
        store.verify(full=False)
    with pytest.raises(SaescaleError, match="row group 4 has 7 rows, not 8"):
        store.read_row_group("train", RowGroup(0, 0, 8))
    plant(store, np.ones((48, 4), np.float16))
    with pytest.raises(SaescaleError, match="6 row groups, not 5"):
        ActivationStore.open(str(tmp_path)).verify(full=False)


def test_truncated_missing_and_altered_shards(build_store: BuildStore, any_url: str) -> None:
    store = build_store(any_url)
    where = files.join(any_url, "train-00001.parquet")
    good = files.read_bytes(where)
    first = next(group for group in store.row_groups("train") if group.shard == 1)

    files.write_atomic(where, good[:-10])
    for check in (lambda: store.verify(full=False), lambda: store.read_row_group("train", first)):
        with pytest.raises(SaescaleError, match=r"train-00001\.parquet: truncated, \d+ bytes where .* says \d+"):
            check()
    files.write_atomic(where, good + b"x")
    with pytest.raises(SaescaleError, match="too long"):
        store.verify(full=False)

    altered = bytearray(good)
    altered[60] ^= 1
    files.write_atomic(where, bytes(altered))
    store.verify(full=False)
    with pytest.raises(SaescaleError, match=r"train-00001\.parquet: checksum is \w+, the manifest says \w+"):
        store.verify(full=True)

    files.write_atomic(where, bytes(len(good)))
    with pytest.raises(SaescaleError, match="not a readable Parquet file"):
        ActivationStore.open(any_url).verify(full=False)
    with pytest.raises(SaescaleError, match=r"train-00001\.parquet: .*row group 0 cannot|row group 0 cannot be read"):
        store.read_row_group("train", first)

    files.remove(where)
    with pytest.raises(SaescaleError, match=r"train-00001\.parquet: the shard is missing"):
        store.verify(full=False)


def test_an_unusable_manifest_is_one_clear_line(build_store: BuildStore, tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"no activation store: it has no manifest\.json"):
        ActivationStore.open(str(tmp_path / "nowhere"))
    store = build_store(str(tmp_path))
    where = str(tmp_path / "manifest.json")
    good = files.read_bytes(where)
    cases: list[tuple[bytes, str]] = [
        (good[:100], "damaged"),
        (b"[1]", "damaged"),
        (b"{}", "damaged .*format"),
        (good.replace(b'"format": 2', b'"format": 3'), "has format 3, this saescale reads up to 2; upgrade"),
        (good.replace(b'"d_model": 4', b'"d_model": 5'), "damaged .*mean"),
        (good.replace(b'"dtype": "float16"', b'"dtype": "int8"'), "damaged .*dtype"),
    ]
    for content, pattern in cases:
        assert content != good
        files.write_atomic(where, content)
        with pytest.raises(SaescaleError, match=pattern) as caught:
            ActivationStore.open(str(tmp_path))
        assert "manifest.json" in str(caught.value)
        assert "\n" not in str(caught.value)
    files.write_atomic(where, good)
    for claimed, pattern in (
        ({"rows": 10**12}, r"damaged \(train-00000\.parquet cannot hold 1,000,000,000,000 rows"),
        ({"rows": 10**30}, r"damaged \(shards\.0\.rows"),
        ({"rows": 10**15, "bytes": 10**18}, r"train-00000\.parquet: truncated"),
        ({"rows": 41}, r"train-00000\.parquet: (row group|6 row groups|5 row groups, not 6)"),
    ):
        shards = [shard.model_dump() for shard in store.manifest.shards]
        text = json.loads(good) | {"shards": [shards[0] | claimed, *shards[1:]]}
        files.write_atomic(where, json.dumps(text).encode())
        for read in (lambda found: found.verify(full=True), lambda found: found.read_split("train")):
            with pytest.raises(SaescaleError, match=pattern):
                read(ActivationStore.open(str(tmp_path)))
    files.write_atomic(where, good)
    rewrite_manifest(store, shards=[])
    with pytest.raises(SaescaleError, match=r"is empty \(0 rows\)"):
        ActivationStore.open(str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        OSError("Memory mapping file failed: Cannot allocate memory"),
        MemoryError("no"),
        pa.ArrowException("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
    ],
    ids=["map", "python", "thread", "python-thread"],
)
def test_memory_that_ran_out_is_no_damage(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.open(write_store(str(tmp_path), sparse_rows(2_048, 1), sparse_rows(1_024, 2)))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(ActivationStore, "_open", fail)
    with pytest.raises(MemoryError, match=r"train-00000\.parquet"):
        store.read_split("train")
