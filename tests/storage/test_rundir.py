"""The run directory on every file system."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from saescale.storage import files
from saescale.storage.columns import CURVES, RESULTS
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.lease import Lease, Superseded
from saescale.storage.rundir import RunDirectory


def test_everything_comes_back_on_every_file_system(any_url: str) -> None:
    run = RunDirectory(files.join(any_url, "run"))
    assert run.read_spec() is None
    assert run.read_cell_result("a1") is None
    assert run.read_cell_curve("a1") == []
    assert run.cells_with_results() == set()
    assert run.read_json("fits.json") is None
    assert run.read_results().schema == RESULTS
    assert len(run.read_curves()) == 0

    spec: dict[str, Any] = {"name": "Größe", "grid": {"n_latents": [512, 1024]}, "train": {"lr": 8e-4, "tokens": None}}
    spec["resolved"] = {"precision": "fp32"}
    run.write_spec(spec)
    assert run.read_spec() == spec
    assert list(run.read_spec() or {}) == ["name", "grid", "train", "resolved"]

    run.write_cell_result("a1", {"cell_id": "a1", "nmse": np.float32(0.5), "shape": (1, np.int64(2))})
    assert run.read_cell_result("a1") == {"cell_id": "a1", "nmse": 0.5, "shape": [1, 2]}
    run.write_cell_curve("a1", [{"step": 1, "tokens": 10, "flops": 2e20, "nmse": 0.7}])
    run.write_cell_curve("b2", [{"step": 1}, {"step": 2}])
    (row,) = run.read_cell_curve("a1")
    assert list(row) == CURVES.names
    assert (row["cell_id"], row["flops"], row["lr"]) == ("a1", 2e20, None)
    assert [row["step"] for row in run.read_cell_curve("b2")] == [1, 2]
    assert run.cells_with_results() == {"a1"}
    assert run.cell_url("a1").endswith("/cells/a1")

    run.write_results([{"cell_id": "a1", "nmse": 0.5, "k": 8, "status": "done", "other": 1}])
    assert run.read_results().schema.equals(RESULTS)
    assert run.read_results().to_pylist()[0]["k"] == 8
    curves = pa.Table.from_pylist(run.read_cell_curve("a1") + run.read_cell_curve("b2"), CURVES)
    run.write_curves(curves.select(list(reversed(CURVES.names))))
    assert run.read_curves().equals(curves)

    run.write_json("fits.json", {"values": np.array([1.0, math.nan]), "inf": -math.inf, "n": np.int32(3)})
    assert run.read_json("fits.json") == {"values": [1.0, None], "inf": None, "n": 3}
    assert files.list_names(run.url) == ["cells", "curves.parquet", "fits.json", "results.parquet", "sweep.yaml"]


def test_damaged_files_are_one_clear_line(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    for name in ("sweep.yaml", "fits.json", "results.parquet", "curves.parquet"):
        (tmp_path / name).write_bytes(b"{\xff:")
    for read, name in (
        (run.read_spec, "sweep.yaml"),
        (lambda: run.read_json("fits.json"), "fits.json"),
        (run.read_results, "results.parquet"),
        (run.read_curves, "curves.parquet"),
    ):
        with pytest.raises(SaescaleError, match=rf"{name} is damaged") as caught:
            read()
        assert "\n" not in str(caught.value)
    (tmp_path / "sweep.yaml").write_bytes(b"[1, 2]")
    with pytest.raises(SaescaleError, match=r"sweep\.yaml is damaged \(it holds no whole sweep"):
        run.read_spec()


def test_a_sweep_that_was_cut_at_any_byte_is_damaged_and_an_old_one_is_read(tmp_path: Path) -> None:
    run, path = RunDirectory(str(tmp_path)), tmp_path / "sweep.yaml"
    spec = {"name": "a", "grid": {"k": [2]}, "resolved": {"precision": "fp32", "versions": {"saescale": "0.2.0"}}}
    run.write_spec(spec)
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=r"sweep\.yaml is damaged \(.*(cut short|empty).*\); remove it"):
            run.read_spec()
        with pytest.raises(Damaged):
            run.read_spec_bytes()
    old = whole.removeprefix(b"---\n").removesuffix(b"...\n")
    path.write_bytes(old)
    assert run.read_spec() == spec
    path.write_bytes(old[: old.index(b"resolved")])
    with pytest.raises(Damaged, match="cut short"):
        run.read_spec()


def test_files_of_another_cell_are_not_believed(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    for cell_id in ("a1", "b2"):
        run.write_cell_result(cell_id, {"cell_id": cell_id, "nmse": 0.5})
        run.write_cell_curve(cell_id, [{"step": 1}])
    for name in ("result.json", "curve.parquet"):
        (tmp_path / "cells" / "a1" / name).write_bytes((tmp_path / "cells" / "b2" / name).read_bytes())
    with pytest.raises(Damaged, match=r"result\.json is damaged \(it is the result of the cell b2\); run the same"):
        run.read_cell_result("a1")
    with pytest.raises(Damaged, match=r"curve\.parquet is damaged \(it is the curve of the cell b2\); remove it"):
        run.read_cell_curve("a1")


def test_no_writer_writes_for_a_driver_that_was_superseded(tmp_path: Path) -> None:
    with Lease(str(tmp_path), None) as lease:
        run = RunDirectory(str(tmp_path), owner=lease.driver)
        run.write_json("fits.json", {})
        stale = RunDirectory(str(tmp_path), owner="another")
        before = sorted(path for path in tmp_path.rglob("*"))
        for write in (
            lambda: stale.write_spec({}),
            lambda: stale.write_cell_result("a", {}),
            lambda: stale.write_cell_curve("a", []),
            lambda: stale.save_checkpoint("a", 1, {}, {}),
            lambda: stale.write_checkpoint_part("a", 1, {}, 0, 2),
            lambda: stale.commit_checkpoint("a", 1, [], {}),
            lambda: stale.take_cell("a"),
            lambda: stale.tidy_cell("a", {}),
            lambda: stale.write_results([]),
            lambda: stale.write_curves(CURVES.empty_table()),
            lambda: stale.write_evals("a", "probe_loss", []),
            lambda: stale.write_architecture("a", ""),
            lambda: stale.write_json("fits.json", {}),
        ):
            with pytest.raises(Superseded, match="taken over by another driver"):
                write()
        writers = {
            name for name in vars(RunDirectory) if name.startswith(("write_", "save_", "take_", "tidy_", "commit_"))
        }
        assert len(writers) == 13, "a new writer belongs into this test"
        assert sorted(path for path in tmp_path.rglob("*")) == before
        RunDirectory(str(tmp_path)).write_json("fits.json", {})
