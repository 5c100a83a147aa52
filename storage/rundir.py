"""The run directory: what a sweep was asked, what each cell reached, tables, fits. Writes are atomic."""

import io
import json
import math
import re
import uuid
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
import yaml

from saescale.storage import checkpoint, files
from saescale.storage.columns import CURVES, EVALS, RESULTS, conform
from saescale.storage.errors import SaescaleError, Superseded
from saescale.storage.lease import require_owner
from saescale.storage.secrets import hide_secrets
from saescale.storage.yaml_text import parse_yaml, yaml_text

WEIGHTS, CURVE = "sae.safetensors", "curve.parquet"
_OF_TURN = re.compile(r"(?:sae|curve)-turn-(\d+)\.\w+")


def of_turn(name: str, turn: int) -> str:
    """What a file of a cell is called until the turn that writes it has ended with the cell's result."""
    stem, dot, kind = name.partition(".")
    return f"{stem}-turn-{turn:05d}{dot}{kind}" if turn else name


class RunDirectory:
    """The files below `url` (RUN.md). Readers return None (tables: no rows) for what is not there yet.

    A file that is there but unreadable is a SaescaleError. Tables have exactly the columns of columns.py: absent keys
    become null, other keys of a cell's result stay in its result.json. NaN and Inf, which JSON does not have, become
    null there.

    `owner`: the driver (lease.py) on whose behalf this one writes. Once another driver has taken the run over, every
    writer raises Superseded and nothing is written. None: whoever drives it. A process that was halted just then writes
    one file more: of a cell at which it took a turn (`take_cell`) that file is nobody's.
    """

    def __init__(self, url: str, owner: str | None = None) -> None:
        self.url, self.owner = url, owner
        self._turns: dict[str, int] = {}  # that this one took, by cell

    def cell_url(self, cell_id: str) -> str:
        """The folder of one cell."""
        return files.join(self.url, "cells", cell_id)

    def checkpoint_url(self, cell_id: str) -> str:
        """The folder of one cell's checkpoints, there while it trains."""
        return files.join(self.cell_url(cell_id), "checkpoint")

    def require_owner(self) -> None:
        """Raises Superseded where another driver than the owner has the run. Before files that others write here."""
        require_owner(self.url, self.owner)

    def result_url(self, cell_id: str) -> str:
        """The file that makes a cell a finished one."""
        return files.join(self.cell_url(cell_id), "result.json")

    # --- the spec

    def write_spec(self, spec: dict[str, Any]) -> None:
        """Writes the resolved spec, sweep.yaml. Raises SaescaleError, as every writer, where it cannot be written."""
        self._write("sweep.yaml", yaml_text(spec).encode())

    def read_spec(self) -> dict[str, Any] | None:
        """The resolved spec, or None when no sweep was started here."""
        where = files.join(self.url, "sweep.yaml")
        content = _read_if_there(where)
        if content is None:
            return None
        try:
            spec = parse_yaml(content)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _damaged(where, error) from error
        if not isinstance(spec, dict):
            raise SaescaleError(f"{where} holds no mapping; restore it or give another run directory")
        return spec

    # --- cells

    def take_cell(self, cell_id: str) -> dict[str, Any] | None:
        """Takes the cell over: from now on nobody else's files of it count. Its result instead, where it has one."""
        self.require_owner()
        if (result := self.read_cell_result(cell_id)) is not None:
            return result
        turn, ended = checkpoint.take(self.checkpoint_url(cell_id))
        if ended is not None:  # by a worker that died just then
            self._publish(cell_id, ended)
            return ended
        self._turns[cell_id] = turn
        # It may have been given one just then, and the turns before this one been removed.
        return self.read_cell_result(cell_id)

    def weights_url(self, cell_id: str) -> str:
        """Where the weights of a cell are put before `write_cell_result`, which makes them `sae.safetensors`."""
        return files.join(self.cell_url(cell_id), self._own(cell_id, WEIGHTS))

    def write_cell_result(self, cell_id: str, result: dict[str, Any], keep: bool = False) -> None:
        """Marks the cell as finished, with what it reached, and removes its checkpoints; `keep`: those of a cell that
        failed stay, for another try.

        With it the curve and the weights of this turn become the cell's. Raises Superseded, and changes nothing, where
        another one has taken the cell since `take_cell`.
        """
        self.require_owner()
        turn = self._turns.get(cell_id, 0)
        if turn:
            sums = {name: self._checksum(cell_id, self._own(cell_id, name)) for name in (WEIGHTS, CURVE)}
            written = {"turn": turn, "by": uuid.uuid4().hex, "xxh3": {name: sum for name, sum in sums.items() if sum}}
            result = _plain(result | written)
            checkpoint.end(self.checkpoint_url(cell_id), turn, result, keep)
        self._publish(cell_id, result)

    def _publish(self, cell_id: str, result: dict[str, Any]) -> None:
        """Gives what a turn ended with the names that readers know, the result last; doing it again changes nothing."""
        turn, there = result.get("turn", 0), self.read_cell_result(cell_id)
        another = there is not None and there.get("by") != result.get("by")
        if there is not None and another and (there.get("status") != "failed" or there.get("turn", 0) > turn):
            # The numbers of its turns were removed when it had its result, so that this one could end.
            self._tidy(cell_id, there)
            raise Superseded(f"{self.cell_url(cell_id)} has the result of another worker; this one stops")
        if turn:
            for name in (WEIGHTS, CURVE):
                files.move(*(files.join(self.cell_url(cell_id), each) for each in (of_turn(name, turn), name)))
        self.write_json(f"cells/{cell_id}/result.json", result)
        self._tidy(cell_id, result)

    def tidy_cell(self, cell_id: str, result: Mapping[str, Any]) -> None:
        """Removes what a cell with this result needs no more: its checkpoints, and what its turns left."""
        self.require_owner()
        self._tidy(cell_id, result)

    def _tidy(self, cell_id: str, result: Mapping[str, Any]) -> None:
        for name in files.list_names(self.cell_url(cell_id)):
            if (match := _OF_TURN.fullmatch(name)) and int(match[1]) <= result.get("turn", 0):
                files.remove(files.join(self.cell_url(cell_id), name))
        checkpoint.clear(self.checkpoint_url(cell_id), failed=result.get("status") == "failed")

    def check_cell(self, cell_id: str) -> None:
        """Raises SaescaleError where the weights or the curve of a finished cell are not those of its result."""
        for name, sum in ((self.read_cell_result(cell_id) or {}).get("xxh3") or {}).items():
            if self._checksum(cell_id, name) != sum:
                raise SaescaleError(
                    f"{files.join(self.cell_url(cell_id), name)} is not what the cell's result.json was written with; "
                    f"remove {self.cell_url(cell_id)} and run the same command again"
                )

    def _checksum(self, cell_id: str, name: str) -> str | None:
        checksum, where = xxhash.xxh3_64(), files.join(self.cell_url(cell_id), name)
        try:
            with files.reading(where), files.open_input(where) as file:
                while chunk := file.read(2**26):
                    checksum.update(chunk)
        except FileNotFoundError:
            return None
        return checksum.hexdigest()

    def _own(self, cell_id: str, name: str) -> str:
        return of_turn(name, self._turns.get(cell_id, 0))

    def read_cell_result(self, cell_id: str) -> dict[str, Any] | None:
        """What the cell reached, or None while it is unfinished."""
        return self.read_json(f"cells/{cell_id}/result.json")

    def write_cell_curve(self, cell_id: str, rows: list[dict[str, Any]]) -> None:
        """Writes the whole curve of a cell, one row per evaluation; `cell_id` is filled in."""
        table = pa.Table.from_pylist([row | {"cell_id": cell_id} for row in rows], CURVES)
        self._write_table(f"cells/{cell_id}/{self._own(cell_id, CURVE)}", table)

    def read_cell_curve(self, cell_id: str) -> list[dict[str, Any]]:
        """The curve of a cell that has its result; [] when it has none."""
        return self._read_table(f"cells/{cell_id}/{CURVE}", CURVES).to_pylist()

    def save_checkpoint(
        self, cell_id: str, step: int, tensors: Mapping[str, np.ndarray], state: dict[str, Any], keep: int | None = None
    ) -> None:
        """Adds a checkpoint to the cell's, as checkpoint.save does: `state` is JSON, `keep` the step to go back to."""
        self.require_owner()
        checkpoint.save(self.checkpoint_url(cell_id), step, tensors, state, keep, self._turns.get(cell_id, 0))

    def cell_files(self) -> dict[str, set[str]]:
        """The files of each cell that has any, relative to its folder: `result.json`, `checkpoint/latest.json` ..."""
        found: dict[str, set[str]] = defaultdict(set)
        for path in files.list_below(files.join(self.url, "cells")):
            cell_id, _, name = path.partition("/")
            found[cell_id].add(name)
        return dict(found)

    def cells_with_results(self) -> set[str]:
        """The ids of the finished cells."""
        return {cell_id for cell_id, names in self.cell_files().items() if "result.json" in names}

    # --- tables and documents of the whole run

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        """Writes results.parquet, one row per cell."""
        self._write_table("results.parquet", pa.Table.from_pylist(rows, RESULTS))

    def read_results(self) -> pa.Table:
        """results.parquet; no rows when it is missing."""
        return self._read_table("results.parquet", RESULTS)

    def write_curves(self, table: pa.Table) -> None:
        """Writes curves.parquet; `table` has the columns of CURVES in any order."""
        self._write_table("curves.parquet", conform(table, CURVES))

    def read_curves(self) -> pa.Table:
        """curves.parquet; no rows when it is missing."""
        return self._read_table("curves.parquet", CURVES)

    def write_evals(self, cell_id: str, evaluation: str, rows: list[dict[str, Any]]) -> None:
        """Puts the rows of one evaluation of one cell into evals.parquet, in place of those that it had there."""
        there = self.read_evals()
        own = pc.and_(pc.equal(there["cell_id"], cell_id), pc.equal(there["evaluation"], evaluation))
        new = pa.Table.from_pylist([row | {"cell_id": cell_id, "evaluation": evaluation} for row in rows], EVALS)
        self._write_table("evals.parquet", pa.concat_tables([there.filter(pc.invert(own)), new]))

    def read_evals(self) -> pa.Table:
        """evals.parquet; no rows when it is missing."""
        return self._read_table("evals.parquet", EVALS)

    def write_json(self, name: str, obj: Any) -> None:
        """Writes `obj` (JSON types, numpy scalars, arrays, tuples) to the file `name` of the run."""
        text = json.dumps(_plain(obj), indent=1, allow_nan=False) + "\n"
        self._write(name, text.encode())

    def read_json(self, name: str) -> Any:
        """The content of the JSON file `name`, or None when it is missing."""
        where = files.join(self.url, name)
        content = _read_if_there(where)
        try:
            return None if content is None else json.loads(content)
        except ValueError as error:
            raise _damaged(where, error) from error

    def _write_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._write(name, buffer.getvalue())

    def _write(self, name: str, content: bytes) -> None:
        self.require_owner()
        files.write_atomic(files.join(self.url, name), content)

    def _read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        where = files.join(self.url, name)
        content = _read_if_there(where)
        if content is None:
            return schema.empty_table()
        try:
            # In this thread alone: one of Arrow's own that still works when the interpreter ends aborts the process
            # (arrow issue 34314), and `read_table` starts some whatever it is told.
            table = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False)
            return conform(table, schema)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(where, error) from error


def _read_if_there(where: str) -> bytes | None:
    try:
        return files.read_bytes(where)
    except FileNotFoundError:
        return None


def _damaged(where: str, error: Exception) -> SaescaleError:
    reason = " ".join(str(error).split())
    return SaescaleError(f"{where} is damaged ({reason}); remove it and run the same command again")


def _plain(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, np.ndarray | np.generic):
        return _plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return hide_secrets(obj) if isinstance(obj, str) else obj
