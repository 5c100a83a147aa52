"""The Slurm script on two nodes that are processes of this machine: srun and scontrol are stand-ins that do what those
of Slurm do as far as the script goes, everything else is real."""

import contextlib
import glob
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from saescale.storage.lease import read_driver
from tests.cluster.command import ROOT

# Starts the command once for each node, with its number, and ends them all when it is told to.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
number = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--nodes="))
command = sys.argv[sys.argv.index("bash"):]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(task), "SLURM_GPUS_ON_NODE": "1"}})
    for task in range(number)
]
def end(*_):
    for task in tasks:
        task.terminate()
signal.signal(signal.SIGTERM, end)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[1-2]" ]] || exit 1
echo 127.0.0.1; echo 127.0.0.2
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts the script as Slurm would, for a sweep file."""
    programs = tmp_path / "programs"
    programs.mkdir()
    script = f'#!/bin/bash\nexec {sys.executable} -P -m saescale.cluster.cli "$@"\n'
    ray = f'#!/bin/bash\nexec {sys.executable} -P -m ray.scripts.scripts "$@"\n'
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "saescale": script, "ray": ray, "python": python}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    environment |= {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": _job(),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1",
        "RAY_object_store_memory": str(80 * 2**20),
    }  # fmt: skip
    started: list[subprocess.Popen[str]] = []

    def start(sweep: str) -> "subprocess.Popen[str]":
        with (tmp_path / "out").open("w") as out:
            started.append(
                subprocess.Popen(
                    ["bash", str(ROOT / "deploy" / "slurm.sh"), sweep], env=environment, stdout=out, stderr=out,
                    text=True, cwd=tmp_path,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _job() -> str:
    """The id of a job whose three ports are free, and none that the system gives to connections."""
    for number in range(1_000, 2_000):
        ports = range(20_000 + 3 * number, 20_003 + 3 * number)
        if all(_free(port) for port in ports):
            return str(number)
    raise AssertionError("no port")


def _free(port: int) -> bool:
    with socket.socket() as tried:
        return bool(tried.connect_ex(("127.0.0.1", port)))


def ours(folder: str) -> list[str]:
    """Command lines of processes that the script started: their environment has its programs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"{folder}/programs" in process.environ().get("PATH", ""):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
def test_a_sweep_on_two_nodes_of_slurm(
    slurm: Callable[[str], "subprocess.Popen[str]"], document: dict[str, Any],
    sweep_file: Callable[[dict[str, Any]], str], tmp_path: Path,
) -> None:  # fmt: skip
    """Both nodes train; the signal before the time is up saves, and nothing that the script started is left."""
    document["grid"] = {"n_latents": [64], "k": [4]}
    document["train"] |= {"tokens": 16_384 * 4_000, "batch_tokens": [256, 512]}
    document["eval"]["every_tokens"] = 16_384 * 100
    document["resources"] = {"workers": 2, "gpus_per_worker": 1, "checkpoint_every_s": 600.0}
    process, run, said = slurm(sweep_file(document)), document["out"], tmp_path / "out"
    until = time.monotonic() + 240
    while not (driver := read_driver(run)) or len(driver.standing.running) < 2:
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.5)
    assert len({cell.worker for cell in driver.standing.running}) == 2
    job = re.search(r"/tmp/ray-(\d+)-", " ".join(ours(str(tmp_path))))
    signalled = time.time()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) not in (0, None)
    cells = list(Path(run).glob("cells/*"))
    assert len(cells) == 2
    for cell in cells:
        assert max(path.stat().st_mtime for path in cell.glob("checkpoint/*")) >= signalled, said.read_text()
    until = time.monotonic() + 30  # helpers of Ray's dashboard take a moment
    while ours(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.5)
    assert ours(str(tmp_path)) == []
    assert job is None or not glob.glob(f"/tmp/ray-{job[1]}-*")
