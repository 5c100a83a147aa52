"""Metrics of evaluations, one value for each whole cell, as laws, plans and reports take them beside nmse.

A metric is called `evaluation.metric`, as `downstream_loss.kl`. What its evaluation declares of it stands in the
metadata of evals.parquet's schema, so that tables can be fitted without the code that measured them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from saescale.storage.rundir import METRICS


class Metric(NamedTuple):
    """What an evaluation declares of a metric of whole cells.

    `better`: in which direction. `bounded`: it is a share and lies in [0, 1]. `limit`: what it would be of an SAE that
    loses nothing, where that is known: 1 of explained variance, or the name of another metric of the evaluation, as
    "ce_original" of the cross-entropy. Laws are of how far a metric is from there (laws/scales.py); of one that falls
    that is 0 unless said otherwise, of a share its other end.
    """

    better: Literal["lower", "higher"]
    bounded: bool = False
    limit: float | str | None = None


class Values(NamedTuple):
    """A metric of each cell with its own 95 % interval, float64 [cells] each; NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def declared(evals: pa.Table) -> dict[str, Metric]:
    """What the metrics of evals.parquet were declared as, by `evaluation.metric`; what was not is left out."""
    found = json.loads((evals.schema.metadata or {}).get(METRICS, b"{}"))
    return {name: Metric(**{key: of[key] for key in Metric._fields if key in of}) for name, of in found.items()}


def document(evaluation: str, metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """What an evaluation declares, for `RunDirectory.write_evals`."""
    return {f"{evaluation}.{name}": metric._asdict() for name, metric in metrics.items()}


def values_of(evals: pa.Table, cells: Sequence[str]) -> dict[str, Values]:
    """Every metric that evals.parquet has of whole cells (`at` is empty), for the cells of these ids, in their order.

    Metrics that none of these cells has are left out. Of several rows of one metric and cell the last counts.
    """
    places = {cell: place for place, cell in enumerate(cells)}
    found: dict[str, Values] = {}
    for entry in _whole(evals):
        if (place := places.get(entry["cell_id"])) is None or entry["value"] is None:
            continue
        name = f"{entry['evaluation']}.{entry['metric']}"
        columns = found.setdefault(name, Values(*np.full((3, len(cells)), np.nan)))
        for column, key in zip(columns, Values._fields, strict=True):
            column[place] = np.nan if entry[key] is None else entry[key]
    return {name: found[name] for name in sorted(found)}


def metrics_table(results: pa.Table, evals: pa.Table) -> pa.Table:
    """results.parquet with, for each metric of whole cells, columns `evaluation.metric`, `.low` and `.high` besides;
    null where a cell has none."""
    for name, values in values_of(evals, results["cell_id"].to_pylist()).items():
        for ending, column in zip(("", ".low", ".high"), values, strict=True):
            results = results.append_column(name + ending, pa.array(column, from_pandas=True))
    return results


def _whole(evals: pa.Table) -> Iterable[dict[str, Any]]:
    return (row for row in evals.to_pylist() if not row["at"])
