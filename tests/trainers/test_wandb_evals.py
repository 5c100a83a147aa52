"""Metrics of evaluations in Weights & Biases: in the runs of cells and in the summary of the sweep, as a server got
them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from saescale.scaling.metrics import Metric, document
from saescale.storage.rundir import RunDirectory
from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import WandbSettings, log_summary
from saescale.trainers.loggers.wandb_evals import log_metrics
from tests.trainers.wandb_case import CONTEXT, DONE, FITS, OFFLINE, bare_machine, cell, messages, server, train
from tests.trainers.wandb_server import WandbServer

__all__ = ["bare_machine", "server"]  # fixtures

ONLINE = WandbSettings(entity="me")
FIRST, SECOND = cell(16), cell(32)
LAW = {"law": "n_k", "metric": "loss.kl", "formula": "loss.kl = ...", "coefficients": {
    "alpha": {"value": 2.0, "low": 1.0, "high": 3.0}}}  # fmt: skip
LAWS = {**FITS, "metrics": [{"metric": "loss.kl", "fits": [LAW]}]}


def measured(folder: Path) -> tuple[pa.Table, pa.Table]:
    """Results of two cells, of which one was measured."""
    run = RunDirectory(str(folder))
    run.write_results([{**DONE, "cell_id": c.cell_id, "n_latents": c.n_latents, "k": c.k} for c in (FIRST, SECOND)])
    kl = {"metric": "kl", "value": 0.5, "low": 0.4, "high": 0.6}
    rows = [kl, kl | {"at": "position 3", "value": 9.0}, {"metric": "plain", "value": 7.0}]
    run.write_evals(FIRST.cell_id, "loss", rows, document("loss", {"kl": Metric("lower")}))
    return run.read_results(), run.read_evals()


def test_metrics_reach_the_cells_and_the_summary(server: WandbServer, tmp_path: Path) -> None:
    results, evals = measured(tmp_path / "run")
    train(ONLINE, tmp_path, [FIRST])
    found: list[Any] = []
    said = messages(
        lambda: found.append(log_summary(ONLINE, "sweep", CONTEXT, LAWS, results, {}, str(tmp_path), evals=evals))
    )
    assert said == []
    assert found[0].whole
    own = wandb_client.run_id(FIRST.cell_id, "sweep")
    summary = json.loads(server.files[f"{own}/wandb-summary.json"])
    of_eval = {name: value for name, value in summary.items() if name.startswith("eval/")}
    assert of_eval == {
        "eval/loss.kl": 0.5, "eval/loss.kl/low": 0.4, "eval/loss.kl/high": 0.6, "eval/loss.plain": 7.0,
    }  # fmt: skip
    # What training said is still there, and the run is a finished one of the group.
    assert (summary["nmse"], summary["diverged"]) == (DONE["nmse"], False)
    assert server.exit_codes(own)[-1] == 0
    assert wandb_client.run_id(SECOND.cell_id, "sweep") not in server.runs()

    top = wandb_client.run_id("summary", "sweep")
    logged: dict[str, Any] = {}
    for line in server.streamed(top, "wandb-history.jsonl"):
        logged |= line
    table = json.loads(server.files[f"{top}/{logged['results']['path']}"])
    place = table["columns"].index("loss.kl")
    assert [row[place] for row in table["data"]] == [0.5, None]
    laws = json.loads(server.files[f"{top}/{logged['coefficients']['path']}"])["data"]
    assert ["loss.kl/n_k", "alpha", 2.0, 1.0, 3.0] in laws
    numbers = json.loads(server.files[f"{top}/wandb-summary.json"])
    assert numbers["loss.kl/n_k/alpha/value"] == 2.0
    assert server.config(top)["laws"]["loss.kl/n_k"] == "loss.kl = ..."


def test_what_cannot_be_added_is_one_warning(tmp_path: Path) -> None:
    results, evals = measured(tmp_path / "run")
    (tmp_path / "wandb").write_text("no folder")
    whole: list[bool] = []
    said = messages(
        lambda: whole.append(log_metrics(OFFLINE, "offline", "sweep", results, evals, str(tmp_path / "wandb")))
    )
    assert whole == [False]
    assert len(said) == 1
    assert f"the metrics of 1 cells are not in their runs, the first: {FIRST.cell_id}" in said[0]
