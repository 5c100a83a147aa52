"""A sweep whose cluster's head is killed: one line, a status of its own, and the same command goes on."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.sweep.status import read_status
from saescale.storage.lease import read_driver
from tests.cluster.command import SAESCALE, environment, interruptible, saescale

pytestmark = pytest.mark.chaos
HOG = """
import logging, sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
actor = ray.remote(num_cpus=1)(type("Hog", (), {"up": lambda self: True})).remote()
ray.get(actor.up.remote())
print("busy", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def cluster(port: int | None = None) -> Iterator[Any]:
    """Of one node, at a port of Ray's choice or where one was before."""
    from ray.cluster_utils import Cluster

    where = {} if port is None else {"gcs_server_port": port}
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node | where)
    try:
        yield started
    finally:
        started.shutdown()


def kill_head(started: Any) -> None:
    started.head_node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.fixture
def command(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> list[str]:
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    document["train"]["tokens"] = 2**19
    document["eval"]["every_tokens"] = 2**19
    document["resources"] = {"workers": 1, "gpus_per_worker": 0, "checkpoint_every_s": 0.2}
    return ["sweep", sweep_file(document), "--bootstraps", "0"]


def begin(command: list[str], address: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SAESCALE, *command, "--address", address], env=environment(**extra), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
    )  # fmt: skip


def wait_until(seen: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_in_one_line(process: subprocess.Popen[str], address: str) -> str:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 2, out + errors
    assert errors.startswith(f"error: the head of the Ray cluster at {address} "), errors
    assert "; when it is up, run the same command again" in errors
    assert len(errors.splitlines()) == 1
    assert "raylet" not in out
    return out


def test_a_head_that_is_started_anew_in_a_training(command: list[str], document: dict[str, Any]) -> None:
    """Ray ends the driver as soon as it asks the new one; what was saved goes on there."""
    run = Path(document["out"])
    with cluster() as first:
        process = begin(command, first.address)
        wait_until(lambda: list(run.glob("cells/*/checkpoint/step-*.safetensors")), process)
        kill_head(first)
        with cluster(int(first.address.rpartition(":")[2])) as second:
            assert second.address == first.address
            ended_in_one_line(process, first.address)
            found = read_status(str(run))
            assert (found.state, found.counts.started) == ("lost", 2)
            again = saescale(*command, "--address", second.address)
            assert again.returncode == 0, again.stdout + again.stderr
    assert read_status(str(run)).state == "finished"


def test_a_head_that_is_gone_while_workers_are_waited_for(command: list[str], document: dict[str, Any]) -> None:
    """It is said within seconds that it does not answer; Ray gives up after a minute, or here a third of one. Nothing
    was begun."""
    with cluster() as only:
        address = only.address
        busy = subprocess.Popen([sys.executable, "-c", HOG, address], env=environment(), stdout=subprocess.PIPE)
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"busy\n"
        try:
            process = begin(command, address, RAY_gcs_rpc_server_reconnect_timeout_s="20")
            assert process.stdout is not None
            said = ""
            while "waiting for a worker to come up" not in said:
                said += process.stdout.readline()
            kill_head(only)
            out = ended_in_one_line(process, address)
        finally:
            busy.kill()
            busy.communicate()
    assert f"waiting for an answer of the head of the Ray cluster at {address}: " in out
    assert read_driver(document["out"]) is None
