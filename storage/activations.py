"""The activation store: Parquet shards of activations, and the manifest that seals them (FORMAT.md)."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage import files
from storage.errors import SaescaleError, Unavailable

FORMAT = 1
MANIFEST = "manifest.json"
Dtype = Literal["float16", "bfloat16"]
Split = Literal["train", "heldout"]

# All exponent bits set means NaN or Inf; with the sign bit masked off, magnitudes compare like integers.
_EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
_MAGNITUDE = np.uint16(0x7FFF)
_CHUNK_BYTES = 8 << 20
CONSTANT = "zero norm once its mean is subtracted (all its values are equal)"


class Site(BaseModel):
    """Where in the subject the rows were taken; `positions` says which positions count (all but BOS)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int
    hook: Literal["resid_post"] = "resid_post"
    positions: str


class Shard(BaseModel):
    """One Parquet file: its name in the store, rows, size in bytes and the xxh3-64 (hex) of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    split: Split
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    xxh3: str


class Manifest(BaseModel):
    """What a store holds.

    `mean` is [d_model], `mean_square` the mean of ||x||^2, both over the train rows in float64.
    `fingerprint` identifies the weights of the subject; `digest()` identifies the store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = Field(FORMAT, ge=1, le=FORMAT)
    subject: str
    fingerprint: str
    site: Site
    d_model: int = Field(gt=0)
    dtype: Dtype
    context_length: int = Field(gt=0)
    dropped: list[str]
    corpus: str
    seed: int
    row_group_rows: int = Field(gt=0)
    shards: list[Shard]
    mean: list[float]
    mean_square: float = Field(allow_inf_nan=False)
    created_with: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if len(self.mean) != self.d_model or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must hold d_model = {self.d_model} finite numbers")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("two shards have the same name")
        return self

    def digest(self) -> str:
        """xxh3-128 (hex) of the canonical JSON; with the shards' checksums in it, it changes with any row."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())


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
    step = max(1, _CHUNK_BYTES // 8 // max(1, 2 * bits.shape[1]))
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
        data_page_size=_CHUNK_BYTES,
    )
    content = sink.getvalue()
    files.write_atomic(target, memoryview(content))
    return Shard(name=name, split=split, rows=len(act), bytes=content.size, xxh3=xxhash.xxh3_64_hexdigest(content))


def write_manifest(url: str, manifest: Manifest) -> None:
    """Seals the store: it is immutable from now on. SaescaleError when it is sealed or lacks a shard."""
    target = files.join(url, MANIFEST)
    if files.exists(target):
        raise SaescaleError(f"{target} exists and its store is immutable; write to another folder")
    for shard in manifest.shards:
        _check_size(files.join(url, shard.name), shard)
    files.write_atomic(target, (manifest.model_dump_json(indent=1) + "\n").encode())


# --- reading


class ActivationStore:
    """A sealed store. Reading is safe from several threads; no file stays open between calls."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = url
        self.manifest = manifest
        self.fingerprint = manifest.digest()
        self.d_model = manifest.d_model
        self._footers: dict[int, pq.FileMetaData] = {}

    @staticmethod
    def open(url: str) -> "ActivationStore":
        """Opens a store by its manifest alone; SaescaleError when that is missing, newer, broken or empty."""
        where = files.join(url, MANIFEST)
        try:
            content = files.read_bytes(where)
        except FileNotFoundError as error:
            raise SaescaleError(
                f"{url} is no activation store: it has no {MANIFEST}; give the folder of a finished harvest, "
                "or run the harvest again to finish it"
            ) from error
        try:
            raw = json.loads(content)
            version = raw["format"] if isinstance(raw, dict) else None
            if isinstance(version, int) and version > FORMAT:
                raise SaescaleError(
                    f"{where} has format {version}, this saescale reads up to {FORMAT}; upgrade saescale"
                )
            manifest = Manifest.model_validate(raw)
        except (ValueError, KeyError) as error:
            reason = _reason(error)
            raise SaescaleError(f"{where} is damaged ({reason}); restore it or harvest again") from error
        if not sum(shard.rows for shard in manifest.shards):
            raise SaescaleError(f"the activation store {url} is empty (0 rows); harvest some tokens first")
        return ActivationStore(url, manifest)

    def rows(self, split: str) -> int:
        """Number of rows of the split."""
        return sum(shard.rows for shard in self.manifest.shards if shard.split == split)

    def require_rows(self, split: str, wanted: int, setting: str) -> None:
        """Raises SaescaleError, which names `setting`, where the split has fewer than `wanted` rows."""
        if self.rows(split) < wanted:
            raise SaescaleError(
                f"the activation store {self.url} holds {self.rows(split)} {split} rows "
                f"and {setting} asks for {wanted}; lower it, or harvest more"
            )

    def row_groups(self, split: str) -> list[RowGroup]:
        """All row groups of the split in stored order, from the manifest alone."""
        return [
            group
            for number, shard in enumerate(self.manifest.shards)
            if shard.split == split
            for group in self._groups_of(number)
        ]

    def read_row_group(self, split: str, group: RowGroup) -> np.ndarray:
        """One row group, [rows, d_model] raw dtype, read-only; SaescaleError when it cannot be read."""
        shard = self.manifest.shards[group.shard]
        if shard.split != split:
            raise ValueError(f"shard {group.shard} ({shard.name}) is not of the split {split!r}")
        try:
            with self._open(group.shard) as parquet:
                column = parquet.read_row_group(group.index, columns=["act"], use_threads=False).column(0)
                array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        except SaescaleError:
            raise
        except Exception as error:  # object stores raise classes of their own
            where = files.join(self.url, shard.name)
            # What Arrow itself has to say of a file is an OSError too, but without a number.
            of_arrow = type(error) is OSError and error.errno is None
            if not of_arrow and files.may_pass(where, error):
                raise Unavailable(f"{where}: row group {group.index} was not answered ({_reason(error)})") from error
            raise self._damaged(group, f"cannot be read ({_reason(error)})") from error
        if array.null_count or len(array) != group.rows:
            raise self._damaged(group, f"has {len(array)} rows with {array.null_count} nulls")
        values = np.frombuffer(array.buffers()[1], raw_dtype(self.manifest.dtype))
        first = array.offset * self.d_model
        return values[first : first + group.rows * self.d_model].reshape(group.rows, self.d_model)

    def read_split(self, split: str, limit_rows: int | None = None) -> np.ndarray:
        """The first `limit_rows` rows (all when None) in stored order, values checked: [rows, d_model]."""
        wanted = self.rows(split) if limit_rows is None else min(limit_rows, self.rows(split))
        out = np.empty((wanted, self.d_model), raw_dtype(self.manifest.dtype))
        done = 0
        for group in self.row_groups(split):
            if done == wanted:
                break
            act = self.read_row_group(split, group)
            self.check_values(group, act)
            take = min(len(act), wanted - done)
            out[done : done + take] = act[:take]
            done += take
        return out

    def check_values(self, group: RowGroup, act: np.ndarray) -> None:
        """SaescaleError naming file, row group and row when that group, `act`, has a row of `find_bad_row`."""
        bad = find_bad_row(act, self.manifest.dtype)
        if bad is not None:
            raise self._damaged(group, f"has {bad[1]} in row {bad[0]}")

    def verify(self, full: bool, progress: Callable[[int, int], None] | None = None) -> None:
        """Checks every shard; SaescaleError at the first fault names file, row group and what is wrong.

        Quick: presence, size in bytes, Parquet footer, width of `act`, row counts. Full: also the checksum
        and every value (find_bad_row). `progress(done, total)` counts bytes of shards.
        """
        total = sum(shard.bytes for shard in self.manifest.shards)
        done = 0
        for number, shard in enumerate(self.manifest.shards):
            self._footers.pop(number, None)
            with self._open(number):
                pass
            if full:
                self._check_sum(shard)
                for group in self._groups_of(number):
                    self.check_values(group, self.read_row_group(shard.split, group))
            done += shard.bytes
            if progress is not None:
                progress(done, total)

    def _groups_of(self, number: int) -> list[RowGroup]:
        size, rows = self.manifest.row_group_rows, self.manifest.shards[number].rows
        return [RowGroup(number, index, min(size, rows - first)) for index, first in enumerate(range(0, rows, size))]

    @contextmanager
    def _open(self, number: int) -> Iterator[pq.ParquetFile]:
        """The shard, its size checked and, the first time, its footer."""
        shard = self.manifest.shards[number]
        where = files.join(self.url, shard.name)
        local = files.local_path(where)
        # A local size is checked every time: to read a mapped file that was cut short kills the process.
        if local or number not in self._footers:
            _check_size(where, shard)
        with pa.memory_map(local) if local else files.open_input(where, known_size=shard.bytes) as source:
            try:
                parquet = pq.ParquetFile(source, metadata=self._footers.get(number))
            except (pa.ArrowException, OSError) as error:
                raise SaescaleError(
                    f"{where}: not a readable Parquet file ({_reason(error)}); restore the shard or harvest again"
                ) from error
            if number not in self._footers:
                self._check_footer(where, number, parquet)
                self._footers[number] = parquet.metadata
            yield parquet

    def _check_footer(self, where: str, number: int, parquet: pq.ParquetFile) -> None:
        footer, schema = parquet.metadata, parquet.schema_arrow
        remedy = "restore the shard or harvest again"
        if "act" not in schema.names:
            raise SaescaleError(f"{where}: has no column act; {remedy}")
        kind = schema.field("act").type
        if kind != pa.binary(2 * self.d_model):
            raise SaescaleError(
                f"{where}: column act is {kind}, but d_model = {self.d_model} needs "
                f"fixed_size_binary[{2 * self.d_model}] (wrong width); {remedy}"
            )
        found = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        expected = [group.rows for group in self._groups_of(number)]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            what = (
                f"{len(found)} row groups, not {len(expected)}"
                if at is None
                else f"row group {at} has {found[at]} rows, not {expected[at]}"
            )
            raise SaescaleError(f"{where}: {what} as its manifest says; {remedy}")

    def _check_sum(self, shard: Shard) -> None:
        where = files.join(self.url, shard.name)
        checksum = xxhash.xxh3_64()
        with files.open_input(where, known_size=shard.bytes) as file:
            while chunk := file.read(_CHUNK_BYTES):
                checksum.update(chunk)
        if checksum.hexdigest() != shard.xxh3:
            raise SaescaleError(
                f"{where}: checksum is {checksum.hexdigest()}, the manifest says {shard.xxh3}; "
                "the file was changed or damaged: restore the shard or harvest again"
            )

    def _damaged(self, group: RowGroup, what: str) -> SaescaleError:
        where = files.join(self.url, self.manifest.shards[group.shard].name)
        return SaescaleError(f"{where}: row group {group.index} {what}; restore the shard or harvest again")


def _schema(d_model: int) -> pa.Schema:
    columns = {"act": pa.binary(2 * d_model), "token": pa.int32(), "pos": pa.int16(), "doc": pa.int32()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def _check_size(where: str, shard: Shard) -> None:
    try:
        found = files.size(where)
    except FileNotFoundError as error:
        raise SaescaleError(f"{where}: the shard is missing; restore it or harvest again") from error
    if found != shard.bytes:
        fault = "truncated" if found < shard.bytes else "too long"
        raise SaescaleError(
            f"{where}: {fault}, {found} bytes where the manifest says {shard.bytes}; restore the shard or harvest again"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'manifest'}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"no key {error}"
    return " ".join(str(error).split())
