"""The real W&B client reads a project from a loopback server, and the laws come out of it."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.cluster.front.wandb_source import read_project
from saescale.scaling.metrics import document
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals import downstream_loss
from saescale.trainers.loggers.wandb_evals import metrics_of_cells
from tests.cluster.command import assert_one_line, saescale, saescale_here
from tests.scaling.conftest import _cells, _curves_of
from tests.trainers.wandb_case import bare_machine

__all__ = ["bare_machine"]  # a fixture

KEY = "0123456789abcdef" * 2 + "01234567"
PAGE = 7


class Server(ThreadingHTTPServer):
    """Answers what `wandb.Api` asks about the runs of one project, a page at a time, and records the questions."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs = runs
        self.asked: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        query, variables = body.get("query", ""), body.get("variables") or {}
        self.server.asked.append({"query": query, "variables": variables})
        if "viewer" in query:
            data: Any = {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        elif variables.get("project") != "sweeps":
            data = {"project": None}
        elif re.search(r"\bruns\(", query):
            data = {"project": self._page(variables)}
        else:
            run = next(run for run in self.server.runs if run["name"] == variables["name"])
            data = {"project": {"run": {"history": [json.dumps(row) for row in run["rows"]]}}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _page(self, variables: dict[str, Any]) -> dict[str, Any]:
        group = json.loads(variables["filters"]).get("group")
        runs = [run for run in self.server.runs if group in (None, run["group"])]
        first = int(variables["cursor"] or 0)
        edges = [
            {"node": {key: value for key, value in run.items() if key != "rows"}, "cursor": str(first + i + 1)}
            for i, run in enumerate(runs[first : first + PAGE])
        ]
        page = {"endCursor": edges[-1]["cursor"] if edges else None, "hasNextPage": first + PAGE < len(runs)}
        return {"internalId": "1", "runCount": len(runs), "readOnly": False, "runs": {"edges": edges, "pageInfo": page}}

    def log_message(self, *_: object) -> None:
        pass


def run_of(
    cell: dict[str, Any], rows: list[dict[str, Any]], group: str = "first", job: str | None = "cell"
) -> dict[str, Any]:
    """A run as the server has it: values of the config in a mapping of their own, all of it JSON in text."""
    described = ("n_latents", "k", "d_model", "seed", "lr", "architecture", "cell_id", "subject", "site")
    config = {key: {"value": cell[key]} for key in described if key in cell}
    measured = ("nmse", "l0", "dead_fraction", "tokens", "flops", "flops_dense", "wall_s", "status", "error")
    return {
        "id": cell["cell_id"], "name": f"{group}-{cell['cell_id']}", "displayName": cell["cell_id"], "group": group,
        "jobType": job, "state": "finished", "tags": [], "sweepName": None, "commit": None, "readOnly": False,
        "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "description": None, "notes": None,
        "systemMetrics": "{}", "summaryMetrics": json.dumps({key: cell[key] for key in measured}),
        "config": json.dumps(config), "historyLineCount": len(rows), "user": {"name": "me", "username": "me"},
        "historyKeys": None, "projectId": "1",
        "rows": [{"_step": row["step"]} | {name: row[name] for name in row if name not in ("cell_id", "step")}
                 for row in rows],
    }  # fmt: skip


Serve = Callable[[list[dict[str, Any]]], Server]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Serve]:
    servers = []

    def start(runs: list[dict[str, Any]]) -> Server:
        server = Server(runs)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in (
            ("BASE_URL", address), ("API_KEY", KEY), ("CONFIG_DIR", str(tmp_path / "config")), ("SILENT", "true"),
            ("ERROR_REPORTING", "false"),
        ):  # fmt: skip
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def project(evaluations: int = 8, noise: float = 0.003) -> list[dict[str, Any]]:
    cells = _cells((512, 1024, 2048, 4096), (8, 16, 32), noise=noise)
    curves = _curves_of(cells, evaluations=evaluations)
    runs = [run_of(cell, [row for row in curves if row["cell_id"] == cell["cell_id"]]) for cell in cells]
    summary = run_of(cells[0], [], job="summary")
    other = run_of(_cells((64,), (4,))[0], [], group="second")
    failed = run_of(_cells((8192,), (8,))[0] | {"status": "failed", "nmse": None, "error": "NaN in the loss"}, [])
    return [*runs, summary, other, failed]


def test_cells_and_curves_of_a_group(serve: Serve) -> None:
    server = serve(project())
    results, curves, evals = read_project("me/sweeps/first")
    assert len(results) == 12
    assert len(evals) == 0
    assert sorted(set(results["n_latents"])) == [512, 1024, 2048, 4096]
    assert results["subject"][0] == "gpt4"
    assert results.excluded == ("cell 8192x8, N = 8192, k = 8 is failed: NaN in the loss",)
    expected = {cell["cell_id"]: cell["nmse"] for cell in _cells((512, 1024, 2048, 4096), (8, 16, 32), noise=0.003)}
    assert dict(zip(results["cell_id"], results["nmse"], strict=True)) == expected
    assert curves is not None
    assert len(curves) == 12 * 8
    pages = [asked for asked in server.asked if re.search(r"\bruns\(", asked["query"])]
    assert [asked["variables"]["cursor"] for asked in pages] == [None, "7"]
    assert {asked["variables"]["filters"] for asked in pages} == {'{"group": "first"}'}


def test_an_odd_run_costs_no_other(serve: Serve) -> None:
    """Anybody can log anything: what is not a number is missing, and a run without its three numbers is excluded."""
    good = [run_of(cell, []) for cell in _cells((512, 1024), (8, 16))]
    (cell,) = _cells((2048,), (8,))
    rows = [{"step": 1, "tokens": "many", "nmse": 0.5}, {"step": 2, "tokens": 10, "nmse": "low"},
            {"step": 3, "tokens": 20, "flops": {"sparse": 1}, "nmse": 0.5, "lr": "1e-3"}]  # fmt: skip
    odd = [
        run_of(cell | {"cell_id": "typed", "seed": "first", "d_model": 1.5, "lr": [1], "dead_fraction": "5%",
                       "tokens": 2**70, "subject": 7, "architecture": {"name": "topk"}, "error": "\ud800"}, rows),
        run_of(cell | {"cell_id": "other", "status": None}, [], job="train"),
        run_of(cell | {"cell_id": "low", "nmse": "low"}, []),
        run_of(cell | {"cell_id": "nan", "nmse": "NaN", "k": 0}, []),
        run_of(cell | {"cell_id": "auto", "n_latents": "auto", "status": None}, []),
    ]  # fmt: skip
    serve([*good, *odd])
    results, curves, _ = read_project("me/sweeps")
    assert set(results["cell_id"]) == {"512x8", "512x16", "1024x8", "1024x16", "typed", "other"}
    assert results.excluded == (
        "cell low, N = 2048, k = 8 is without a usable nmse",
        "cell nan, N = 2048, k = 0 is without a usable k and nmse",
        "cell auto, k = 8 is without a usable n_latents",
    )
    (typed,) = np.flatnonzero(results["cell_id"] == "typed")
    for name in ("seed", "d_model", "lr", "dead_fraction", "tokens"):
        assert np.isnan(results[name][typed])
    assert (results["subject"][typed], results["architecture"][typed]) == ("7", "{'name': 'topk'}")
    assert curves is not None
    assert (curves["step"].tolist(), curves["lr"].tolist()) == ([3], [1e-3])
    assert np.isnan(curves["flops"]).all()


def test_a_project_that_is_not_there(serve: Serve) -> None:
    serve([])
    with pytest.raises(SaescaleError, match="wandb:me/nothing: Could not find project nothing; check the name"):
        read_project("me/nothing")
    with pytest.raises(SaescaleError, match="no run with n_latents and k in its config"):
        read_project("me/sweeps")
    with pytest.raises(SaescaleError, match="write wandb:entity/project"):
        read_project("a/b/c/d")


def test_fit_from_the_command_line(serve: Serve) -> None:
    serve(project(evaluations=100))
    result = saescale("fit", "wandb:me/sweeps/first", "--law", "n_k", "--bootstraps", "20", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["source"] == "wandb:me/sweeps/first"
    assert document["fits"][0]["points"] == 12
    assert document["tokens_to_convergence"]["exponent_of_n"]["value"] == pytest.approx(0.5, abs=0.1)
    assert_one_line(saescale_here("fit", "wandb:me/nothing"), "wandb:me/nothing", "WANDB_API_KEY")


def test_metrics_are_those_of_the_summaries(serve: Serve, tmp_path: Path) -> None:
    """The laws of a metric from W&B are those of the same numbers in a run directory."""
    cells = _cells((512, 1024, 2048, 4096), (8, 16, 32), noise=0.003)
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results([{"status": "done"} | cell for cell in cells])
    declared = document("downstream_loss", downstream_loss.metrics)
    for cell in cells:
        kl = {"metric": "kl", "value": 2 * cell["nmse"] ** 1.3, "low": 1.9 * cell["nmse"], "high": 2.1 * cell["nmse"]}
        ce = {"metric": "ce", "value": 3 + kl["value"]}
        rows = [kl, ce, {"metric": "ce_original", "value": 3.0}, kl | {"at": "7", "value": 9.0}]
        run.write_evals(cell["cell_id"], "downstream_loss", rows, declared)
        run.write_evals(cell["cell_id"], "mine", [{"metric": "shares", "value": 1 - cell["nmse"]}])
    runs = [run_of(cell, []) for cell in cells]
    for logged, metrics in zip(runs, metrics_of_cells(cells, run.read_evals()), strict=True):
        odd = {"eval/mine": 1, "eval/.kl": 1, "eval/mine.": 1, "eval/other.text": "much"}
        logged["summaryMetrics"] = json.dumps(json.loads(logged["summaryMetrics"]) | metrics | odd)
    server = serve(runs)
    names = ["downstream_loss.kl", "downstream_loss.ce", "mine.shares"]
    asked = ["--bootstraps", "20", "--json", *(word for name in names for word in ("--metric", name))]
    local, online = (
        json.loads(saescale_here("fit", source, *asked).stdout)["metrics"] for source in (run.url, "wandb:me/sweeps")
    )
    assert [entry["metric"] for entry in online] == names
    assert online == local
    assert online[1]["fitted"] == "downstream_loss.ce - downstream_loss.ce_original"
    assert any("was not declared: higher is taken for better" in words for words in online[2]["warnings"])
    pages = [asked for asked in server.asked if re.search(r"\bruns\(", asked["query"])]
    assert len(pages) == 2  # of one reading
    assert_one_line(saescale_here("fit", "wandb:me/sweeps", "--metric", "kl"), "did you mean downstream_loss.kl?")
