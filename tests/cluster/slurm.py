"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own, which run jobs
as whoever started them. Debian: apt-get install slurmctld slurmd slurm-client munge (3 MB)."""

import contextlib
import glob
import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.cluster.command import ROOT

NODES = ("127.0.0.1", "127.0.0.2")  # names that are addresses need nobody who knows them
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
_PATIENCE = 60.0
_JOBS = 4  # that one Slurm is given at most

# A node that is silent for ten seconds is down. The one GPU of each is a fake.
_CONFIGURATION = """
ClusterName=saescale
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/control.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
GresTypes=gpu
ReturnToService=2
MpiDefault=none
FirstJobId={job}
NodeName={nodes[0]} NodeHostname=localhost NodeAddr={nodes[0]} Port={ports[0]} CPUs={cpus} RealMemory=8000 Gres=gpu:1
NodeName={nodes[1]} NodeHostname=localhost NodeAddr={nodes[1]} Port={ports[1]} CPUs={cpus} RealMemory=8000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(NamedTuple):
    """`folder`: below it all that is Slurm's, and an environment to name in a job. Jobs count from `first_job`."""

    folder: Path
    first_job: int
    daemons: dict[str, "subprocess.Popen[bytes]"]
    environment: Mapping[str, str]

    def call(self, *command: str) -> str:
        """One of Slurm's commands; what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=_PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))

    def processes(self, job: str, node: str | None = None) -> list[psutil.Process]:
        """Of a job, all or those on one node, by what Slurm puts into their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                has = process.environ()
                own = has.get("SLURM_JOB_ID") == job and has.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if own and node in (None, has.get("SLURMD_NODENAME")):
                    found.append(process)
        return found

    def power_off(self, node: str, job: str) -> None:
        """Its slurmd and all that a job has there, at once."""
        self.daemons[node].kill()
        own = self.processes(job, node)
        stewards = {parent for process in own if (parent := process.parent()) and parent.name() == "slurmstepd"}
        for process in [*stewards, *own]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def require_slurm() -> None:
    """Without it a test is skipped on a developer's machine and fails in CI, which installs it."""
    if lacking := [name for name in _PROGRAMS if shutil.which(name) is None]:
        missing = f"no {lacking[0]} on this machine (Debian: apt-get install slurmctld slurmd slurm-client munge)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """Ends what it started, and what the jobs left."""
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: sockets lie below it
    folder.chmod(0o755)  # munged asks for that
    first = _first_job()
    _write(folder, first)
    slurm = Slurm(folder, first, {}, _environment(folder))
    commands = {"munged": _munged(folder), "slurmctld": ["slurmctld", "-D"]}
    commands |= {node: ["slurmd", "-D", "-N", node] for node in NODES}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                slurm.daemons[name] = subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log)
        _wait_for_nodes(slurm)
        yield slurm
    finally:
        _end(slurm)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, first_job: int) -> None:
    control, *ports = _free(3)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    user, cpus = pwd.getpwuid(os.getuid()).pw_name, os.cpu_count()
    text = _CONFIGURATION.format(
        folder=folder, user=user, control=control, ports=ports, cpus=cpus, nodes=NODES, job=first_job
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("")
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in {
        "saescale": "-P -m saescale.cluster.cli",
        "ray": "-P -m ray.scripts.scripts",
        "python": "",
    }.items():
        (programs / name).write_text(f'#!/bin/bash\nexec {sys.executable} {module} "$@"\n')
        (programs / name).chmod(0o755)


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    sbin = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": sbin, "PYTHONPATH": str(ROOT)}


def _munged(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    return ["munged", "--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in files.items())]


def _wait_for_nodes(slurm: Slurm) -> None:
    until = time.monotonic() + _PATIENCE
    command = ["sinfo", "--noheader", "--format=%D %t"]
    while True:
        found = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=_PATIENCE)
        if found.stdout.split() == [str(len(NODES)), "idle"]:
            return
        logs = "\n".join(path.read_text() for path in slurm.folder.glob("*.log"))
        assert time.monotonic() < until, f"{found.stdout}{found.stderr}{logs}"
        time.sleep(0.2)


def _end(slurm: Slurm) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=slurm.environment, timeout=20)
    for name in reversed(slurm.daemons):
        slurm.daemons[name].terminate()
    for daemon in slurm.daemons.values():
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == slurm.environment["SLURM_CONF"]:
                process.kill()
    for job in range(slurm.first_job, slurm.first_job + _JOBS):
        for left in glob.glob(f"/tmp/ray-{job}-*"):  # of nodes without power
            shutil.rmtree(left, ignore_errors=True)


def _first_job() -> int:
    """Whose three ports of slurm.sh are free, and those of the next jobs."""
    for job in random.SystemRandom().sample(range(1_000, 3_900), 100):
        if all(_is_free(port) for port in range(20_000 + 3 * job, 20_000 + 3 * (job + _JOBS))):
            return job
    raise AssertionError("no ports")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        return bool(tried.connect_ex(("127.0.0.1", port)))


def _free(count: int) -> list[int]:
    """Below those that connections take."""
    ports = random.SystemRandom().sample(range(15_000, 20_000), 200)
    return [port for port in ports if _is_free(port)][:count]
