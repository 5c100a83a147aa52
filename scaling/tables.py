"""Tables of finished cells and their curves, checked before a law sees them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import xxhash

from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, columns_of, current_names
from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists, join, open_input
from saescale.storage.rundir import RunDirectory
from saescale.storage.secrets import hide_secrets

_NUMERIC = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
_POSITIVE = tuple(column.name for column in COLUMNS.values() if column.positive)
# What fits, warnings and reports calculate with, where a table has it.
_NUMBERS = tuple(column.name for column in columns_of("results") if column.is_number)
_TIMES = tuple(column.name for column in COLUMNS.values() if column.role == "time")
_COMPARABLE = tuple(column.name for column in COLUMNS.values() if column.one_kind)
_ALIKE = tuple(column.name for column in COLUMNS.values() if column.alike)
# What tells two cells apart, whatever their ids are.
IDENTITY = tuple(c.name for c in columns_of("results") if c.role == "spec" and c.name not in ("cell_id", "subject"))
# Of these a table may say nothing of some cells.
TOLD_APART = tuple(name for name in (*_COMPARABLE, *_ALIKE) if name not in ("subject", "d_model"))
_SHOWN = 5  # values of a column in a note


@dataclass(frozen=True)
class Table:
    """Named columns of equal length: numbers as float64 [rows] (missing is NaN), everything else as str.

    `excluded` says in words which rows were left out and why, `notes` what else a reader of fits must know of them.
    """

    columns: dict[str, np.ndarray]
    source: str
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]], source: str = "rows") -> Self:
        """A table of dictionaries with the columns as keys; `source` is what errors call it."""
        return cls.from_arrow(pa.Table.from_pylist(list(rows)), source)

    @classmethod
    def from_arrow(cls, table: pa.Table, source: str) -> Self:
        """Integers, floats and booleans become float64; every other type becomes text (missing is ""). Columns that
        earlier versions called otherwise have today's names."""
        columns = {}
        for name, column in zip(current_names(table.column_names), table.columns, strict=True):
            kind = column.type
            # A CSV column without any value has the type null.
            if any(is_kind(kind) for is_kind in _NUMERIC):
                columns[name] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
            else:
                columns[name] = np.array(["" if v is None else str(v) for v in column.to_pylist()], dtype=str)
        return cls(columns, source)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", hide_secrets(self.source))  # it goes into fits, pages and plans

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def select(self, mask: np.ndarray, excluded: Sequence[str] = ()) -> Self:
        """The rows where `mask` (bool [rows]) holds; `excluded` is added to what is already excluded."""
        columns = {name: values[mask] for name, values in self.columns.items()}
        return replace(self, columns=columns, excluded=(*self.excluded, *excluded))

    def rows_of(self, column: str) -> dict[Any, np.ndarray]:
        """The rows [their indices, in order] of each value of a column, found in one pass over the table."""
        values = self.columns[column]
        order = np.argsort(values, kind="stable")
        found, first = np.unique(values[order], return_index=True)
        return dict(zip(found.tolist(), np.split(order, first[1:]), strict=True)) if len(values) else {}

    def with_values(self) -> Self:
        """Without columns that hold no value, since results.parquet has all columns always. nmse stays."""
        kept = {n: v for n, v in self.columns.items() if n == "nmse" or v.dtype.kind != "f" or not np.isnan(v).all()}
        return replace(self, columns=kept)

    def require(self, names: Sequence[str]) -> None:
        """Raises SaescaleError unless the columns exist and hold finite numbers, positive where a law takes
        their logarithm."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise SaescaleError(
                f"{self.source}: no column {', '.join(missing)}; it has {', '.join(self.columns) or 'none'}. "
                "Add what is missing (the names are those of results.parquet)"
            )
        for name in names:
            values = self.columns[name]
            self.require_numbers(name)
            bad = ~np.isfinite(values)
            if name in _POSITIVE:
                bad |= ~(values > 0)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                wanted = "positive and finite" if name in _POSITIVE else "finite"
                raise SaescaleError(
                    f"{self.source}: {name} is {values[row]:g} in row {row + 1} ({self.describe(row)}), and it "
                    f"must be {wanted}; correct or remove the row"
                )

    def require_numbers(self, name: str) -> None:
        """Raises SaescaleError where a column holds text."""
        values = self.columns[name]
        if values.dtype.kind != "f":
            example = next((f" (such as {text!r})" for text in values.tolist() if not _is_number(text)), "")
            raise SaescaleError(f"{self.source}: column {name} holds text, not numbers{example}; clean the column")

    def describe(self, row: int) -> str:
        """A row in words, such as "cell 3f2a91, N = 512, k = 8"."""
        parts = [f"cell {self.columns['cell_id'][row]}"] if "cell_id" in self.columns else []
        for name, label in (("n_latents", "N"), ("k", "k")):
            if name in self.columns and self.columns[name].dtype.kind == "f":
                parts.append(f"{label} = {number(self.columns[name][row])}")
        return ", ".join(parts) or f"row {row + 1}"


def load_results(source: str | RunDirectory) -> Table:
    """The finished cells of a run directory or of a CSV or Parquet table with columns of results.parquet.

    Only nmse must be there; each law says what else it needs. Rows whose `status` is not "done" are excluded, with
    the reason. Raises SaescaleError when the source is missing or unreadable or has no finished cell, and for
    values of nmse, n_latents or k that no law could use.
    """
    table = finished(load_rows(source)).with_values()
    check_cells(table)
    return table


def load_rows(source: str | RunDirectory) -> Table:
    """All rows of a source of cells, finished or not, as they are. Raises SaescaleError where they cannot be read."""
    if isinstance(source, RunDirectory):
        table = Table.from_arrow(source.read_results(), join(source.url, "results.parquet"))
        return table if known(table["store"]).all() else _told_by(source.read_spec() or {}, table)
    if source.lower().endswith((".csv", ".parquet")):
        return _read_file(source)
    if RunDirectory(source).is_begun():
        return load_rows(RunDirectory(source))
    raise SaescaleError(f"{source}: neither a run directory with results.parquet nor a .csv or .parquet file")


def known(values: np.ndarray) -> np.ndarray:
    """Which values [rows] are there: bool [rows]."""
    return ~np.isnan(values) if values.dtype.kind == "f" else values != ""


def _told_by(spec: Mapping[str, Any], table: Table) -> Table:
    """With what a run's sweep.yaml says of its cells, since the tables of saescale 0.1.0 do not."""
    sections = (spec.get(name) for name in ("train", "eval", "resolved"))
    train, evaluation, resolved = (section if isinstance(section, dict) else {} for section in sections)
    told = {
        "store": resolved.get("store_fingerprint"),
        "heldout_rows": evaluation.get("tokens"),
        # What was asked for, since `resolved` said what `auto` would have been.
        "precision": resolved.get("precision") if train.get("precision") in (None, "auto") else train["precision"],
        "batch_tokens": train.get("batch_tokens"),
        "ema": train.get("ema"),
    }
    columns = dict(table.columns)
    for name, value in told.items():
        if isinstance(value, str if COLUMNS[name].type == pa.string() else int | float):
            columns[name] = np.where(known(columns[name]), columns[name], value)
    return replace(table, columns=columns)


def load_curves(source: str | RunDirectory) -> Table | None:
    """The held-out curves of a run directory; None for a plain table or a directory without curves."""
    if isinstance(source, str):
        if source.lower().endswith((".csv", ".parquet")):
            return None
        source = RunDirectory(source)
    url, curves = join(source.url, "curves.parquet"), source.read_curves()
    return Table.from_arrow(curves, url) if len(curves) or exists(url) else None


def finished(table: Table) -> Table:
    """Only the rows with status "done" (all rows where there is no such column). Raises SaescaleError when none is."""
    everything = table
    if "status" in table:
        done = table["status"] == "done"
        reasons = []
        for row in np.flatnonzero(~done):
            status = table["status"][row] or "without status"
            reasons.append(f"{table.describe(int(row))} is {status}" + _because(table, int(row)))
        table = table.select(done, reasons)
    if not len(table):
        raise SaescaleError(f"{table.source}: no finished cell; {_what_to_do(everything)}")
    return table


def check_cells(table: Table) -> None:
    """Raises SaescaleError for a missing nmse, for values of nmse, n_latents or k that are not positive numbers, and
    for text in any other column that is calculated with."""
    table.require(("nmse", *(name for name in ("n_latents", "k") if name in table)))
    for name in _NUMBERS:
        if name in table:
            table.require_numbers(name)


def fingerprint(results: Table, curves: Table | None) -> str:
    """xxh3-128 (hex) of all that fits come from: cells and curves, whatever the order of their rows, and which rows
    are excluded; not how long anything took."""
    content = xxhash.xxh3_128()
    for table in (results, curves):
        names = sorted(set(table.columns) - set(_TIMES)) if table is not None else []
        if table is None or not names:
            continue
        order = np.lexsort([table[name] for name in names])
        for name in names:
            values = table[name][order]
            content.update(f"{name}\n{len(values)}\n".encode())
            content.update(values.tobytes() if values.dtype.kind == "f" else "\0".join(values).encode())
        content.update("\n".join(sorted(table.excluded)).encode())
    return content.hexdigest()


def comparable(table: Table, over_subjects: bool = False) -> Table:
    """Rows of one kind: where subject, site, d_model, architecture, store or held-out rows differ, the most frequent
    combination stays, and of equally frequent ones the first. What is not known of a row is taken to be as in most.

    A law describes one subject and one kind of SAE, measured on the same rows; the others are excluded, with the
    reason, and a note says in what they differ. `over_subjects`: all subjects stay, and only architectures must agree.
    """
    names = [name for name in (("architecture",) if over_subjects else _COMPARABLE) if name in table]
    filled = {name: _filled(table[name]) for name in names}
    names = [name for name in names if len(np.unique(filled[name])) > 1]
    if not names:
        return table
    texts = [
        ", ".join(f"{name} {_shown(value)}" for name, value in zip(names, row, strict=True))
        for row in zip(*(filled[name].tolist() for name in names), strict=True)
    ]
    most = max(dict.fromkeys(texts), key=texts.count)
    mask = np.array([text == most for text in texts])
    reasons = [f"{table.describe(int(row))}: {texts[row]}; the laws describe {most}" for row in np.flatnonzero(~mask)]
    there = " and ".join(f"{name} {_counted(filled[name][~mask])}" for name in names)
    note = (
        f"{(~mask).sum()} of {len(mask)} cells are of another kind ({there}) than those that laws of one subject "
        f"describe ({most}): fit them apart"
    )
    return replace(table.select(mask, reasons), notes=(*table.notes, note))


def unlike(table: Table) -> list[str]:
    """In what else that moves nmse cells of one fit differ, and what is known of some of them alone; a line each."""
    notes = []
    told = {name: known(table[name]) for name in TOLD_APART if name in table}
    differing = [n for n in told if n in _ALIKE and len(np.unique(table[n][told[n]])) > 1]
    if differing:
        words = ", ".join(f"{name} {_counted(table[name][told[name]])}" for name in differing)
        notes.append(f"cells that are fitted together differ in {words}: the laws mix what that does to nmse")
    if silent := [name for name, there in told.items() if there.any() and not there.all()]:
        count = int((~np.all([told[name] for name in silent], axis=0)).sum())
        notes.append(f"{count} of {len(table)} cells do not say their {', '.join(silent)}: they may differ in it")
    return notes


def _filled(values: np.ndarray) -> np.ndarray:
    """With the most frequent value where there is none."""
    there = known(values)
    found, counts = np.unique(values[there], return_counts=True)
    return values if there.all() or not len(found) else np.where(there, values, found[np.argmax(counts)])


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _counted(values: np.ndarray) -> str:
    """The values of a column and how many cells have each."""
    found, counts = np.unique(values, return_counts=True)
    words = [f"{_shown(value)} in {count}" for value, count in zip(found.tolist(), counts, strict=True)]
    more = [f"... and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join([*words[:_SHOWN], *more])


def without_diverged(table: Table) -> Table:
    """Without cells whose nmse is above 1: they reconstruct worse than the mean does, so their training diverged.

    They are `excluded`, in one line. Where no cell is at or below 1 the column holds another loss, and all stay.
    """
    bad = table["nmse"] > 1
    if not bad.any() or bad.all():
        return table
    cases = [f"{table.describe(int(row))}: nmse {table['nmse'][row]:.3g}" for row in np.flatnonzero(bad)]
    one = len(cases) == 1
    reason = (
        f"{len(cases)} {'cell' if one else 'cells'} with nmse above 1, worse than the mean alone, diverged and "
        f"{'is' if one else 'are'} kept out of the fits ({listed(cases)})"
    )
    return table.select(~bad, [reason])


def _because(table: Table, row: int) -> str:
    """Why the cell in a row failed, after a colon; nothing where the table does not say it."""
    error = str(table["error"][row]) if "error" in table and table["error"].dtype.kind == "U" else ""
    return f": {error}" if error else ""


def _what_to_do(table: Table) -> str:
    """Advice about a table of which no row is done."""
    statuses = table["status"].tolist() if "status" in table else []
    failed = [row for row, status in enumerate(statuses) if status == "failed"]
    others = len(table) - len(failed)
    if not failed:
        return f"{others} are still to be trained: run the sweep first" if others else "the table is empty"
    first = f"{len(failed)} failed, the first ({table.describe(failed[0])})" + (
        _because(table, failed[0]) or " without saying why"
    )
    if others:
        return f"{first}; {others} are still to be trained: run the sweep to its end"
    return f"{first}; remove the cause and the failed cells' folders below cells/, then run the sweep again"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text  # missing
    return True


def number(value: float) -> str:
    """Counts in full, whatever is above a billion or not whole to three digits."""
    return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e9 else f"{value:.3g}"


def size_of(table: Table, row: int) -> str:
    """Such as "N = 512, k = 8"."""
    symbols = {"n_latents": "N", "k": "k"}
    named = [f"{symbol} = {number(table[column][row])}" for column, symbol in symbols.items() if column in table]
    return ", ".join(named) or f"row {row + 1}"


def _read_file(url: str) -> Table:
    if not exists(url):
        raise SaescaleError(f"{url}: no such file")
    try:
        with open_input(url) as file:
            if url.lower().endswith(".csv"):
                return Table.from_arrow(pyarrow.csv.read_csv(file, pyarrow.csv.ReadOptions(use_threads=False)), url)
            # In this thread alone, as the run directory's tables are read and for the same reason (rundir.py).
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            return Table.from_arrow(parquet.read(use_threads=False), url)
    except pa.ArrowInvalid as error:
        raise SaescaleError(f"{url}: not a readable table ({str(error).splitlines()[0]})") from error
