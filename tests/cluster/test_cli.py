"""The command line as a user meets it: bad input is one clear line, a non-zero exit, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.ledger import read_status
from storage.activations import ActivationStore
from storage.rundir import RunDirectory
from tests.cluster.test_sweep import without_times
from tests.trainers.synthetic import sparse_rows, write_store

SAESCALE = [sys.executable, "-m", "cluster.cli"]
ROOT = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "COLUMNS": "200"} | extra


def saescale(*arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SAESCALE, *arguments], cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *said: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for phrase in said:
        assert phrase in lines[0], lines[0]


def damage(url: Path, how: str) -> None:
    shard = url / "train-00000.parquet"
    data = shard.read_bytes()
    middle = len(data) // 2
    if how == "truncated":
        shard.write_bytes(data[:middle])
    elif how == "checksum":
        shard.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "missing":
        shard.unlink()
    elif how == "width":
        manifest = json.loads((url / "manifest.json").read_text())
        manifest["d_model"] *= 2
        manifest["mean"] *= 2
        (url / "manifest.json").write_text(json.dumps(manifest))
    elif how == "nan":
        # A shard that some other program wrote, with a manifest that fits it: only reading the values shows it.
        position = data.index(sparse_rows(16_384, seed=0)[9_000].tobytes())
        shard.write_bytes(data[:position] + np.full(1, np.nan, np.float16).tobytes() + data[position + 2 :])
        import xxhash

        manifest = json.loads((url / "manifest.json").read_text())
        manifest["shards"][0]["xxh3"] = xxhash.xxh3_64_hexdigest(shard.read_bytes())
        (url / "manifest.json").write_text(json.dumps(manifest))
    elif how == "empty":
        manifest = json.loads((url / "manifest.json").read_text())
        manifest["shards"] = []
        (url / "manifest.json").write_text(json.dumps(manifest))
    elif how == "unfinished":
        (url / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", ["train-00000.parquet", "bytes"]),
        ("checksum", ["train-00000.parquet", "checksum"]),
        ("missing", ["train-00000.parquet"]),
        ("width", ["train-00000.parquet", "64"]),
        ("nan", ["train-00000.parquet", "row group 8"]),
        ("empty", ["no train"]),
        ("unfinished", ["manifest.json"]),
    ],
)
def test_a_bad_store_is_refused_before_training(
    document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path, how: str, said: list[str]
) -> None:
    url = tmp_path / "store"
    write_store(str(url), sparse_rows(16_384, seed=0), sparse_rows(2_048, seed=1))
    damage(url, how)
    document["store"] = str(url)
    assert_one_line(saescale("sweep", sweep_file(document)), *said)
    assert not Path(document["out"]).exists()


def test_bad_sweep_files(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    document["grid"]["n_latents"] = [0]
    document["grids"] = 1
    result = saescale("sweep", sweep_file(document))
    assert_one_line(result, "grid.n_latents.0", "grids is not a key, did you mean grid?")
    assert not Path(document["out"]).exists()


def test_unknown_subject(tmp_path: Path) -> None:
    result = saescale("harvest", "smollm-135m", "--layer", "3", "--out", str(tmp_path / "store"))
    assert_one_line(result, "unknown subject 'smollm-135m'", "did you mean 'smollm2-135m'?")
    assert not (tmp_path / "store").exists()


def test_no_network_for_the_first_download(tmp_path: Path) -> None:
    result = saescale(
        "quickstart", "--tiny", "--wandb", "off", cwd=tmp_path, SAESCALE_CACHE=str(tmp_path / "cache"),
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_RETRIES="0",
        PIP_CONFIG_FILE=os.devnull,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "SAESCALE_CACHE" in result.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_full_disk_stops_with_one_line_and_goes_on_when_there_is_room(
    document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        # Without the right to mount: a limit on the size of files fails the same write in the same place.
        import resource

        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))  # noqa: E731
    else:
        limit = lambda: None  # noqa: E731
    document |= {"out": str(small / "run"), "grid": {"n_latents": [128, 512], "k": [2, 4]}}
    try:
        result = subprocess.run(
            [*SAESCALE, "sweep", sweep_file(document)], env=environment(), capture_output=True, text=True,
            timeout=300, preexec_fn=limit,
        )  # fmt: skip
        assert result.returncode == 2, result.stdout + result.stderr
        assert "disk full" in result.stderr or "while writing" in result.stderr
        assert str(small) in result.stderr
        assert not list(small.rglob("*.tmp*"))
        if not mounted.returncode:
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        result = saescale("sweep", sweep_file(document))
        assert result.returncode == 0, result.stderr
        assert {row["status"] for row in read_status(document["out"])} == {"done"}
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_ends_early_goes_on_where_it_was(
    document: dict[str, Any], sweep_file: Callable[[Any], str], store: ActivationStore, kill: signal.Signals
) -> None:
    document["train"]["tokens"] = 65_536
    file = sweep_file(document)
    process = subprocess.Popen(
        [*SAESCALE, "sweep", file], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run, deadline = Path(document["out"]), time.monotonic() + 200
    while not list(run.glob("cells/*/checkpoint/latest.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=120)
    if kill != signal.SIGKILL:
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1] == "interrupted; run the same command again to go on from here"
    assert {row["status"] for row in read_status(document["out"])} & {"started", "done"}

    result = saescale("sweep", file)
    assert result.returncode == 0, result.stderr
    assert "9 cells" in result.stdout
    disturbed = RunDirectory(document["out"])
    document["out"] += "-whole"
    assert saescale("sweep", sweep_file(document)).returncode == 0
    whole = RunDirectory(document["out"])
    assert without_times(disturbed.read_results().to_pylist()) == without_times(whole.read_results().to_pylist())


def test_fit_report_status_and_inspect(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    out = document["out"]
    assert saescale("sweep", sweep_file(document)).returncode == 0
    shown = saescale("fit", out, "--law", "n_k", "--json", "--bootstraps", "20")
    fits = json.loads(shown.stdout)
    assert [fit["law"] for fit in fits["fits"]] == ["n_k"]
    assert set(fits["fits"][0]["exponent_of_n_at_k"]) == {"2", "4", "8"}
    assert json.loads((Path(out) / "fits.json").read_text())["format"] == 1

    table = Path(out) / "results.parquet"
    assert saescale("fit", str(table), "--law", "n_k", "--bootstraps", "20").returncode == 0
    assert len(json.loads(saescale("status", out, "--json").stdout)) == 9
    assert "9 done" in saescale("status", out).stdout
    (Path(out) / "report.html").unlink()
    assert saescale("report", out, "--bootstraps", "20").returncode == 0
    assert "<img" in (Path(out) / "report.html").read_text()
    cell = next((Path(out) / "cells").iterdir())
    for url, said in ((out, "9 done"), (document["store"], "16,384 train"), (str(cell), "TopK, n_latents")):
        result = saescale("inspect", url)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
    assert "checksums" in saescale("inspect", document["store"], "--verify").stdout
    assert_one_line(saescale("inspect", str(Path(out) / "cells")), "no activation store")
    assert_one_line(saescale("fit", str(Path(out) / "nothing.csv")), "nothing.csv")
    assert_one_line(saescale("status", str(Path(out) / "cells")), "not a run directory")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = saescale("--debug", "inspect", str(tmp_path))
    assert result.returncode == 2
    assert "Traceback" in result.stderr
