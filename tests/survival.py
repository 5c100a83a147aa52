"""What two runs of one sweep have to agree in, whatever happened to either on the way."""

from typing import Any

from saescale.storage import files
from saescale.storage.rundir import RunDirectory

TIMES = ("wall_s", "tokens_per_s")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of results or curves, less what a clock says, in one order."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return sorted(rows, key=lambda row: (row["cell_id"], row.get("step") or 0))


def reached(run: RunDirectory) -> dict[str, Any]:
    """Results, curves, and the weights of each finished cell to the bit."""
    weights = {}
    for cell_id, names in run.cell_files().items():
        if "sae.safetensors" in names:
            content = files.read_bytes(files.join(run.cell_url(cell_id), "sae.safetensors"))
            # Without the header, whose entries safetensors writes in any order.
            weights[cell_id] = content[8 + int.from_bytes(content[:8], "little") :]
    return {
        "results": without_times(run.read_results().to_pylist()),
        "curves": without_times(run.read_curves().to_pylist()),
        "weights": weights,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """That two outcomes of `reached` are equal."""
    assert found["results"] == expected["results"]
    assert found["curves"] == expected["curves"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert [cell_id for cell_id, bits in expected["weights"].items() if found["weights"][cell_id] != bits] == []
