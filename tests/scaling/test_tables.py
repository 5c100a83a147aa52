"""What a law may see: finished, comparable, checked cells."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest

from scaling.tables import Table, comparable, load_curves, load_results
from storage.errors import SaescaleError
from storage.rundir import RunDirectory

Rows = list[dict[str, Any]]


def test_run_directory_csv_and_parquet_agree(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(cells((512, 1024), (8, 16)))
    pyarrow.csv.write_csv(run.read_results(), tmp_path / "cells.csv")
    from_run = load_results(run)
    for source in (run.url, str(tmp_path / "run" / "results.parquet"), str(tmp_path / "cells.csv")):
        table = load_results(source)
        assert table["nmse"].tolist() == from_run["nmse"].tolist()
        assert table["cell_id"].tolist() == from_run["cell_id"].tolist()
    assert load_curves(run) is None
    assert load_curves(str(tmp_path / "cells.csv")) is None


def test_memory_url(cells: Callable[..., Rows]) -> None:
    run = RunDirectory("memory://tables/run")
    run.write_results(cells((512,), (8,)))
    assert len(load_results("memory://tables/run")) == 1


def test_unfinished_cells_are_excluded_with_the_reason(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    rows = cells((512, 1024), (8,))
    rows[1] |= {"status": "failed", "nmse": None, "error": "NaN in the loss"}
    run = RunDirectory(str(tmp_path))
    run.write_results(rows)
    table = load_results(run)
    assert table["n_latents"].tolist() == [512]
    assert table.excluded == ("cell 1024x8, N = 1024, k = 8 is failed: NaN in the loss",)


def test_no_finished_cell(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results([row | {"status": "failed"} for row in cells((512,), (8,))])
    with pytest.raises(SaescaleError, match=r"no finished cell \(1 rows are not done\)"):
        load_results(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_latents,nmse\n512,0.3\n", "cells.csv: no column k; it has n_latents, nmse"),
        ("n_latents,k,nmse\n512,8,0.3\n1024,8,0\n", "nmse is 0 in row 2 .N = 1024, k = 8.*positive"),
        ("n_latents,k,nmse\n512,8,nan\n", "nmse is nan in row 1"),
        ("n_latents,k,nmse\n0,8,0.3\n", "n_latents is 0 in row 1"),
        ("n_latents,k,nmse\n512,8,low\n", "column nmse holds text"),
        ("", "not a readable table"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(SaescaleError, match=message):
        load_results(str(tmp_path / "cells.csv"))


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "cells.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(SaescaleError, match="not a readable table"):
        load_results(str(tmp_path / "cells.parquet"))
    with pytest.raises(SaescaleError, match="no such file"):
        load_results(str(tmp_path / "other.csv"))
    with pytest.raises(SaescaleError, match="neither a run directory"):
        load_results(str(tmp_path))


def test_cells_of_another_kind_are_excluded(cells: Callable[..., Rows]) -> None:
    rows = cells((512, 1024), (8, 16))
    rows[0]["activation"] = "relu"
    table = comparable(Table.from_arrow(pa.Table.from_pylist(rows), "rows"))
    assert len(table) == 3
    assert "activation relu" in table.excluded[0]
    assert "activation topk" in table.excluded[0]
