"""What evaluations measured on cells, in the summaries of their runs in Weights & Biases."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from saescale.scaling.metrics import measured, values_of
from saescale.storage.columns import columns_of, is_diverged, misses_k
from saescale.trainers.loggers.wandb_client import init, one_line, run_id, warn, without_secrets
from saescale.trainers.loggers.wandb_settings import Mode, WandbSettings

_OUTCOME = tuple(column.name for column in columns_of("results") if column.role != "spec")
_AT_A_TIME = 8  # a server takes a second or two for each


def outcome_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary of a cell's run says of a row of results.parquet: what it reached, and marks of what to look
    at."""
    ended = {name: row[name] for name in _OUTCOME if name in row}
    marks = {"diverged": is_diverged(row.get("nmse")), "missed_k": misses_k(row.get("l0_error"))}
    return dict(without_secrets(ended | marks))


def metrics_of_cells(rows: Sequence[Mapping[str, Any]], evals: pa.Table) -> list[dict[str, float]]:
    """For each row of results.parquet its metrics of whole cells, as "eval/downstream_loss.kl" with "/low" and
    "/high"."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for name, values in values_of(measured(evals), [row["cell_id"] for row in rows]).items():
        for ending, column in zip(("", "/low", "/high"), values, strict=True):
            for metrics, value in zip(found, column.tolist(), strict=True):
                if not math.isnan(value):
                    metrics[f"eval/{name}{ending}"] = value
    return found


def log_metrics(
    settings: WandbSettings, mode: Mode, sweep: str, results: pa.Table, evals: pa.Table, directory: str
) -> bool:
    """Adds the metrics of each cell to the summary of its run; whether all could be.

    The run is continued, and its summary written whole: of an offline run the last part that is sent may replace it.
    """
    rows = results.to_pylist()
    measured = [(row, metrics) for row, metrics in zip(rows, metrics_of_cells(rows, evals), strict=True) if metrics]

    def add(entry: tuple[Mapping[str, Any], Mapping[str, float]]) -> str | None:
        row, metrics = entry
        try:
            run = init(settings, mode, directory, id=run_id(row["cell_id"], sweep), group=sweep, job_type="cell")
            run.summary.update(outcome_of(row) | dict(metrics))
            run.finish(exit_code=0 if row.get("status") == "done" else 1)
        except Exception as error:
            return f"{row['cell_id']} ({one_line(error)})"
        return None

    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="wandb") as pool:
        failed = [why for why in pool.map(add, measured) if why]
    if failed:
        warn(f"the metrics of {len(failed)} cells are not in their runs, the first: {failed[0]}")
    return not failed
