"""A plan's formulas held to runs that were measured: how long their cells took, predicted from other cells.

The device's constants are found anew (devices.rates_of) from cells that are not predicted: for each N from the cells of
the other N of the same run, and for a whole run from another run. What is left is the error of the formulas, and of
machines that were not equally busy.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saescale.cluster.sweep.work import work_of
from saescale.scaling.planning.devices import Work, rates_of
from saescale.scaling.reproduce import PUBLISHED
from saescale.storage.rundir import RunDirectory
from saescale.trainers.cell import Cell, traits_of

RUNS = ("quickstart", "architectures")  # in deploy/results


class Measured(NamedTuple):
    """Cells of one run with what training them took, of all in order."""

    name: str
    n_latents: np.ndarray
    work: list[Work]
    seconds: np.ndarray


class Held(NamedTuple):
    """predicted / measured: of the seconds of all cells together, and the median and 90 % range of single cells."""

    run: str
    constants_from: str
    cells: int
    seconds: float
    ratio: float
    median: float
    low: float
    high: float


def held_to_runs(root: Path = PUBLISHED.parent) -> list[Held]:
    """Of the published runs that are at hand; none where this is no checkout of the repository."""
    runs = [found for name in RUNS if (found := measured(root / name)) is not None]
    rows = []
    for run in runs:
        rows.append(_held(run, "its cells of other N", _leaving_out(run)))
        for other in runs:
            if other is not run:
                rates = rates_of(other.work, other.seconds)
                predicted = np.array([rates.seconds(work) for work in run.work])
                rows.append(_held(run, f"the cells of {other.name}", predicted))
    return rows


def measured(folder: Path) -> Measured | None:
    """The finished cells of a folder's results.parquet, with what the planner expects of each; None without it."""
    table = RunDirectory(str(folder)).read_results() if folder.is_dir() else None
    done = [row for row in (table.to_pylist() if table else ()) if row["status"] == "done" and (row["wall_s"] or 0) > 0]
    if not done:
        return None
    work, seconds = [work_of(_cell(row)) for row in done], [row["wall_s"] for row in done]
    return Measured(folder.name, np.array([row["n_latents"] for row in done]), work, np.array(seconds))


def _cell(row: Mapping[str, Any]) -> Cell:
    """As far as what it cost goes."""
    told = json.loads(row["settings"] or "{}")
    known = {name: told[name] for name in traits_of(row["architecture"]).settings if told.get(name) is not None}
    shape = {name: int(row[name]) for name in ("d_model", "n_latents", "k", "tokens", "batch_tokens")}
    return Cell(
        store=row["store"], architecture=row["architecture"], settings=known, lr=row["lr"],
        dead_after_tokens=told.get("dead_after_tokens") or shape["tokens"], precision=row["precision"], **shape,
    )  # fmt: skip


def _leaving_out(run: Measured) -> np.ndarray:
    predicted = np.empty(len(run.work))
    for size in np.unique(run.n_latents):
        own = run.n_latents == size
        rates = rates_of([run.work[i] for i in np.flatnonzero(~own)], run.seconds[~own])
        predicted[own] = [rates.seconds(run.work[i]) for i in np.flatnonzero(own)]
    return predicted


def _held(run: Measured, words: str, predicted: np.ndarray) -> Held:
    low, median, high = np.quantile(predicted / run.seconds, [0.05, 0.5, 0.95]).tolist()
    total = float(run.seconds.sum())
    return Held(run.name, words, len(run.work), total, float(predicted.sum()) / total, median, low, high)
