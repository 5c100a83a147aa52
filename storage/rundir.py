"""The run directory: what a sweep was asked, what each cell reached, tables, fits. Writes are atomic."""

import json
import re
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from saescale.storage import checkpoint, files, versions
from saescale.storage.columns import CURVES, EVALS, RESULTS, conform, current_names
from saescale.storage.documents import (
    damaged,
    json_bytes,
    parse_yaml,
    plain,
    read_json,
    read_table,
    table_bytes,
    yaml_text,
)
from saescale.storage.errors import Damaged, SaescaleWarning, Superseded
from saescale.storage.lease import require_owner
from saescale.storage.sharded import index_name

T = TypeVar("T")
Rows = list[dict[str, Any]]
WEIGHTS, CURVE = "sae.safetensors", "curve.parquet"
SPEC = "sweep.yaml"
_SPEC_REMEDY = "remove it (or move it, if it is your own file) and run the same sweep again, which keeps what is done"
_NO_SWEEP = "it holds no whole sweep of a run: it was cut short, or is another program's"
_BEGIN, _END = b"---\n", b"...\n"  # YAML's own marks: a file that has the first is whole if it has the second
FITS_FORMAT = 1
METRICS = b"saescale.metrics"  # a key of the metadata of evals.parquet's schema: what evaluations declare of theirs
_ASKED_AT_A_TIME = 16  # an answer of an object store takes a while
_WEIGHTS = re.compile(r"sae(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
# Of earlier versions `-shard-I-of-P` besides.
_OF_TURN = re.compile(r"(?:sae|curve)(?:-\d+-of-\d+)?-turn-(\d+)(?:-shard-\d+-of-\d+)?\.[\w.]+")


def has_weights(names: Set[str]) -> bool:
    """Whether an SAE is among the files of a cell: one file, or the index of several."""
    return not names.isdisjoint((WEIGHTS, index_name(WEIGHTS)))


def of_turn(name: str, turn: int) -> str:
    """What a file of a cell is called until the turn that writes it has ended with the cell's result."""
    stem, dot, kind = name.partition(".")
    return f"{stem}-turn-{turn:05d}{dot}{kind}" if turn else name


class RunDirectory:
    """The files below `url` (RUN.md). Readers change nothing, and return None (tables: no rows) for what is not there.

    A file that is there but unreadable is `Damaged`, which says what to do; results.parquet and curves.parquet are
    views of cells/, from which they are read, with a warning, where they are missing or damaged. Tables have exactly
    the columns of columns.py: absent keys become null, other keys of a cell's result stay in its result.json. NaN and
    Inf, which JSON does not have, become null there.

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
        self._write(SPEC, _BEGIN + yaml_text(spec).encode() + _END)

    def read_spec(self) -> dict[str, Any] | None:
        """The resolved spec, or None when no sweep was started here. Damaged where it is not whole."""
        content = self.read_spec_bytes()
        if content is None:
            return None
        spec = parse_yaml(content, files.join(self.url, SPEC), _SPEC_REMEDY)
        sections = [spec.get(name, {}) for name in ("grid", "resolved")] if isinstance(spec, dict) else [None]
        if not all(isinstance(section, dict) for section in sections) or not isinstance(spec.get("name"), str):
            raise self.damaged_spec(_NO_SWEEP)
        return dict(spec)

    def read_spec_bytes(self) -> bytes | None:
        """The same as it is written, for who needs a line of it; that it was not cut short is seen to."""
        content = _if_there(lambda: files.read_bytes(files.join(self.url, SPEC)))
        if content is not None and not _is_whole_spec(content):
            raise self.damaged_spec(_NO_SWEEP if content.strip() else "it is empty")
        return content

    def damaged_spec(self, reason: str) -> Damaged:
        """The error of a sweep.yaml that does not say what it should."""
        return damaged(files.join(self.url, SPEC), reason, _SPEC_REMEDY)

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

    def name_now(self, cell_id: str, name: str) -> str:
        """What a file of a cell is called before `write_cell_result`, which gives it its `name`."""
        return of_turn(name, self._turns.get(cell_id, 0))

    def write_cell_result(
        self, cell_id: str, result: dict[str, Any], keep: bool = False, weights: Mapping[str, str] | None = None
    ) -> None:
        """Marks the cell as finished, with what it reached, and removes its checkpoints; `keep`: those of a cell that
        failed stay, for another try. `weights`: the XXH3-64 of the files that have them, where it is not one alone.

        With it the curve and the weights of this turn become the cell's. Raises Superseded, and changes nothing, where
        another one has taken the cell since `take_cell`.
        """
        self.require_owner()
        turn = self._turns.get(cell_id, 0)
        if turn:
            read = (CURVE,) if weights else (WEIGHTS, CURVE)
            found = {name: self._checksum(cell_id, self.name_now(cell_id, name)) for name in read}
            sums = {name: sum for name, sum in found.items() if sum} | dict(weights or {})
            written = {"turn": turn, "by": uuid.uuid4().hex, "xxh3": sums}
            result = plain(result | written)
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
            # The index of several files last: readers go by it.
            for name in dict.fromkeys((*result.get("xxh3", {}), WEIGHTS, CURVE)):
                files.move(*(files.join(self.cell_url(cell_id), each) for each in (of_turn(name, turn), name)))
        self.write_json(f"cells/{cell_id}/result.json", result)
        self._tidy(cell_id, result)

    def tidy_cell(self, cell_id: str, result: Mapping[str, Any]) -> None:
        """Removes what a cell with this result needs no more: its checkpoints, and what its turns left."""
        self.require_owner()
        self._tidy(cell_id, result)

    def _tidy(self, cell_id: str, result: Mapping[str, Any]) -> None:
        for name in files.list_names(self.cell_url(cell_id)):
            match = _OF_TURN.fullmatch(name)
            # Of a cell that was trained once more, and by another number of processes.
            others = _WEIGHTS.fullmatch(name) and result.get("status") == "done" and result.get("xxh3")
            if (match and int(match[1]) <= result.get("turn", 0)) or (others and name not in result["xxh3"]):
                files.remove(files.join(self.cell_url(cell_id), name))
        checkpoint.clear(self.checkpoint_url(cell_id), failed=result.get("status") == "failed")

    def check_cell(self, cell_id: str) -> None:
        """Raises SaescaleError where the weights or the curve of a finished cell are not those of its result."""
        url = self.cell_url(cell_id)
        remedies = {CURVE: "remove it: the cell keeps its result and has no curve then"}
        for name, sum in ((self.read_cell_result(cell_id) or {}).get("xxh3") or {}).items():
            found = self._checksum(cell_id, name)
            if found != sum and (found is not None or name != CURVE):
                remedy = remedies.get(name, f"remove {url} and run the same sweep again, which trains the cell anew")
                raise damaged(files.join(url, name), "the cell's result.json was written with another", remedy)

    def _checksum(self, cell_id: str, name: str) -> str | None:
        checksum, where = xxhash.xxh3_64(), files.join(self.cell_url(cell_id), name)
        try:
            with files.reading(where), files.open_input(where) as file:
                while chunk := file.read(2**26):
                    checksum.update(chunk)
        except FileNotFoundError:
            return None
        return checksum.hexdigest()

    def read_cell_result(self, cell_id: str) -> dict[str, Any] | None:
        """What the cell reached, or None while it is unfinished."""
        where = self.result_url(cell_id)
        remedy = "run the same sweep again, which makes it again from what else the run holds"
        found = _if_there(lambda: read_json(where, remedy))
        if found is None:
            return None
        result = dict(zip(current_names(found), found.values(), strict=True))
        try:
            pa.Table.from_pylist([result], RESULTS)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise damaged(where, " ".join(str(error).split()), remedy) from error
        if (named := result.get("cell_id", cell_id)) != cell_id:
            raise damaged(where, f"it is the result of the cell {named}", remedy)
        return result

    def write_cell_curve(self, cell_id: str, rows: list[dict[str, Any]]) -> None:
        """Writes the whole curve of a cell, one row per evaluation; `cell_id` is filled in."""
        table = pa.Table.from_pylist([row | {"cell_id": cell_id} for row in rows], CURVES)
        self._write_table(f"cells/{cell_id}/{self.name_now(cell_id, CURVE)}", table)

    def read_cell_curve(self, cell_id: str) -> list[dict[str, Any]]:
        """The curve of a cell that has its result; [] when it has none."""
        where = files.join(self.cell_url(cell_id), CURVE)
        remedy = "remove it and run the same command again: the cell keeps its result and has no curve then"
        table = _if_there(lambda: read_table(where, CURVES, remedy))
        rows: Rows = [] if table is None else table.to_pylist()
        if others := sorted({str(row["cell_id"]) for row in rows} - {cell_id}):
            raise damaged(where, f"it is the curve of the cell {others[0]}", remedy)
        return rows

    def save_checkpoint(
        self, cell_id: str, step: int, tensors: Mapping[str, np.ndarray], state: dict[str, Any], keep: int | None = None
    ) -> None:
        """Adds a checkpoint to the cell's, as checkpoint.save does: `state` is JSON, `keep` the step to go back to."""
        self.require_owner()
        checkpoint.save(self.checkpoint_url(cell_id), step, tensors, state, keep, self._turns.get(cell_id, 0))

    def write_checkpoint_part(
        self, cell_id: str, step: int, tensors: Mapping[str, np.ndarray], shard: int, shards: int
    ) -> checkpoint.Part:
        """Writes what one process has of a cell that several share; `commit_checkpoint` makes it count."""
        self.require_owner()
        return checkpoint.write_part(
            self.checkpoint_url(cell_id), step, tensors, self._turns.get(cell_id, 0), shard, shards
        )

    def commit_checkpoint(
        self, cell_id: str, step: int, parts: Sequence[checkpoint.Part], state: dict[str, Any], keep: int | None = None
    ) -> None:
        """Makes the parts of all processes the cell's newest checkpoint, as save_checkpoint does."""
        self.require_owner()
        checkpoint.commit(self.checkpoint_url(cell_id), step, parts, state, keep, self._turns.get(cell_id, 0))

    def turn(self, cell_id: str) -> int:
        """That this one took at the cell; 0 for none."""
        return self._turns.get(cell_id, 0)

    def share_turn(self, cell_id: str, turn: int) -> None:
        """Makes another process' turn this one's too: they share the cell, and one of them took it."""
        self._turns[cell_id] = turn

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

    def cells_with_weights(self) -> list[str]:
        """The ids of the cells that are finished and have an SAE, in the order of the alphabet."""
        return sorted(
            cell for cell, names in self.cell_files().items() if "result.json" in names and has_weights(names)
        )

    # --- tables and documents of the whole run

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        """Writes results.parquet, one row per cell."""
        self._write_table("results.parquet", pa.Table.from_pylist(rows, RESULTS))

    def read_results(self, others: Callable[[Rows], Rows] | None = None) -> pa.Table:
        """results.parquet, or what cells/ has of it; no rows when there is neither.

        `others`: rows besides those from cells/, which does not know of cells without a result.
        """
        of_cells = self._results_of_cells
        return self._view("results.parquet", RESULTS, of_cells if others is None else lambda: _both(of_cells(), others))

    def write_curves(self, table: pa.Table) -> None:
        """Writes curves.parquet; `table` has the columns of CURVES in any order."""
        self._write_table("curves.parquet", conform(table, CURVES))

    def read_curves(self) -> pa.Table:
        """curves.parquet, or what cells/ has of it; no rows when there is neither."""
        return self._view("curves.parquet", CURVES, self._curves_of_cells)

    def has_tables(self) -> bool:
        """Whether results.parquet and curves.parquet are there and sound."""
        tables = (("results.parquet", RESULTS), ("curves.parquet", CURVES))
        try:
            return all(self._table(name, schema) is not None for name, schema in tables)
        except Damaged:
            return False

    def is_begun(self) -> bool:
        """Whether there is something of a run here that results can be read from."""
        return files.exists(files.join(self.url, "results.parquet")) or bool(self.cells_with_results())

    def write_evals(
        self, cell_id: str, evaluation: str, rows: list[dict[str, Any]], metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Puts the rows of one evaluation of one cell into evals.parquet, in place of those that it had there. Where
        several processes do so at one time, nobody's are lost.

        `metrics`: what the evaluation declares of its metrics, by `evaluation.metric`, in place of what it declared.
        """
        self.require_owner()
        new = pa.Table.from_pylist([row | {"cell_id": cell_id, "evaluation": evaluation} for row in rows], EVALS)

        def changed(there: pa.Table) -> pa.Table:
            own = pc.and_(pc.equal(there["cell_id"], cell_id), pc.equal(there["evaluation"], evaluation))
            known = json.loads((there.schema.metadata or {}).get(METRICS, b"{}"))
            known = {name: of for name, of in known.items() if name.partition(".")[0] != evaluation}
            known |= metrics or {}
            known = {name: known[name] for name in sorted(known, key=lambda name: name.partition(".")[0])}
            table = pa.concat_tables([there.filter(pc.invert(own)).replace_schema_metadata(), new])
            return table.replace_schema_metadata({METRICS: json.dumps(known).encode()}) if known else table

        versions.change(*self._evals, changed)

    def read_evals(self) -> pa.Table:
        """evals.parquet, with what evaluations declare of their metrics in its schema's metadata; no rows when it is
        missing."""
        table = versions.read(*self._evals)
        return EVALS.empty_table() if table is None else table

    @property
    def _evals(self) -> tuple[str, pa.Schema, str]:
        """What versions.py asks of a table."""
        remedy = f"remove it and run saescale eval {self.url}, which measures again"
        return files.join(self.url, "evals.parquet"), EVALS, remedy

    def read_fits(self) -> dict[str, Any] | None:
        """The document of fits.json, or None when it is missing."""
        remedy = f"run saescale report {self.url}, which makes it again"
        found = self.read_json("fits.json", FITS_FORMAT, remedy)
        laws = [] if found is None else found.get("fits")
        if not isinstance(laws, list) or not all(isinstance(fit, dict) and "law" in fit for fit in laws):
            raise damaged(files.join(self.url, "fits.json"), "it holds no list of laws as `fits`", remedy)
        return found

    def write_architecture(self, name: str, text: str) -> None:
        """Keeps the Python file of an architecture of the user's own, to be looked at: nothing here runs it."""
        self._write(files.join("architectures", f"{name}.py"), text.encode())

    def write_json(self, name: str, obj: dict[str, Any]) -> None:
        """Writes `obj` (JSON types, numpy scalars, arrays, tuples) to the file `name` of the run, with a checksum."""
        self._write(name, json_bytes(obj))

    def read_json(self, name: str, newest: int | None = None, remedy: str = "") -> dict[str, Any] | None:
        """The object in the JSON file `name`, or None when it is missing. `newest`: the highest format that is read."""
        where = files.join(self.url, name)
        return _if_there(lambda: read_json(where, remedy or "remove it and run the same command again", newest))

    def _write_table(self, name: str, table: pa.Table) -> None:
        self._write(name, table_bytes(table))

    def _write(self, name: str, content: bytes) -> None:
        self.require_owner()
        files.write_atomic(files.join(self.url, name), content)

    def _table(self, name: str, schema: pa.Schema, remedy: str = "") -> pa.Table | None:
        return _if_there(lambda: read_table(files.join(self.url, name), schema, remedy))

    def _view(self, name: str, schema: pa.Schema, of_cells: Callable[[], Rows]) -> pa.Table:
        where = files.join(self.url, name)
        from_cells, again = "its rows are read from cells/; ", "run the same sweep again, which writes it anew"
        try:
            table = _if_there(lambda: read_table(where, schema, from_cells + again))
            if table is not None:
                return table
            said = f"{where} is missing; {from_cells}{again}"
        except Damaged as error:
            rows, said = of_cells(), str(error)
            if not rows:
                raise Damaged(said.replace(from_cells, "restore it, or "), where) from error
        else:
            rows = of_cells()
        if rows:
            warnings.warn(said, SaescaleWarning, stacklevel=3)
        return pa.Table.from_pylist(rows, schema)

    def _results_of_cells(self) -> Rows:
        return _in_order([row for row in self._of_finished(self.read_cell_result) if row is not None])

    def _curves_of_cells(self) -> Rows:
        return [row for rows in self._of_finished(self.read_cell_curve) for row in rows or ()]

    def _of_finished(self, read: Callable[[str], T]) -> Sequence[T | None]:
        """What each finished cell has of something, in the order of their ids; None, with a warning, where damaged."""

        def tried(cell_id: str) -> T | None:
            try:
                return read(cell_id)
            except Damaged as error:
                warnings.warn(str(error), SaescaleWarning, stacklevel=2)
                return None

        with ThreadPoolExecutor(_ASKED_AT_A_TIME) as pool:
            return list(pool.map(tried, sorted(self.cells_with_results())))


def _is_whole_spec(content: bytes) -> bool:
    """`resolved` stands last, and in no sweep file of a user's; files of earlier versions bear no marks."""
    marked = content.startswith(_BEGIN.strip())
    return bool(re.search(rb"^resolved:", content, re.M)) and (not marked or content.rstrip().endswith(_END.strip()))


def _both(rows: Rows, others: Callable[[Rows], Rows]) -> Rows:
    return _in_order(rows + others(rows)) if rows else rows


def _in_order(rows: Rows) -> Rows:
    """As the driver lists them."""
    names = ("n_latents", "k", "architecture", "seed", "cell_id")
    return sorted(rows, key=lambda row: [(row.get(name) is None, row.get(name)) for name in names])


def _if_there(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except FileNotFoundError:
        return None
