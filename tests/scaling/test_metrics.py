"""Metrics of evaluations: what is declared of them, and their values beside the cells."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saescale.scaling.metrics import Metric, declared, document, measured, metrics_table, values_of
from saescale.scaling.sources import load_evals
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.evaluation import EVALUATIONS, find_evaluation, metrics_of

CELLS = pa.table({"cell_id": ["a", "b"], "n_latents": [64, 128]})


def test_what_is_declared_is_read_back(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    assert declared(run.read_evals()) == {}
    run.write_evals("a", "loss", [{"metric": "kl", "value": 1.0}], document("loss", {"kl": Metric("lower")}))
    run.write_evals("a", "n2g", [{"metric": "f1", "value": 0.5}], document("n2g", {"f1": Metric("higher", True)}))
    run.write_evals("a", "other", [{"metric": "m", "value": 0.5}])
    assert declared(run.read_evals()) == {"loss.kl": Metric("lower"), "n2g.f1": Metric("higher", bounded=True)}
    # Measured again by a file that declares otherwise.
    run.write_evals("b", "n2g", [{"metric": "f1", "value": 0.5}], document("n2g", {"f": Metric("higher", limit=1.0)}))
    assert declared(run.read_evals()) == {"loss.kl": Metric("lower"), "n2g.f": Metric("higher", limit=1.0)}
    assert run.read_evals().num_rows == 4


def test_a_field_of_a_later_version_is_passed_over() -> None:
    evals = pa.table({"metric": ["m"]}).replace_schema_metadata(
        {b"saescale.metrics": b'{"a.m": {"better": "lower", "of a later version": 3}}'}
    )
    assert declared(evals) == {"a.m": Metric("lower")}


def test_values_of_whole_cells_stand_beside_their_cells(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    whole = {"metric": "kl", "value": 1.0, "low": 0.9, "high": 1.2}
    run.write_evals("b", "loss", [whole, whole | {"at": "position 1", "value": 9.0}])
    run.write_evals("a", "loss", [{"metric": "ce", "value": 3.0, "at": ""}, {"metric": "none", "value": None}])
    run.write_evals("gone", "loss", [{"metric": "kl", "value": 5.0}])
    found = values_of(measured(run.read_evals()), ["a", "b"])
    assert list(found) == ["loss.ce", "loss.kl"]
    np.testing.assert_array_equal(found["loss.kl"], [[np.nan, 1.0], [np.nan, 0.9], [np.nan, 1.2]])
    np.testing.assert_array_equal(found["loss.ce"], [[3.0, np.nan], [np.nan, np.nan], [np.nan, np.nan]])
    table = metrics_table(CELLS, run.read_evals()).to_pylist()
    assert [(row["n_latents"], row["loss.kl"], row["loss.kl.high"], row["loss.ce"]) for row in table] == [
        (64, None, None, 3.0), (128, 1.0, 1.2, None),
    ]  # fmt: skip
    assert values_of(measured(run.read_evals()), ["another"]) == {}


def test_a_table_of_cells_with_their_metrics_keeps_what_was_declared(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    said = {"f1": Metric("higher", bounded=True, beside=("f1_random",))}
    run.write_evals("a", "toy", [{"metric": "f1", "value": 0.5}], document("toy", said))
    pq.write_table(metrics_table(CELLS, run.read_evals()), tmp_path / "cells.parquet")
    assert declared(load_evals([str(tmp_path / "cells.parquet")])) == {"toy.f1": said["f1"]}


def test_every_evaluation_declares_metrics_that_make_sense() -> None:
    for name in EVALUATIONS.names():
        for metric in metrics_of(find_evaluation(name)).values():
            assert metric.better in ("lower", "higher")
            assert not (metric.bounded and metric.limit is not None), "the limit of a share is its end"
