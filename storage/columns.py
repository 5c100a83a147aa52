"""Every column of every table once: its name, type, unit, the words for it, and the tables in which it stands.

Figures, reports, fits, W&B and Arrow's schemas read it here: a new column is one more entry of `COLUMNS` (and one more
field of CurveRow, where it is a column of curves). What the tables are is said in RUN.md.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import pyarrow as pa

TableName = Literal["results", "curves", "evals"]

_TEXT, _INT, _REAL = pa.string(), pa.int64(), pa.float64()
_ALL: tuple[TableName, ...] = ("results", "curves", "evals")
_RESULTS: tuple[TableName, ...] = ("results",)
_CURVES: tuple[TableName, ...] = ("curves",)
_BOTH: tuple[TableName, ...] = ("results", "curves")
_EVALS: tuple[TableName, ...] = ("evals",)


class Column(NamedTuple):
    """`title` names it on an axis or a panel, `label` heads it in a table, `key` is its name in a report's filter.

    `symbol`: what formulas call it. `role`: whether it says what a cell is ("spec"), what came out ("outcome"), or how
    long it took ("time", which no fit depends on). `positive`: laws take its logarithm. `one_kind`: cells that differ
    in it are not described by one law. `alike`: it moves nmse, so fits say so where cells differ in it. `listed`: shown
    in a report's table of cells. `panel`: the section of W&B's workspace that shows its curve.
    """

    name: str
    type: pa.DataType
    tables: tuple[TableName, ...]
    title: str
    label: str = ""
    key: str = ""
    unit: str = ""
    symbol: str = ""
    role: Literal["spec", "outcome", "time"] = "outcome"
    positive: bool = False
    one_kind: bool = False
    alike: bool = False
    listed: bool = False
    decimals: int | None = None  # in a report, so that they line up
    panel: str = ""

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers rather than text."""
        return bool(self.type != _TEXT)


_COLUMNS = (
    Column("cell_id", _TEXT, _ALL, "Cell", "cell", "cell", role="spec", listed=True),
    Column("step", _INT, _CURVES, "Step", unit="steps"),
    Column("subject", _TEXT, _RESULTS, "Subject", role="spec", one_kind=True),
    Column("site", _TEXT, _RESULTS, "Site", role="spec", one_kind=True),
    Column("n_latents", _INT, _RESULTS, "Latents N", "N", "n", "latents", "n", "spec", positive=True, listed=True),
    Column("k", _INT, _RESULTS, "Active latents k", "k", "k", "latents", "k", "spec", positive=True, listed=True),
    Column("architecture", _TEXT, _RESULTS, "Architecture", "architecture", "architecture", role="spec",
           one_kind=True, listed=True),
    Column("d_model", _INT, _RESULTS, "Width of the subject s", unit="dimensions", symbol="s", role="spec",
           one_kind=True),
    Column("corpus", _TEXT, _RESULTS, "Corpus", role="spec", alike=True),
    Column("store", _TEXT, _RESULTS, "Fingerprint of the store", role="spec", one_kind=True),
    Column("heldout_rows", _INT, _RESULTS, "Held-out rows", unit="rows", role="spec", one_kind=True),
    Column("precision", _TEXT, _RESULTS, "Precision of the products", role="spec", alike=True),
    Column("batch_tokens", _INT, _RESULTS, "Batch", unit="tokens", role="spec", alike=True),
    Column("ema", _REAL, _RESULTS, "Decay of the average of the weights", role="spec", alike=True),
    Column("k_aux", _INT, _RESULTS, "Dead latents that AuxK takes", unit="latents", role="spec", alike=True),
    Column("auxk_coefficient", _REAL, _RESULTS, "Weight of AuxK", role="spec", alike=True),
    Column("settings", _TEXT, _RESULTS, "What else defines the cell, as JSON", role="spec", alike=True),
    Column("evaluation", _TEXT, _EVALS, "Evaluation", "evaluation", role="spec"),
    Column("metric", _TEXT, _EVALS, "Metric", "metric", role="spec"),
    Column("value", _REAL, _EVALS, "Value", "value"),
    Column("low", _REAL, _EVALS, "Lower end of the 95 % interval", "low"),
    Column("high", _REAL, _EVALS, "Upper end of the 95 % interval", "high"),
    Column("at", _TEXT, _EVALS, "Of what: a latent, a label, a position; empty for the whole cell", "at", role="spec"),
    Column("n", _INT, _EVALS, "Samples", "samples", unit="samples"),
    Column("latents", _INT, _EVALS, "Latents of the cell that were to be looked at", unit="latents", role="spec"),
    Column("others", _TEXT, _EVALS, "Cells that the cell was compared with", role="spec"),
    Column("left_out", _TEXT, _EVALS, "Why there is no value", role="spec"),
    Column("seconds", _REAL, _EVALS, "What the evaluation took of the cell", unit="s", role="time"),
    Column("shared_seconds", _REAL, _EVALS, "What was made for all cells before this one took", unit="s", role="time"),
    Column("seed", _INT, ("results", "evals"), "Seed", "seed", "seed", role="spec", listed=True),
    Column("nmse", _REAL, _BOTH, "Held-out normalised MSE (nmse)", "nmse", "nmse", "nmse", positive=True, listed=True,
           decimals=5),
    Column("train_nmse", _REAL, _CURVES, "Training nmse", unit="nmse"),
    Column("l0", _REAL, _BOTH, "Active latents (L0)", "L0", "l0", "latents", listed=True, decimals=2, panel="Latents"),
    Column("l0_error", _REAL, _RESULTS, "L0 off its target: (L0 - k) / k", "L0 error", "l0_error", "share of k",
           listed=True, decimals=3),
    Column("levels", _TEXT, _RESULTS, "nmse and L0 at each k that one training serves, as JSON"),
    Column("dead_fraction", _REAL, _BOTH, "Dead latents", "dead", "dead", "fraction", listed=True, panel="Latents"),
    Column("dead_fraction_long", _REAL, _BOTH, "Dead latents, long window", unit="fraction", panel="Latents"),
    Column("lr", _REAL, _BOTH, "Learning rate", "lr", "lr", role="spec", listed=True, panel="Throughput"),
    Column("tokens", _INT, _BOTH, "Training tokens", "tokens", "tokens", "tokens", "D", positive=True, listed=True),
    Column("flops", _REAL, _BOTH, "Training compute C (FLOPs, sparse)", "FLOPs (sparse)", "flops", "FLOPs", "C",
           positive=True, listed=True),
    Column("flops_dense", _REAL, _RESULTS, "Training FLOPs (dense equivalent)", "FLOPs (dense)", "flops_dense",
           "FLOPs", positive=True, listed=True),
    Column("wall_s", _REAL, _RESULTS, "Training time", "seconds", "seconds", "s", role="time", listed=True,
           decimals=1),
    Column("device", _TEXT, _RESULTS, "Kind of device", role="time"),
    Column("tokens_per_s", _REAL, _CURVES, "Tokens per second", unit="tokens/s", role="time", panel="Throughput"),
    Column("coefficient", _REAL, _BOTH, "Coefficient of the sparsity penalty"),
    Column("status", _TEXT, _RESULTS, "Status"),
    Column("error", _TEXT, _RESULTS, "Error"),
)  # fmt: skip

COLUMNS = {column.name: column for column in _COLUMNS}
# What tables of earlier versions call a column.
OLD_NAMES = {"activation": "architecture"}


def columns_of(table: TableName) -> tuple[Column, ...]:
    """The columns of a table, in its order."""
    return tuple(column for column in _COLUMNS if table in column.tables)


def is_diverged(nmse: float | None) -> bool:
    """Whether a cell with that held-out nmse reconstructs worse than the mean alone, or not at all."""
    return nmse is not None and not nmse <= 1


def misses_k(l0_error: float | None) -> bool:
    """Whether a cell, of which k is the target of its mean L0, ended more than 10 % off it; None: k is exact."""
    return l0_error is not None and not abs(l0_error) <= 0.1


def _schema(table: TableName) -> pa.Schema:
    return pa.schema([(column.name, column.type) for column in columns_of(table)])


RESULTS, CURVES, EVALS = _schema("results"), _schema("curves"), _schema("evals")


class CurveRow(NamedTuple):
    """One evaluation of one cell while it trains: a row of curves.parquet (less cell_id) and one point in W&B."""

    step: int
    tokens: int
    flops: float  # sparse training FLOPs so far
    nmse: float  # whole held-out set, EMA weights, summed in float64
    train_nmse: float  # mean of the training loss over the steps since the last row
    l0: float  # mean number of active latents per held-out token
    dead_fraction: float
    dead_fraction_long: float
    lr: float
    tokens_per_s: float
    coefficient: float | None = None  # of the sparsity penalty, of architectures that have one


def folded(name: str) -> str:
    """A name as the tables spell theirs: "N latents" and " n-latents" are n_latents."""
    return re.sub(r"[\s-]+", "_", name.strip(" \t\r\n\ufeff\"'").lower())


def current_names(names: Iterable[str]) -> list[str]:
    """The names of columns as they are today; one that was renamed keeps its old name where both are there."""
    there = list(names)
    return [OLD_NAMES[name] if name in OLD_NAMES and OLD_NAMES[name] not in there else name for name in there]


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, from a table of this version or an earlier one: null where it had none. The metadata of
    its own schema stay.

    Raises pyarrow.ArrowInvalid (or another ArrowException) for values that the column cannot hold.
    """
    schema = schema.with_metadata(table.schema.metadata)
    table = table.rename_columns(current_names(table.column_names))
    return pa.table(
        [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ],
        schema=schema,
    )
