"""The summary run and the workspace, by the real client against a server on loopback: what it received is asserted."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import Logged, WandbSettings, log_summary
from tests.trainers.wandb_case import (
    CONTEXT,
    FITS,
    KEY,
    OFFLINE,
    RESULTS,
    bare_machine,
    cell,
    messages,
    row,
    server,
    train,
    wait_for,
)  # fmt: skip
from tests.trainers.wandb_server import WandbServer

__all__ = ["bare_machine", "server"]  # fixtures

ONLINE = WandbSettings(entity="me")
SUMMARY = wandb_client.run_id("summary", "sweep")
PLOTLY = {"data": [{"type": "scatter", "x": [512, 1024], "y": [0.4, 0.3], "meta": {"k": 8}}], "layout": {"height": 440}}


@pytest.fixture
def figures() -> dict[str, bytes]:
    """An interactive figure with its files, and one that is a picture only."""
    picture = io.BytesIO()
    matplotlib.image.imsave(picture, np.zeros((4, 4, 3)), format="png")
    pictures = {name: picture.getvalue() for name in ("nmse_against_n.png", "dead_fraction.png")}
    return {"nmse_against_n.json": json.dumps(PLOTLY).encode(), "nmse_against_n.pdf": b"%PDF-1.4"} | pictures


def summarise(settings: WandbSettings, figures: dict[str, bytes], directory: Path) -> Logged:
    return log_summary(settings, "sweep", CONTEXT, {**FITS, "source": "s3://me:hush@b/x"}, RESULTS, figures,
                       str(directory))  # fmt: skip


def check_summary(server: WandbServer) -> None:
    """The summary but for its artifact is on the server, and no secret."""
    opened = server.runs()[SUMMARY]
    assert (opened["groupName"], opened["jobType"], opened["displayName"]) == ("sweep", "summary", "sweep summary")
    assert server.config(SUMMARY)["laws"] == {"n_k": "L = ...", "c": "L = a C^b"}
    assert server.config(SUMMARY)["store"] == "s3://***@bucket/store"

    logged: dict[str, Any] = {}
    for line in server.streamed(SUMMARY, "wandb-history.jsonl"):
        logged |= line
    assert logged["figures/nmse_against_n"]["_type"] == "plotly-file"
    assert logged["figures/dead_fraction"]["_type"] == "image-file"
    interactive = json.loads(server.files[f"{SUMMARY}/{logged['figures/nmse_against_n']['path']}"])
    assert interactive["data"][0]["y"] == [0.4, 0.3]
    assert interactive["data"][0]["meta"] == {"k": 8}
    assert logged["coefficients"]["_type"] == logged["results"]["_type"] == "table-file"
    table = json.loads(server.files[f"{SUMMARY}/{logged['coefficients']['path']}"])
    assert table["columns"] == ["law", "coefficient", "value", "low", "high"]
    assert table["data"][0] == ["n_k", "alpha", -0.5, -0.6, -0.4]
    numbers = json.loads(server.files[f"{SUMMARY}/wandb-summary.json"])
    assert numbers["n_k/alpha/value"] == -0.5
    assert numbers["c/b/low"] == -0.2

    everything = json.dumps(server.received).encode() + b"".join(server.files.values())
    assert b"hush" not in everything
    assert KEY.encode() not in everything


def check_artifact(server: WandbServer) -> None:
    """The artifact is on the server, whole and committed."""
    created = {v["input"]["artifactCollectionName"]: v["input"] for v in server.asked("CreateArtifact")}
    assert created["fits-sweep"]["artifactTypeName"] == "fits"
    (artifact,) = {name.split("/")[0] for name in server.files if name.endswith("/fits.json")}
    assert artifact in {v["artifactID"] for v in server.asked("CommitArtifact")}
    assert json.loads(server.files[f"{artifact}/fits.json"])["fits"] == FITS["fits"]
    held = pq.read_table(io.BytesIO(server.files[f"{artifact}/results.parquet"]))
    assert held["cell_id"].to_pylist() == ["a", "b"]
    assert server.files[f"{artifact}/figures/nmse_against_n.pdf"] == b"%PDF-1.4"


def test_online(
    server: WandbServer, figures: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found: list[Logged] = []
    assert messages(lambda: found.append(summarise(ONLINE, figures, tmp_path))) == []
    check_summary(server)
    check_artifact(server)
    assert server.exit_codes(SUMMARY) == [0]
    assert (found[0].mode, found[0].whole) == ("online", True)
    assert found[0].url is not None
    assert "/me/saescale/groups/sweep" in found[0].url
    assert capfd.readouterr() == ("", "")


def test_workspace(server: WandbServer, figures: dict[str, bytes], tmp_path: Path) -> None:
    url = summarise(ONLINE, figures, tmp_path).url
    (view,) = server.views.values()
    assert url is not None
    assert f"?nw={view['name'].removeprefix('nw-').removesuffix('-v')}" in url
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "saescale", "sweep: scaling")
    spec = json.loads(view["spec"])["section"]
    (runs,) = spec["runSets"]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in runs["filters"]["filters"]] == [("group", "=", "sweep")]
    assert [key["name"] for key in runs["grouping"]] == ["k.value", "n_latents.value"]
    sections = {s["name"]: [p["config"] for p in s["panels"]] for s in spec["panelBankConfig"]["sections"]}
    assert list(sections) == ["Laws", "nmse", "Latents", "Throughput"]
    first = sections["nmse"][0]
    assert (first["xAxis"], first["metrics"], first["xLogScale"], first["yLogScale"]) == ("flops", ["nmse"], True, True)
    shown = {name: {m for panel in sections[name] for m in panel["metrics"]} for name in ("Latents", "Throughput")}
    assert shown == {"Latents": {"l0", "dead_fraction", "dead_fraction_long"}, "Throughput": {"tokens_per_s", "lr"}}
    assert {key for p in sections["Laws"] for key in p["mediaKeys"]} == {
        "figures/nmse_against_n",
        "figures/dead_fraction",
    }

    # What its readers made of it stays, whatever is analysed again.
    view["displayName"] = "mine"
    assert summarise(ONLINE, figures, tmp_path).url == url
    assert [v["displayName"] for v in server.views.values()] == ["mine"]


def test_architectures_have_the_colours_of_the_figures(
    server: WandbServer, figures: dict[str, bytes], tmp_path: Path
) -> None:
    """As groups, and each run by itself; and their comparison is a table."""
    rows = [entry | {"architecture": "topk"} for entry in RESULTS.to_pylist()]
    rows += [entry | {"cell_id": f"{entry['cell_id']}-relu", "architecture": "relu"} for entry in rows]
    results = pa.Table.from_pylist(rows)
    value = {"value": 0.4, "low": 0.3, "high": None, "l0": 8.0}
    point = {"n_latents": 512.0, "k": 8.0, "leader": "topk", "not_told_apart": [], "nmse": {"topk": value}}
    fits = FITS | {
        "comparison": [{"of": {"site": "resid_post.2"}, "architectures": ["topk", "relu"], "equal_l0": [point]}]
    }
    colours = {"topk": "#1b4f9c", "relu": "#9c1230"}
    log_summary(ONLINE, "sweep", CONTEXT, fits, results, figures, str(tmp_path), colours)
    (view,) = server.views.values()
    (runs,) = json.loads(view["spec"])["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["architecture.value", "k.value", "n_latents.value"]
    shown = json.loads(view["spec"])["section"]["customRunColors"]
    for entry in rows:
        assert shown[wandb_client.run_id(entry["cell_id"], "sweep")] == colours[entry["architecture"]]
    assert set(colours.values()) == set(shown.values())
    assert len(shown) == len(rows) + len(colours)
    logged = {key: entry for line in server.streamed(SUMMARY, "wandb-history.jsonl") for key, entry in line.items()}
    table = json.loads(server.files[f"{SUMMARY}/{logged['comparison']['path']}"])
    assert table["columns"] == ["of", "n_latents", "k", "architecture", "nmse", "low", "high", "l0"]
    assert table["data"] == [["resid_post.2", 512, 8, "topk", 0.4, 0.3, None, 8]]


def test_without_the_package_of_workspaces(
    server: WandbServer, figures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    (said,) = messages(lambda: summarise(ONLINE, figures, tmp_path))
    assert "pip install 'saescale[workspaces]'" in said
    assert server.views == {}
    check_summary(server)
    check_artifact(server)


def test_a_server_without_views_costs_a_warning(server: WandbServer, figures: dict[str, bytes], tmp_path: Path) -> None:
    server.answers_views = False
    (said,) = messages(lambda: summarise(ONLINE, figures, tmp_path))
    assert "no workspace view is made" in said
    check_summary(server)
    check_artifact(server)


def test_offline_then_sync(server: WandbServer, figures: dict[str, bytes], tmp_path: Path) -> None:
    cells = [cell(16), cell(32)]
    assert messages(lambda: train(OFFLINE, tmp_path, cells)) == []
    assert messages(lambda: summarise(OFFLINE, figures, tmp_path)) == []
    assert server.received == []
    folders = map(str, (tmp_path / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", "--entity", "me", "--project", "saescale", *folders]
    subprocess.run(command, check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    check_summary(server)
    check_artifact(server)
    for c in cells:
        run = wandb_client.run_id(c.cell_id, "sweep")
        assert server.runs()[run]["groupName"] == "sweep"
        assert server.config(run)["n_latents"] == c.n_latents
        (line,) = server.streamed(run, "wandb-history.jsonl")
        expected = {name: value for name, value in row(1)._asdict().items() if value is not None}
        assert line["_step"] == expected.pop("step")
        assert {name: line[name] for name in expected} == expected
        assert server.exit_codes(run) == [0]


def test_a_server_that_takes_no_more_files(
    server: WandbServer, figures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way: runs are opened, then uploads fail. The sweep goes on, is told, and can send the rest later."""
    monkeypatch.setattr(wandb_client, "FINISH_TIMEOUT", 3.0)
    server.refuse = lambda path: path.startswith("/up/")
    found: list[Logged] = []
    said = messages(lambda: found.append(summarise(ONLINE, figures, tmp_path)))
    assert found == [Logged("online", None, False)]
    assert SUMMARY in server.runs()
    (told,) = said
    assert "the summary of sweep is not uploaded to its end" in told
    command = shlex.split(told.split("`")[1])
    assert command[:2] == ["wandb", "sync"]

    server.refuse = lambda path: False
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=180, stderr=subprocess.DEVNULL)
    check_summary(server)
    assert "but for its artifact" in told


def test_a_server_that_fails_while_cells_train(server: WandbServer, tmp_path: Path) -> None:
    """In a process of its own: runs that cannot be ended go on trying until it ends."""
    fields = [cell(n).model_dump() for n in (16, 32)]
    script = f"""
from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import *
from saescale.storage.columns import CurveRow
from saescale.trainers.cell import Cell
wandb_client.FINISH_TIMEOUT = 3.0
cells = [Cell(**fields) for fields in {fields!r}]
logger = WandbLogger(WandbSettings(entity="me"), "sweep", {str(tmp_path)!r})
logger.open(cells, {{}})
for cell in cells:
    logger.log(cell, CurveRow(*{tuple(row(1, nmse=0.5))!r}))
input()
for cell in cells:
    logger.log(cell, CurveRow(*{tuple(row(2, nmse=0.25))!r}))
    logger.finish(cell, {{"status": "done"}})
logger.close()
print("the sweep goes on")
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "always", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(server.runs()) == 2, process)
        server.refuse = lambda path: True
        shown, said = process.communicate("\n", timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "the sweep goes on" in shown
    (told,) = [line for line in said.splitlines() if "W&B: " in line]
    assert "is not uploaded to its end" in told
    # All of it is on disk, in the folder that the warning names.
    folder = shlex.split(told.split("`")[1])[-1]
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
    lines = subprocess.run(read, capture_output=True, text=True, check=True, timeout=180).stdout.splitlines()
    history = [r["history"]["item"] for r in map(json.loads, lines) if r["type"] == "history"]
    assert [line["nmse"] for line in history] == [0.5, 0.25]
