"""Cells, curves and metrics of a W&B project, through W&B's public API: `saescale fit wandb:entity/project`."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from saescale.scaling.metrics import document
from saescale.scaling.tables import Table, check_cells, finished
from saescale.storage.columns import COLUMNS, CURVES, EVALS, OLD_NAMES, RESULTS
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.rundir import METRICS
from saescale.trainers.evals.evaluation import EVALUATIONS, find_evaluation, metrics_of

_TIMEOUT_S = 30
_POINTS = 2_000  # of a curve, evenly taken; a longer one is thinned by the server
_METRICS = "eval/"  # begins the keys of metrics in the summary of a cell
_NEEDED = ("n_latents", "k", "nmse")  # of a cell, as positive numbers


class Project(NamedTuple):
    """Finished cells, their curves where there are any, and what evaluations measured on them, as evals.parquet."""

    cells: Table
    curves: Table | None
    evals: pa.Table


def read_project(path: str) -> Project:
    """That of `entity/project`, or of `project` of the entity that the key belongs to.

    Runs that saescale logged as cells are read, and any others whose config has n_latents and k and whose summary has
    nmse; a run in which one of these is no positive number is excluded, and other values that are not what they should
    be count as missing. Metrics are those of whole cells that summaries have (trainers/loggers/wandb_evals.py), and are
    declared as their evaluations do here. A group can be chosen by entity/project/group. Raises SaescaleError when W&B
    cannot be reached, knows no such project, or has no finished cell there.
    """
    import wandb

    parts = path.strip("/").split("/")
    if not all(parts) or len(parts) > 3:
        raise SaescaleError(f"wandb:{path}: write wandb:entity/project or wandb:entity/project/group")
    project, group = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    cells, curves, evals = [], [], []
    try:
        api = wandb.Api(timeout=_TIMEOUT_S)
        for run in api.runs(project, filters={"group": group} if group else None, lazy=False):
            row = _cell(run)
            if row is None:
                continue
            cells.append(row)
            curves += _curve(run, row["cell_id"])
            evals += _metrics(run, row["cell_id"])
    except Exception as error:
        raise SaescaleError(
            f"wandb:{path}: {one_line(error)}; check the name, WANDB_API_KEY (or `wandb login`) and WANDB_BASE_URL"
        ) from error
    source = f"wandb:{path}"
    if not cells:
        raise SaescaleError(f"{source}: no run with n_latents and k in its config and nmse in its summary")
    results = finished(Table.from_arrow(pa.Table.from_pylist(cells, RESULTS), source)).with_values()
    check_cells(results)
    history = Table.from_arrow(pa.Table.from_pylist(curves, CURVES), f"{source}, history") if curves else None
    known = _declared(dict.fromkeys(row["evaluation"] for row in evals))
    return Project(results, history, pa.Table.from_pylist(evals, EVALS).replace_schema_metadata(known))


def _cell(run: Any) -> dict[str, Any] | None:
    """A row of results.parquet, or None where the run is no cell."""
    config, summary = {OLD_NAMES.get(name, name): value for name, value in dict(run.config).items()}, run.summary
    if "n_latents" not in config or "k" not in config or run.job_type == "summary":
        return None
    known = {name: summary.get(name, config.get(name)) for name in RESULTS.names}
    # What defines a cell is in its config, whatever else the summary calls so.
    known |= {name: config[name] for name in RESULTS.names if COLUMNS[name].role == "spec" and name in config}
    if known["heldout_rows"] is None:
        known["heldout_rows"] = config.get("eval_tokens")  # as cells of 0.1.0 logged it
    row = _as_schema(known, RESULTS) | {
        "cell_id": _text(config.get("cell_id", run.id)),
        "subject": _text(config.get("subject", "")),
        "site": _text(_site(config.get("site", ""))),
    }
    # What another program logged has no status of its own.
    status = row["status"] or ("done" if run.state == "finished" else _text(run.state))
    odd = [name for name in _NEEDED if not (row[name] is not None and 0 < row[name] < math.inf)]
    # One odd run is left out, with the reason, and the others stay.
    return row | {"status": f"without a usable {' and '.join(odd)}" if status == "done" and odd else status}


def _as_schema(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The values of `row` as the columns hold them; None for what is no such value, since anybody can log anything."""
    return {field.name: _value(row.get(field.name), field.type) for field in schema}


def _value(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_string(kind):
        return _text(value)
    try:
        number = float(value)  # W&B writes NaN and infinities as text
    except (TypeError, ValueError, OverflowError):
        return None
    if pa.types.is_floating(kind):
        return number
    # The value itself where it is whole: a seed may have more digits than float64.
    whole = value if isinstance(value, int) else number
    return int(whole) if abs(number) < 2.0**63 and number % 1 == 0 else None


def _text(value: Any) -> str:
    """As text that can be stored: JSON may hold halves of surrogate pairs."""
    return str(value).encode("utf-8", "replace").decode()


def _site(site: Any) -> str:
    """As results.parquet has it: `resid_post.22`."""
    return f"{site.get('hook')}.{site.get('layer')}" if isinstance(site, Mapping) else str(site)


def _curve(run: Any, cell_id: str) -> list[dict[str, Any]]:
    logged = run.history(samples=_POINTS, keys=None, pandas=False)
    rows = [_as_schema(row | {"step": row.get("_step"), "cell_id": cell_id}, CURVES) for row in logged]
    return [row for row in rows if row["nmse"] is not None and row["tokens"] is not None]


def _metrics(run: Any, cell_id: str) -> list[dict[str, Any]]:
    """Rows of evals.parquet: of "eval/downstream_loss.kl" in a summary, with its "/low" and "/high"."""
    summary, rows = dict(run.summary), []
    for key in sorted(summary):
        name = key.removeprefix(_METRICS)
        evaluation, _, metric = name.partition(".")
        if name == key or "/" in name or not (evaluation and metric):
            continue
        ends = {end: summary.get(f"{key}/{end}") for end in ("low", "high")}
        row = _as_schema({"value": summary[key]} | ends, EVALS) | {"evaluation": evaluation, "metric": metric}
        rows.append(row | {"cell_id": cell_id, "at": ""})
    return rows


def _declared(evaluations: Iterable[str]) -> dict[bytes, bytes]:
    """Metadata of evals.parquet: what those of the evaluations that are here declare of their metrics."""
    there = EVALUATIONS.names()
    found = [document(name, metrics_of(find_evaluation(name))) for name in evaluations if name in there]
    return {METRICS: json.dumps({name: of for each in found for name, of in each.items()}).encode()}
