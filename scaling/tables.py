"""Tables of finished cells and their curves, checked before a law sees them."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash

from saescale.scaling.headers import missing_words, named_columns, other_name
from saescale.scaling.reading import is_table, read_file
from saescale.scaling.values import either, is_grouped, numbers, texts
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, columns_of
from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists, join
from saescale.storage.rundir import RunDirectory
from saescale.storage.secrets import hide_secrets

_POSITIVE = tuple(column.name for column in COLUMNS.values() if column.positive)
_TEXTS = frozenset(column.name for column in COLUMNS.values() if not column.is_number)
# What fits, warnings and reports calculate with, where a table has it; a seed is a name.
_NUMBERS = frozenset(column.name for column in columns_of("results") if column.is_number) - {"seed"}
_TIMES = tuple(column.name for column in COLUMNS.values() if column.role == "time")
_WHOLE = ("n_latents",)
KIND = "kind of cell"  # a column that no file can have: what tells kinds of cells apart, in words (kinds.py)
_LONGEST_SHOWN = 40  # characters of a value in a message
_DONE = frozenset(["done", "finished", "complete", "completed", "success", "succeeded", "successful", "ok", "true"])
_WAITING = frozenset(("", "pending", "waiting", "queued", "running", "training", "interrupted"))
_LOST = frozenset(("failed", "failure", "error", "crashed", "killed", "canceled", "cancelled", "aborted", "skipped"))


@dataclass(frozen=True)
class Table:
    """Named columns of equal length: numbers as float64 [rows] (missing is NaN), everything else as str.

    `excluded` says in words which rows were left out and why, `notes` what else a reader of fits must know of them.
    `places` [rows] says where each row stands in the source (None: in order; a number or words), `unread` [rows] of a
    column of numbers what stands there instead of one ("" elsewhere).
    """

    columns: dict[str, np.ndarray]
    source: str
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    places: np.ndarray | None = None
    unread: Mapping[str, np.ndarray] = field(default_factory=dict)
    _rows_of: dict[str, dict[Any, np.ndarray]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]], source: str = "rows") -> Self:
        """A table of dictionaries with the columns as keys; `source` is what errors call it."""
        return cls.from_arrow(pa.Table.from_pylist(list(rows)), source)

    @classmethod
    def from_arrow(cls, table: pa.Table, source: str, decimal_comma: bool = False) -> Self:
        """Columns that are calculated with become float64, names text (missing is ""), and others float64 where all
        their values are numbers that it holds exactly. Columns that earlier versions called otherwise have today's
        names. Raises SaescaleError for two columns of one name that differ."""
        columns: dict[str, np.ndarray] = {}
        unread: dict[str, np.ndarray] = {}
        for name, column in named_columns(table, source).items():
            if name in _NUMBERS:
                columns[name], instead = numbers(column, decimal_comma)
                if instead is not None:
                    unread[name] = instead
            else:
                columns[name] = texts(column) if name in _TEXTS else either(column, decimal_comma)
        return cls(columns, source, unread=unread)

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
        unread = {name: values[mask] for name, values in self.unread.items()}
        places = np.arange(1, len(self) + 1) if self.places is None else self.places
        places = places[mask]
        return replace(self, columns=columns, excluded=(*self.excluded, *excluded), places=places, unread=unread)

    def place(self, row: int) -> str:
        """Where a row stands in its source, such as "row 3"."""
        place = row + 1 if self.places is None else self.places[row]
        return place if isinstance(place, str) else f"row {place}"

    def rows_of(self, column: str) -> dict[Any, np.ndarray]:
        """The rows [their indices, in order] of each value of a column, found in one pass over the table, once."""
        if column not in self._rows_of:
            values = self.columns[column]
            order = np.argsort(values, kind="stable")
            found, first = np.unique(values[order], return_index=True)
            each = np.split(order, first[1:]) if len(values) else []
            self._rows_of[column] = dict(zip(found.tolist(), each, strict=True))
        return self._rows_of[column]

    def with_values(self) -> Self:
        """Without columns that hold no value, since results.parquet has all columns always. nmse stays."""
        kept = {n: v for n, v in self.columns.items() if n == "nmse" or v.dtype.kind != "f" or not np.isnan(v).all()}
        return replace(self, columns=kept)

    def require(self, names: Sequence[str], or_infinite: Collection[str] = ()) -> None:
        """Raises SaescaleError unless the columns exist and hold finite numbers, positive where a law takes
        their logarithm; those of `or_infinite` may be infinite."""
        missing = [name for name in names if name not in self.columns and name not in self.unread]
        if missing:
            raise SaescaleError(f"{self.source}: {missing_words(missing, self.columns)}")
        for name in names:
            values = self.columns.get(name, np.full(len(self), np.nan))
            if values.dtype.kind != "f":
                raise SaescaleError(
                    f"{self.source}: column {name} holds text, such as {str(values[0])!r}, and no numbers; correct it"
                )
            bad = np.isnan(values) | (np.isinf(values) & (name not in or_infinite))
            if name in _POSITIVE:
                bad |= ~(values > 0)
            if name in _WHOLE:
                bad |= values % 1 != 0
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise SaescaleError(f"{self.source}: {self._wrong(name, row)}")

    def _wrong(self, name: str, row: int) -> str:
        """Why a law cannot take the value of a column in a row, and what to do."""
        text = str(self.unread[name][row]) if name in self.unread else ""
        value = self.columns[name][row] if name in self.columns else np.nan
        place, cell = self.place(row), self.describe(row)
        where = f"in {place}" + (f" ({cell})" if cell != place else "")
        if text:
            text = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
            advice = "write it without a separator of thousands" if is_grouped(text) else "correct or remove the row"
            return f"{name} is {text!r} {where}, which is no number; {advice}"
        if np.isnan(value):
            return f"{name} is missing {where}; add it, or remove the row"
        wanted = "positive and finite" if name in _POSITIVE else "finite"
        wanted += ", a whole number" if name in _WHOLE else ""
        return f"{name} is {value:g} {where}, and it must be {wanted}; correct or remove the row"

    def describe(self, row: int) -> str:
        """A row in words, such as "cell 3f2a91, N = 512, k = 8"."""
        parts = [f"cell {self.columns['cell_id'][row]}"] if "cell_id" in self.columns else []
        for name, label in (("n_latents", "N"), ("k", "k")):
            if name in self.columns and not np.isnan(self.columns[name][row]):
                parts.append(f"{label} = {number(self.columns[name][row])}")
        return ", ".join(parts) or self.place(row)


def load_results(source: str | RunDirectory) -> Table:
    """The finished cells of a run directory or of a table with columns of results.parquet (see reading.py).

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
    if is_table(source):
        written = read_file(source)
        return replace(Table.from_arrow(written.table, source, written.decimal_comma), notes=written.notes)
    if RunDirectory(source).is_begun():
        return load_rows(RunDirectory(source))
    raise SaescaleError(
        f"{source}: neither a run directory with results.parquet nor a table (.csv, .tsv, .txt or .parquet, also .gz)"
    )


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
        if is_table(source):
            return None
        source = RunDirectory(source)
    url, curves = join(source.url, "curves.parquet"), source.read_curves()
    return Table.from_arrow(curves, url) if len(curves) or exists(url) else None


def finished(table: Table) -> Table:
    """Only the rows with status "done" or another word for it (all rows where there is no such column), of these only
    those with an nmse (all where none has one), and notes of what was left out and of what could not be read in the
    others. Raises SaescaleError when no row is done."""
    everything = table
    if "status" in table:
        table = _only_done(table)
    if not len(table):
        raise SaescaleError(f"{table.source}: no finished cell; {_what_to_do(everything)}")
    table = _with_nmse(table)
    instead = {name: values[values != ""] for name, values in table.unread.items()}
    cases = [f"{name} ({str(values[0])!r}{_more(len(values))})" for name, values in instead.items() if len(values)]
    note = f"{table.source}: taken as missing where there is no number: {listed(cases, ', ')}"
    return replace(table, notes=(*table.notes, note)) if cases else table


def _only_done(table: Table) -> Table:
    done = np.array([status.strip().lower() in _DONE for status in table["status"].tolist()], dtype=bool)
    if done.all():
        return table
    left_out = np.flatnonzero(~done).tolist()
    words = {row: str(table["status"][row]).strip() or "without status" for row in left_out}
    kept = table.select(
        done, [f"{table.describe(row)} is {word}" + _because(table, row) for row, word in words.items()]
    )
    counts = Counter(words.values())
    cases = listed((f"{count} {word}" for word, count in counts.most_common()), ", ")
    note = f"{table.source}: {_are(len(left_out), len(table), 'row')} not done and left out ({cases})"
    known_words = _WAITING | _LOST | {"without status"}
    if odd := [repr(w) for w in counts if w.lower() not in known_words and not w.startswith("without")]:
        note += f"; where {listed(odd, ' or ')} means finished, call it done"
    return replace(kept, notes=(*table.notes, note))


def _with_nmse(table: Table) -> Table:
    """Without the rows whose nmse is missing, as of a training that reached NaN; all where none has one."""
    if "nmse" not in table or table["nmse"].dtype.kind != "f":
        return table
    missing = np.isnan(table["nmse"])
    if "nmse" in table.unread:
        missing &= table.unread["nmse"] == ""
    if not missing.any() or missing.all():
        return table
    cells = [table.describe(row) for row in np.flatnonzero(missing).tolist()]
    note = (
        f"{table.source}: {_are(len(cells), len(table), 'finished cell')} without nmse and left out ({listed(cells)})"
    )
    return replace(table.select(~missing, [f"{c} has no nmse" for c in cells]), notes=(*table.notes, note))


def _are(count: int, of: int, what: str) -> str:
    return f"{count} of {of} {what}s {'is' if count == 1 else 'are'}"


def check_cells(table: Table) -> None:
    """Raises SaescaleError for a missing nmse, for values of nmse, n_latents or k that are not positive numbers, and
    for a k above n_latents; an infinite nmse is that of a cell that diverged."""
    there = {*table.columns, *table.unread}
    sizes = [name for name in ("n_latents", "k") if name in there or ("nmse" not in there and other_name(name, there))]
    table.require(("nmse", *sizes), ("nmse",))
    if {"n_latents", "k"} <= set(sizes) and (above := table["k"] > table["n_latents"]).any():
        row = int(np.flatnonzero(above)[0])
        raise SaescaleError(
            f"{table.source}: k = {number(table['k'][row])} is above n_latents = {number(table['n_latents'][row])} in "
            f"{table.place(row)}, and an SAE has no more active latents than latents; correct or remove the row, or "
            "give the columns their right names"
        )


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


def _because(table: Table, row: int) -> str:
    """Why the cell in a row failed, after a colon; nothing where the table does not say it."""
    error = str(table["error"][row]) if "error" in table and table["error"].dtype.kind == "U" else ""
    return f": {' '.join(error.split())}" if error else ""


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _what_to_do(table: Table) -> str:
    """Advice about a table of which no row is done."""
    statuses = [status.strip().lower() for status in table["status"].tolist()] if "status" in table else []
    failed = [row for row, status in enumerate(statuses) if status == "failed"]
    others = len(table) - len(failed)
    odd = [table["status"][row] for row, status in enumerate(statuses) if status not in (*_WAITING, "failed")]
    if odd:
        return f"its column status says {str(odd[0])!r}{_more(len(odd))} and nowhere done; call finished cells done"
    if not failed:
        return f"{others} are still to be trained: run the sweep first" if others else "the table is empty"
    first = f"{len(failed)} failed, the first ({table.describe(failed[0])})" + (
        _because(table, failed[0]) or " without saying why"
    )
    if others:
        return f"{first}; {others} are still to be trained: run the sweep to its end"
    return f"{first}; remove the cause and the failed cells' folders below cells/, then run the sweep again"


def number(value: float) -> str:
    """Counts in full, whatever is above a billion or not whole to three digits."""
    return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e9 else f"{value:.3g}"


def shown(value: float | str) -> str:
    """A value of a column in a message."""
    return value if isinstance(value, str) else number(value)


def size_of(table: Table, row: int) -> str:
    """Such as "N = 512, k = 8", after the kind of cell where there are several."""
    symbols = {"n_latents": "N", "k": "k"}
    named = [f"{symbol} = {number(table[column][row])}" for column, symbol in symbols.items() if column in table]
    size = ", ".join(named) or table.place(row)
    return f"{table[KIND][row]}, {size}" if KIND in table else size
