"""Every column stands once, and tables of earlier versions are read under today's names."""

from pathlib import Path

import pyarrow as pa
import pytest

from saescale.scaling.tables import load_rows
from saescale.storage.columns import COLUMNS, CURVES, EVALS, RESULTS, CurveRow, conform
from saescale.storage.rundir import RunDirectory

OLD = Path(__file__).parents[1] / "data" / "run-0.1.0"


def test_a_point_of_a_curve_has_the_columns_of_curves() -> None:
    assert {"cell_id", *CurveRow._fields} == set(CURVES.names)
    for name, kind in CurveRow.__annotations__.items():
        assert COLUMNS[name].type == {int: pa.int64(), float: pa.float64(), float | None: pa.float64()}[kind]


def test_a_run_of_the_first_version_has_todays_columns() -> None:
    run = RunDirectory(str(OLD))
    assert run.read_results().schema.equals(RESULTS)
    assert run.read_curves().schema.equals(CURVES)
    assert set(run.read_results()["architecture"].to_pylist()) == {"topk"}
    # Tables that are no run directory's, too.
    for source in (str(OLD), str(OLD / "results.parquet")):
        assert set(load_rows(source)["architecture"]) == {"topk"}
    assert run.read_evals().schema.equals(EVALS)


def test_conforming() -> None:
    table = pa.table({"activation": ["relu"], "architecture": ["topk"], "k": [8.0], "mine": [1]})
    assert (
        conform(table, RESULTS).to_pylist()[0] | {"k": 8, "architecture": "topk", "nmse": None}
        == (conform(table, RESULTS).to_pylist()[0])
    )
    with pytest.raises(pa.ArrowInvalid):
        conform(pa.table({"k": ["many"]}), RESULTS)


def test_evaluations_replace_their_own_rows(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_evals(
        "a", "probe_loss", [{"metric": "loss", "value": 1.0, "at": "white"}, {"metric": "loss", "value": 2}]
    )
    run.write_evals("b", "probe_loss", [{"metric": "loss", "value": 3.0, "low": 2.5, "high": 3.5, "n": 10, "seed": 0}])
    run.write_evals("a", "downstream", [{"metric": "ce", "value": 4.0}])
    run.write_evals("a", "probe_loss", [{"metric": "loss", "value": 5.0}])
    found = [(r["cell_id"], r["evaluation"], r["value"]) for r in run.read_evals().to_pylist()]
    assert found == [("b", "probe_loss", 3.0), ("a", "downstream", 4.0), ("a", "probe_loss", 5.0)]
    assert run.read_evals().to_pylist()[0]["high"] == 3.5


def test_the_page_of_the_run_directory_has_every_column() -> None:
    page = (Path(__file__).parents[2] / "storage" / "RUN.md").read_text()
    assert [name for name in COLUMNS if f"`{name}`" not in page] == []
