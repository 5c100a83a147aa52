"""The command line as a user meets it: bad input is one clear line, a non-zero exit, and nothing half-written."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.cluster.front.laws import fit
from saescale.cluster.front.plan import plan
from saescale.cluster.front.quickstart import run_quickstart
from saescale.cluster.front.stores import harvest
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.cluster.sweep.status import read_status
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import read_driver
from tests.cluster.command import SAESCALE, assert_one_line, environment, interruptible, saescale, saescale_here
from tests.cluster.conftest import Recorder
from tests.trainers.synthetic import sparse_rows, write_store


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
        ("empty", ["is empty"]),
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
    assert_one_line(saescale_here("sweep", sweep_file(document)), *said)
    assert not Path(document["out"]).exists()


def test_bad_sweep_files(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    document["grid"]["n_latents"] = [0]
    document["grids"] = 1
    result = saescale_here("sweep", sweep_file(document))
    assert_one_line(result, "grid.n_latents.0", "grids is not a key, did you mean grid?")
    assert not Path(document["out"]).exists()


def test_fewer_than_no_bootstraps(sweep_file: Callable[[Any], str], document: dict[str, Any]) -> None:
    for command in (("sweep", sweep_file(document)), ("report", document["out"]), ("fit", document["out"])):
        result = saescale_here(*command, "--bootstraps", "-1")
        assert result.returncode == 2
        assert "Invalid value for '--bootstraps'" in result.stderr


def test_unknown_subject(tmp_path: Path) -> None:
    result = saescale_here("harvest", "smollm-135m", "--layer", "3", "--out", str(tmp_path / "store"))
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


def test_a_cluster_that_is_not_there_is_one_line_at_once(
    document: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    result = saescale("sweep", sweep_file(document), "--address", "127.0.0.1:9")
    assert_one_line(result, "could not reach the Ray cluster at 127.0.0.1:9: Connection refused")
    assert not Path(document["out"]).exists()


@pytest.mark.parametrize("out", ["s3://no-such-bucket/run", "/proc/run", "{}/file"])
def test_where_nothing_can_be_written_is_found_before_anything_is_done(
    document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path, s3_endpoint: str, out: str
) -> None:
    (tmp_path / "file").write_text("")
    out = out.format(tmp_path)
    said = "there is no bucket no-such-bucket" if "://" in out else f"cannot write to {out}"
    file, run = sweep_file(document | {"out": out}), str(tmp_path / "no-run")
    nowhere = ("--address", "127.0.0.1:9")  # which would be found next
    for command in (
        ("sweep", file, *nowhere), ("submit", file, *nowhere), ("quickstart", "--out", out), ("report", out),
        ("fit", run, "--out", out), ("plan", "--write", f"{out}/more.yaml"),
    ):  # fmt: skip
        result = saescale_here(*command)
        assert_one_line(result, said)
        assert "·" not in result.stdout  # nor was anything begun


def test_what_would_end_with_the_command_is_refused(document: dict[str, Any]) -> None:
    gone = "memory://gone"
    spec = parse_spec(document | {"out": gone}, "test")
    for command in (
        lambda: harvest("maze", gone, layer=0),
        lambda: fit(["nothing.csv"], out=gone),
        lambda: plan(write=f"{gone}/more.yaml"),
        lambda: run_sweep(spec, Recorder()),
        lambda: run_quickstart("tiny", gone, "off", Recorder()),  # type: ignore[arg-type]
    ):
        with pytest.raises(SaescaleError, match=r"memory://gone.* is the memory of one process and ends with it"):
            command()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small disk; tests/storage simulates one in any case")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_goes_on_when_there_is_room(
    three_nodes: Any, document: dict[str, Any], sweep_file: Callable[[Any], str], small_disk: Path
) -> None:
    document |= {"out": str(small_disk / "run"), "grid": {"n_latents": [128, 512], "k": [2, 4]}}
    assert_one_line(saescale_here("sweep", sweep_file(document)), f"error: disk full while writing {small_disk}")
    assert not list(small_disk.rglob(".*.partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = saescale_here("sweep", sweep_file(document))
    assert result.returncode == 0, result.stderr
    assert {cell.status for cell in read_status(document["out"]).cells} == {"done"}


@pytest.mark.parametrize("end", ["ctrl-c", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_driver_that_is_asked_to_end_saves_what_it_has(
    three_nodes: Any, document: dict[str, Any], sweep_file: Callable[[Any], str], end: str
) -> None:
    """That it goes on to the same results is held by test_survival.py, where drivers get no time to save anything."""
    document["train"]["tokens"] = 2**30  # it will not be done before it is interrupted
    document["resources"] = {"workers": 1 if end == "ctrl-c" else 2, "checkpoint_every_s": 600}
    process = subprocess.Popen(
        [*SAESCALE, "sweep", sweep_file(document)],
        env=environment(RAY_ADDRESS=three_nodes.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    while not (driver := read_driver(document["out"])) or not driver.standing.workers:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    if end == "ctrl-c":  # a terminal sends it to the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines() == ["interrupted; run the same command again to go on from here"]
    assert "started" in {cell.status for cell in read_status(document["out"]).cells}
    ended = read_driver(document["out"])
    assert ended is not None
    assert ended.state == "stopped"


def test_fit_report_status_and_inspect(
    three_nodes: Any, document: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    out, document["resources"]["workers"] = document["out"], 1
    assert saescale_here("sweep", sweep_file(document), "--bootstraps", "20").returncode == 0
    shown = saescale("fit", out, "--law", "n_k", "--json", "--bootstraps", "20")
    fits = json.loads(shown.stdout)
    assert [fit["law"] for fit in fits["fits"]] == ["n_k"]
    assert set(fits["fits"][0]["exponent_of_n_at_k"]) == {"2", "4", "8"}
    assert json.loads((Path(out) / "fits.json").read_text())["format"] == 1

    table = Path(out) / "results.parquet"
    assert saescale_here("fit", str(table), "--law", "n_k", "--bootstraps", "20").returncode == 0
    assert len(json.loads(saescale_here("status", out, "--json").stdout)["cells"]) == 9
    assert "9 of 9 cells done" in saescale_here("status", out).stdout
    (Path(out) / "report.html").unlink()
    assert saescale("report", out, "--bootstraps", "20", "--format", "html", "--format", "md").returncode == 0
    assert "<img" in (Path(out) / "report.html").read_text()
    assert "figures/nmse_against_n.png" in (Path(out) / "report.md").read_text()
    assert {p.suffix for p in (Path(out) / "figures").glob("nmse_against_n.*")} == {".png", ".pdf", ".svg", ".json"}
    unknown = saescale_here("report", out, "--format", "docx")
    assert unknown.returncode == 2
    assert "--format docx: there are html and md" in unknown.stderr
    cell = next((Path(out) / "cells").iterdir())
    for url, said in ((out, "9 done"), (document["store"], "16,384 train"), (str(cell), "topk, n_latents")):
        result = saescale_here("inspect", url)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
    assert "checksums" in saescale_here("inspect", document["store"], "--verify").stdout
    assert_one_line(saescale_here("inspect", str(Path(out) / "cells")), "no activation store")
    assert_one_line(saescale_here("fit", str(Path(out) / "nothing.csv")), "nothing.csv")
    for command in ("status", "report"):
        assert_one_line(saescale_here(command, str(Path(out) / "cells")), "not a run directory")
    few = Path(out) / "few.csv"
    few.write_text("n_latents,k,nmse\n64,2,0.5\n128,2,0.4\n")
    assert_one_line(saescale_here("fit", str(few), "--law", "n_k"), "2 points for 6 coefficients")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = saescale_here("--debug", "inspect", str(tmp_path))
    assert result.returncode == 2
    assert "Traceback" in result.stderr
