"""What a cell leaves in the run directory when it ends: a row of results.parquet, done or failed."""

from typing import Any

from saescale.storage.manifest import Manifest
from saescale.trainers.cell import Cell, CurveRow


def result_row(
    cell: Cell, manifest: Manifest, tokens: int, wall_s: float, last: CurveRow | None, error: str | None
) -> dict[str, Any]:
    """The row of a cell that trained on `tokens` tokens in `wall_s` seconds; `last` is its last evaluation.

    With `error`, which says why the cell failed, it measures nothing.
    """
    flops = cell.flops(tokens)
    measured = last if error is None else None
    return {
        "cell_id": cell.cell_id,
        "subject": manifest.subject,
        "site": f"{manifest.site.hook}.{manifest.site.layer}",
        "d_model": cell.d_model,
        "n_latents": cell.n_latents,
        "k": cell.k,
        "architecture": cell.activation,
        "seed": cell.seed,
        "lr": cell.lr,
        "tokens": tokens,
        "flops": float(flops.sparse),
        "flops_dense": float(flops.dense),
        "nmse": measured.nmse if measured else None,
        "l0": measured.l0 if measured else None,
        "dead_fraction": measured.dead_fraction if measured else None,
        "dead_fraction_long": measured.dead_fraction_long if measured else None,
        "wall_s": wall_s,
        "status": "failed" if error else "done",
        "error": error,
    }
