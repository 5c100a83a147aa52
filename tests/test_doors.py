"""Each door proves itself: the examples of the rooms' pages, one file each, harvested, swept, measured and fitted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from saescale.cluster.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [
    "trainers/architectures", "trainers/subjects", "trainers/tasks", "trainers/evals", "trainers/exchange",
    "scaling/laws",
]  # fmt: skip
LINES = 60
_BLOCK = re.compile(r"^```python\n(# (\w+)/toy\.py\n.*?)^```$", re.DOTALL | re.MULTILINE)


def example(page: str) -> tuple[str, str]:
    """The room and the text of the page's example."""
    found = _BLOCK.findall((ROOT / page / "README.md").read_text())
    assert len(found) == 1, f"{page}/README.md has {len(found)} examples that begin with `# <room>/toy.py`"
    return found[0][1], found[0][0]


@pytest.mark.parametrize("page", PAGES)
def test_an_example_is_one_short_file(page: str) -> None:
    _, text = example(page)
    assert len(text.splitlines()) < LINES


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all examples in their rooms, in SAESCALE_PATH; the test runs in another one."""
    for page in PAGES:
        room, text = example(page)
        (tmp_path / "mine" / room).mkdir(parents=True)
        (tmp_path / "mine" / room / "toy.py").write_text(text)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "mine"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    """What the command prints; it has to succeed."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def same_sae(*paths: str) -> bool:
    """Whether the files hold the same cell and the same bits; safetensors writes a header's keys in any order."""
    found = []
    for path in paths:
        data = Path(path).read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        found.append((json.loads(data[8:length]), data[length:]))
    return all(one == found[0] for one in found)


@pytest.mark.slow
def test_toys_of_every_kind_are_harvested_swept_measured_exchanged_and_fitted(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("harvest", "toy", "--layer", "0", "--tokens", "4096", "--heldout-tokens", "1000", "--out", "store")
    assert "5,096 rows of toy" in said
    sweep = {
        "name": "toys",
        "store": "store",
        "out": "run",
        # A fit takes the architecture of most cells: that has to be the toy.
        "grid": {
            "n_latents": [16, 24, 32, 48, 64], "k": [2, 4], "architecture": ["toy"],
            "cells": [{"n_latents": 16, "k": 2, "architecture": "topk"}],
        },
        "train": {
            "tokens": 2048, "batch_tokens": 128, "lr": 3e-3, "ema": 0.9, "precision": "fp32",
            "auxk": {"k": 8, "dead_after_tokens": 1024},
        },
        "eval": {"tokens": 512, "every_tokens": 512},
        "resources": {"workers": 1},
        "wandb": {"mode": "off"},
    }  # fmt: skip
    (toys / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    # In a process of its own, whose Ray and workers have SAESCALE_PATH.
    command = [sys.executable, "-m", "saescale.cluster.cli", "sweep", "sweep.yaml", "--bootstraps", "0"]
    subprocess.run(command, env=os.environ | {"RAY_ADDRESS": ""}, check=True, timeout=500)
    results = pq.read_table("run/results.parquet").to_pylist()
    assert len(results) == 11
    assert {row["status"] for row in results} == {"done"}
    assert {row["architecture"] for row in results} == {"topk", "toy"}

    said = run("eval", "run", "--evals", "toy")
    assert "11 measured, 0 were there, 0 failed" in said
    rows = pq.read_table("run/evals.parquet").to_pylist()
    assert {row["evaluation"] for row in rows} == {"core", "toy"}  # the sweep measures core
    rows = [row for row in rows if row["evaluation"] == "toy"]
    assert {row["cell_id"] for row in rows} == {row["cell_id"] for row in results}
    assert "ahead" in {row["at"] for row in rows}  # the subject's label
    assert "0 measured, 11 were there, 0 failed" in run("eval", "run", "--evals", "toy")

    cell = next(row["cell_id"] for row in results if row["architecture"] == "toy")
    run("export", f"run/cells/{cell}", "--format", "toy", "--out", "sae.toy")
    run("import", "sae.toy", "--format", "toy", "--out", "again/sae.safetensors")
    assert same_sae("again/sae.safetensors", f"run/cells/{cell}/sae.safetensors")

    document = json.loads(run("fit", "run", "--law", "toy", "--bootstraps", "20", "--json"))
    assert {entry["law"] for entry in document["fits"]} == {"toy"}
    assert document["cells"] == 11
    assert {entry["of"]["architecture"] for entry in document["fits"]} == {"toy"}
    assert "topk" in {entry["of"]["architecture"] for entry in document["skipped"]}
    # The sweep has painted its pictures.
    monkeypatch.setattr("saescale.scaling.figures.paper.draw", lambda view: {"png": b"", "pdf": b"", "svg": b"<svg/>"})
    run("report", "run", "--bootstraps", "0")
    assert Path("run/report.html").stat().st_size > 10_000
