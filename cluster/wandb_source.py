"""Cells and curves of a W&B project, through W&B's public API: `saescale fit wandb:entity/project`."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from scaling.tables import Table, check_cells, finished
from storage.errors import SaescaleError, one_line
from storage.rundir import CURVES_SCHEMA, RESULTS_SCHEMA

_TIMEOUT_S = 30
_POINTS = 2_000  # of a curve, evenly taken; a longer one is thinned by the server
_CURVE = ("_step", *(name for name in CURVES_SCHEMA.names if name not in ("cell_id", "step")))


def read_project(path: str) -> tuple[Table, Table | None]:
    """(finished cells, their curves or None) of `entity/project`, or `project` of the entity that the key belongs to.

    Runs that saescale logged as cells are read, and any others whose config has n_latents and k and whose summary has
    nmse; a group can be chosen by entity/project/group. Raises SaescaleError when W&B cannot be reached, knows no such
    project, or has no finished cell there.
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
    results = finished(Table.from_arrow(pa.Table.from_pylist(cells, RESULTS_SCHEMA), source)).with_values()
    check_cells(results)
    if not curves:
        return results, None
    return results, Table.from_arrow(pa.Table.from_pylist(curves, CURVES_SCHEMA), f"{source}, history")


def _cell(run: Any) -> dict[str, Any] | None:
    """A row of results.parquet, or None where the run is no cell."""
    config, summary = dict(run.config), run.summary
    if "n_latents" not in config or "k" not in config or run.job_type not in ("cell", None):
        return None
    known = {name: summary.get(name, config.get(name)) for name in RESULTS_SCHEMA.names}
    known |= {
        name: config[name] for name in ("n_latents", "k", "d_model", "seed", "lr", "activation") if name in config
    }
    # What another program logged has no status of its own.
    status = known["status"] or ("done" if run.state == "finished" else run.state)
    return known | {
        "cell_id": str(config.get("cell_id", run.id)),
        "subject": str(config.get("subject", "")),
        "site": _site(config.get("site", "")),
        "status": status,
    }


def _site(site: Any) -> str:
    """As results.parquet has it: `resid_post.22`."""
    return f"{site.get('hook')}.{site.get('layer')}" if isinstance(site, Mapping) else str(site)


def _curve(run: Any, cell_id: str) -> list[dict[str, Any]]:
    rows = run.history(samples=_POINTS, keys=None, pandas=False)
    return [
        {"cell_id": cell_id, "step": row.get("_step")} | {name: _real(row.get(name)) for name in _CURVE[1:]}
        for row in rows
        if row.get("nmse") is not None and row.get("tokens") is not None
    ]


def _real(value: Any) -> float | None:
    # W&B writes NaN and infinities as text.
    return float(value) if value is not None else None
