"""Cells and curves of a W&B project, through W&B's public API: `saescale fit wandb:entity/project`."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from saescale.scaling.tables import Table, check_cells, finished
from saescale.storage.columns import COLUMNS, CURVES, OLD_NAMES, RESULTS
from saescale.storage.errors import SaescaleError, one_line

_TIMEOUT_S = 30
_POINTS = 2_000  # of a curve, evenly taken; a longer one is thinned by the server
_NEEDED = ("n_latents", "k", "nmse")  # of a cell, as positive numbers


def read_project(path: str) -> tuple[Table, Table | None]:
    """(finished cells, their curves or None) of `entity/project`, or `project` of the entity that the key belongs to.

    Runs that saescale logged as cells are read, and any others whose config has n_latents and k and whose summary has
    nmse; a run in which one of these is no positive number is excluded, and other values that are not what they should
    be count as missing. A group can be chosen by entity/project/group. Raises SaescaleError when W&B cannot be
    reached, knows no such project, or has no finished cell there.
    """
    import wandb

    parts = path.strip("/").split("/")
    if not all(parts) or len(parts) > 3:
        raise SaescaleError(f"wandb:{path}: write wandb:entity/project or wandb:entity/project/group")
    project, group = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    cells, curves = [], []
    try:
        api = wandb.Api(timeout=_TIMEOUT_S)
        for run in api.runs(project, filters={"group": group} if group else None, lazy=False):
            row = _cell(run)
            if row is None:
                continue
            cells.append(row)
            curves += _curve(run, row["cell_id"])
    except Exception as error:
        raise SaescaleError(
            f"wandb:{path}: {one_line(error)}; check the name, WANDB_API_KEY (or `wandb login`) and WANDB_BASE_URL"
        ) from error
    source = f"wandb:{path}"
    if not cells:
        raise SaescaleError(f"{source}: no run with n_latents and k in its config and nmse in its summary")
    results = finished(Table.from_arrow(pa.Table.from_pylist(cells, RESULTS), source)).with_values()
    check_cells(results)
    if not curves:
        return results, None
    return results, Table.from_arrow(pa.Table.from_pylist(curves, CURVES), f"{source}, history")


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
