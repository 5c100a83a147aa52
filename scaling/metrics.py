"""Metrics of evaluations, one value for each whole cell, as laws, plans and reports take them beside nmse.

A metric is called `evaluation.metric`, as `downstream_loss.kl`. What its evaluation declares of it stands in the
metadata of evals.parquet's schema, so that tables can be fitted without the code that measured them. One of a part of a
cell, a label, a position, a latent (`at` of evals.parquet), is called `evaluation.metric@part`, where it is asked for.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saescale.storage.rundir import METRICS

Better = Literal["lower", "higher"]
PART = "@"


class Metric(NamedTuple):
    """What an evaluation declares of a metric of whole cells.

    `better`: in which direction. `bounded`: it is a share and lies in [0, 1]. `limit`: what it would be of an SAE that
    loses nothing, where that is known: 1 of explained variance, or the name of another metric of the evaluation, as
    "ce_original" of the cross-entropy. Laws are of how far a metric is from there (laws/scales.py); of one that falls
    that is 0 unless said otherwise, of a share its other end. `beside`: other metrics of the evaluation that it is read
    beside, such as the same of random latents. `leads`: of an evaluation that is about several things, one of those
    that have figures; without any its first metric has.
    """

    better: Better
    bounded: bool = False
    limit: float | str | None = None
    beside: tuple[str, ...] = ()
    leads: bool = False


def shares(names: Mapping[str, Sequence[str]], beside: Sequence[str], leads: Sequence[str]) -> dict[str, Metric]:
    """Metrics in [0, 1] that are better high: each read beside the same of others, called NAME_OTHER: those of
    `beside` and its own of `names`. `leads` are those that have figures."""
    return {
        name: Metric(
            "higher", bounded=True, beside=tuple(f"{name}_{other}" for other in (*beside, *own)), leads=name in leads
        )
        for name, own in names.items()
    }


class Values(NamedTuple):
    """A metric of each cell with its own 95 % interval, float64 [cells] each; NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


Ends = tuple[float, float, float]
Measured = Mapping[str, Mapping[str, Ends]]  # by metric and cell: value, low, high
_NOTHING: Ends = (np.nan, np.nan, np.nan)


def declared(evals: pa.Table) -> dict[str, Metric]:
    """What the metrics of evals.parquet were declared as, by `evaluation.metric`; what was not is left out."""
    found = json.loads((evals.schema.metadata or {}).get(METRICS, b"{}"))
    return {name: _read(of) for name, of in found.items()}


def _read(of: Mapping[str, Any]) -> Metric:
    given = {key: of[key] for key in Metric._fields if key in of}
    return Metric(**given | {"beside": tuple(of.get("beside", ()))})


def document(evaluation: str, metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """What an evaluation declares, for `RunDirectory.write_evals`."""
    return {f"{evaluation}.{name}": metric._asdict() for name, metric in metrics.items()}


def measured(evals: pa.Table, names: Iterable[str] = ()) -> Measured:
    """What evals.parquet has of whole cells (`at` is empty), and of the parts that `names` name. Of several rows of one
    metric and cell the last counts."""
    wanted = {"", *(name.partition(PART)[2] for name in names)}
    some = evals.filter(pc.is_in(pc.fill_null(evals["at"], ""), pa.array(sorted(wanted))))
    columns = (some[name].to_pylist() for name in ("cell_id", "evaluation", "metric", "at", "value", "low", "high"))
    found: dict[str, dict[str, Ends]] = {}
    for cell, evaluation, metric, at, *ends in zip(*columns, strict=True):
        if ends[0] is not None:
            value, low, high = (np.nan if end is None else end for end in ends)
            name = f"{evaluation}.{metric}" + (f"{PART}{at}" if at else "")
            found.setdefault(name, {})[cell] = value, low, high
    return {name: found[name] for name in sorted(found)}


def parts_of(name: str, evals: pa.Table) -> list[str]:
    """`name@part` for each part that the metric of that name was measured of, in their order."""
    evaluation, _, metric = name.partition(".")
    own = evals.filter(pc.and_(pc.equal(evals["evaluation"], evaluation), pc.equal(evals["metric"], metric)))
    return [f"{name}{PART}{at}" for at in dict.fromkeys(own["at"].to_pylist()) if at]


def sibling(name: str, metric: str) -> str:
    """Another metric of the evaluation, of the same part."""
    whole, at, part = name.partition(PART)
    return f"{whole.rpartition('.')[0]}.{metric}{at}{part}"


def values_of(of: Measured, cells: Sequence[str]) -> dict[str, Values]:
    """Every metric of the cells of these ids, in their order; those that none of them has are left out."""
    found = {}
    for name, by_cell in of.items():
        rows = [by_cell.get(cell, _NOTHING) for cell in cells]
        if any(row is not _NOTHING for row in rows):
            found[name] = Values(*np.array(rows, dtype=np.float64).T)
    return found


def metrics_table(results: pa.Table, evals: pa.Table) -> pa.Table:
    """results.parquet with, for each metric of whole cells, columns `evaluation.metric`, `.low` and `.high` besides;
    null where a cell has none. What was declared of them is in the metadata of its schema, as in evals.parquet's."""
    for name, values in values_of(measured(evals), results["cell_id"].to_pylist()).items():
        for ending, column in zip(("", ".low", ".high"), values, strict=True):
            results = results.append_column(name + ending, pa.array(column, from_pandas=True))
    said = (evals.schema.metadata or {}).get(METRICS)
    return results.replace_schema_metadata({METRICS: said} if said else None)
