"""The activation store: Parquet shards of activations behind the manifest that seals them (FORMAT.md)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from saescale.storage import files
from saescale.storage.documents import read_model
from saescale.storage.errors import SaescaleError, Unavailable, one_line
from saescale.storage.manifest import FORMAT, MANIFEST, Dtype, Manifest, Shard, Site, check_size
from saescale.storage.rows import CHUNK_BYTES, RowGroup, Rows, find_bad_row, raw_dtype
from saescale.storage.source import Order
from saescale.storage.stream import Stream

_PLACES = {"token": np.int32, "pos": np.int16, "doc": np.int32}  # of a row: columns of Rows beside act


class ActivationStore:
    """A sealed store, the `Source` of files. Reading is safe from several threads; no file stays open between calls."""

    def __init__(self, url: str, manifest: Manifest) -> None:
        self.url = url
        self.manifest = manifest
        self.fingerprint = manifest.digest()
        self.d_model = manifest.d_model
        self.dtype: Dtype = manifest.dtype
        self._footers: dict[int, pq.FileMetaData] = {}
        self._present = False  # whether the shards were found to be there, of their sizes

    @staticmethod
    def open(url: str) -> "ActivationStore":
        """Opens a store by its manifest alone; SaescaleError when that is missing, newer, broken or empty."""
        where = files.join(url, MANIFEST)
        try:
            manifest = read_model(where, Manifest, "restore it or harvest again", FORMAT)
        except FileNotFoundError as error:
            raise SaescaleError(
                f"{url} is no activation store: it has no {MANIFEST}; give the folder of a finished harvest, "
                "or run the harvest again to finish it"
            ) from error
        if not sum(shard.rows for shard in manifest.shards):
            raise SaescaleError(f"the activation store {url} is empty (0 rows); harvest some tokens first")
        return ActivationStore(url, manifest)

    # --- as a source (source.py)

    @property
    def identity(self) -> str:
        """The store's fingerprint (FORMAT.md), which changes with any row."""
        return self.fingerprint

    @property
    def mixed_rows(self) -> int | None:
        """Rows of a window of its stream, where the order does not say how many are mixed."""
        return None

    @property
    def subject(self) -> str:
        """Its name, as `trainers.subjects` takes it."""
        return self.manifest.subject

    @property
    def site(self) -> Site:
        """Layer, hook and positions of the rows."""
        return self.manifest.site

    def batches(self, order: Order, start: int = 0, stop: int | None = None, rank: int = 0, ranks: int = 1) -> Stream:
        """Batches with x [batch_tokens // ranks, d_model]; raises SaescaleError for a split without rows, and where
        ranks do not divide the batch."""
        return Stream(
            self, order.split, batch_tokens=order.batch_tokens, seed=order.seed, mix_row_groups=order.mix_row_groups,
            start=start, batches=stop, rank=rank, world_size=ranks,
        )  # fmt: skip

    def resume(self, state: dict[str, Any], stop: int | None = None, rank: int = 0, ranks: int = 1) -> Stream:
        """Goes on where `state()` of a stream was taken. Raises SaescaleError where that is of another store."""
        return Stream.resume(self, state, batches=stop, rank=rank, world_size=ranks)

    def heldout(self, rows: int | None = None, columns: Sequence[str] = ("act",)) -> Rows:
        """The first held-out rows in stored order, values checked: act [rows, d_model] raw dtype, `token`, `pos` and
        `doc` [rows] each; of no rows what `columns` does not name. Raises SaescaleError where there are fewer."""
        wanted = self.rows("heldout") if rows is None else rows
        self.require_rows("heldout", wanted, "the held-out set")
        groups = self.row_groups("heldout")
        act = self.read_split("heldout", wanted if "act" in columns else 0)
        found = {name: np.empty(wanted if name in columns else 0, dtype) for name, dtype in _PLACES.items()}
        done = 0
        for group in groups:
            names = [name for name in found if name in columns]
            if done >= wanted or not names:
                break
            take = min(group.rows, wanted - done)
            for name, values in self._read(group, names).items():
                found[name][done : done + take] = values.slice(0, take).to_numpy()
            done += take
        return Rows(act, **found)

    # --- rows

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
        """All row groups of the split in stored order.

        Raises SaescaleError where a shard is missing or has not the bytes that the manifest says."""
        self._require_shards()
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
        array = self._read(group, ["act"])["act"]
        values = np.frombuffer(array.buffers()[1], raw_dtype(self.manifest.dtype))
        first = array.offset * self.d_model
        return values[first : first + group.rows * self.d_model].reshape(group.rows, self.d_model)

    def _read(self, group: RowGroup, names: list[str]) -> dict[str, pa.Array]:
        """Columns of a row group, [rows] each and without nulls."""
        try:
            with self._open(group.shard) as parquet:
                table = parquet.read_row_group(group.index, columns=names, use_threads=False)
                arrays = {name: _one_chunk(table.column(name)) for name in names}
        except SaescaleError:
            raise
        except Exception as error:  # object stores raise classes of their own
            where = files.join(self.url, self.manifest.shards[group.shard].name)
            files.require_memory(where, error)
            # What Arrow itself has to say of a file is an OSError too, but without a number.
            of_arrow = type(error) is OSError and error.errno is None
            if not of_arrow and files.may_pass(where, error):
                raise Unavailable(f"{where}: row group {group.index} was not answered ({one_line(error)})") from error
            raise self._damaged(group, f"cannot be read ({one_line(error)})") from error
        for array in arrays.values():
            if array.null_count or len(array) != group.rows:
                raise self._damaged(group, f"has {len(array)} rows with {array.null_count} nulls")
        return arrays

    def read_split(self, split: str, limit_rows: int | None = None) -> np.ndarray:
        """The first `limit_rows` rows (all when None) in stored order, values checked: [rows, d_model]."""
        wanted = self.rows(split) if limit_rows is None else min(limit_rows, self.rows(split))
        groups = self.row_groups(split)
        out = np.empty((wanted, self.d_model), raw_dtype(self.manifest.dtype))
        done = 0
        for group in groups:
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

    def _require_shards(self) -> None:
        if self._present:
            return
        listed = files.sizes(self.url)  # one request for many of them
        for shard in self.manifest.shards:
            check_size(files.join(self.url, shard.name), shard, listed.get(shard.name))
        self._present = True

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
            check_size(where, shard)
        with pa.memory_map(local) if local else files.open_input(where, known_size=shard.bytes) as source:
            try:
                parquet = pq.ParquetFile(source, metadata=self._footers.get(number))
            except (pa.ArrowException, OSError) as error:
                raise SaescaleError(
                    f"{where}: not a readable Parquet file ({one_line(error)}); restore the shard or harvest again"
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
        # Counted before anything is built of so many.
        size, rows = self.manifest.row_group_rows, self.manifest.shards[number].rows
        if footer.num_row_groups != -(-rows // size):
            raise SaescaleError(
                f"{where}: {footer.num_row_groups} row groups, not {-(-rows // size)} as its manifest says; {remedy}"
            )
        for group in self._groups_of(number):
            if (found := footer.row_group(group.index).num_rows) != group.rows:
                what = f"row group {group.index} has {found} rows, not {group.rows}"
                raise SaescaleError(f"{where}: {what} as its manifest says; {remedy}")

    def _check_sum(self, shard: Shard) -> None:
        where = files.join(self.url, shard.name)
        checksum = xxhash.xxh3_64()
        with files.open_input(where, known_size=shard.bytes) as file:
            while chunk := file.read(CHUNK_BYTES):
                checksum.update(chunk)
        if checksum.hexdigest() != shard.xxh3:
            raise SaescaleError(
                f"{where}: checksum is {checksum.hexdigest()}, the manifest says {shard.xxh3}; "
                "the file was changed or damaged: restore the shard or harvest again"
            )

    def _damaged(self, group: RowGroup, what: str) -> SaescaleError:
        where = files.join(self.url, self.manifest.shards[group.shard].name)
        return SaescaleError(f"{where}: row group {group.index} {what}; restore the shard or harvest again")


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
