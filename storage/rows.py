"""Rows of a shard: how they travel, which of them no SAE can use, and how a shard is written (FORMAT.md)."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import MANIFEST, Dtype, Shard, Split

# All exponent bits set means NaN or Inf; with the sign bit masked off, magnitudes compare like integers.
_EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
_MAGNITUDE = np.uint16(0x7FFF)
CHUNK_BYTES = 8 << 20
CONSTANT = "zero norm once its mean is subtracted (all its values are equal)"


class Rows(NamedTuple):
    """Rows of one shard and where they are from.

    `act` is [rows, d_model] float16, or uint16 bit patterns when the store is bfloat16; `token` (int32),
    `pos` (int16, in the context) and `doc` (int32, in the corpus) are [rows].
    """

    act: np.ndarray
    token: np.ndarray
    pos: np.ndarray
    doc: np.ndarray


class RowGroup(NamedTuple):
    """Row group `index` of shard number `shard` (its place in `manifest.shards`)."""

    shard: int
    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    rows: int


def raw_dtype(dtype: str) -> type[np.generic]:
    """The numpy type in which rows travel: numpy has no bfloat16, so its bit patterns go as uint16."""
    return np.float16 if dtype == "float16" else np.uint16


def to_float32(act: np.ndarray, dtype: str) -> np.ndarray:
    """Raw rows as float32, exactly (every float16 and bfloat16 value is a float32 value)."""
    if dtype == "bfloat16":
        return (act.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return act.astype(np.float32)


def find_bad_row(act: np.ndarray, dtype: str) -> tuple[int, str] | None:
    """The first row of `act` [rows, d_model] that no SAE can use, as (row, what is wrong), or None.

    That is NaN or Inf in it, zero norm, or `CONSTANT`: preprocessing divides by the norm that is left without the mean.
    """
    bits = act.view(np.uint16)
    step = max(1, CHUNK_BYTES // 8 // max(1, 2 * bits.shape[1]))
    for first in range(0, len(bits), step):
        part = bits[first : first + step]
        largest = (part & _MAGNITUDE).max(axis=1)
        bad = (largest >= _EXPONENT[dtype]) | (largest == 0)
        # Almost no row has equal ends, so this hardly reads anything.
        suspects = np.flatnonzero(part[:, 0] == part[:, -1])
        bad[suspects] |= (part[suspects] == part[suspects, :1]).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            if largest[row] >= _EXPONENT[dtype]:
                return first + row, "NaN or Inf"
            return first + row, "zero norm" if largest[row] == 0 else CONSTANT
    return None


# --- writing


def write_shard(url: str, name: str, split: Split, rows: Rows, dtype: Dtype, row_group_rows: int) -> Shard:
    """Writes one shard of the store at `url` atomically and returns its entry for the manifest.

    Raises SaescaleError on a row with NaN, Inf or zero norm (also once its mean over d_model is subtracted), and when
    the store is sealed by a manifest.
    """
    act = np.ascontiguousarray(rows.act)
    if act.ndim != 2 or act.dtype != raw_dtype(dtype) or any(len(column) != len(act) for column in rows):
        raise ValueError(
            f"expected [rows, d_model] {raw_dtype(dtype).__name__} and columns of equal length, "
            f"got act {act.shape} {act.dtype} and columns of {[len(column) for column in rows]}"
        )
    target = files.join(url, name)
    if files.exists(files.join(url, MANIFEST)):
        raise SaescaleError(f"{url} already has a {MANIFEST} and is immutable; write to another folder")
    bad = find_bad_row(act, dtype)
    if bad is not None:
        raise SaescaleError(
            f"{target}: row {bad[0]} (row group {bad[0] // row_group_rows}) has {bad[1]}; "
            "nothing was written: check the subject and the dropped positions, "
            "or harvest as bfloat16 if values exceed float16"
        )
    width = pa.binary(2 * act.shape[1])
    table = pa.Table.from_arrays(
        [
            pa.FixedSizeBinaryArray.from_buffers(width, len(act), [None, pa.py_buffer(act)]),
            pa.array(rows.token, pa.int32()),
            pa.array(rows.pos, pa.int16()),
            pa.array(rows.doc, pa.int32()),
        ],
        schema=_schema(act.shape[1]),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=CHUNK_BYTES,
    )
    content = sink.getvalue()
    files.write_atomic(target, memoryview(content))
    return Shard(name=name, split=split, rows=len(act), bytes=content.size, xxh3=xxhash.xxh3_64_hexdigest(content))


def _schema(d_model: int) -> pa.Schema:
    columns = {"act": pa.binary(2 * d_model), "token": pa.int32(), "pos": pa.int16(), "doc": pa.int32()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
