"""A Ray head with dashboard and token authentication, in processes of its own, as somebody else's cluster would be."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
FAKE_HEAD_NODE_ID = "f" * 51 + "00000"  # by which Ray's provider of such nodes knows the head


class Head(NamedTuple):
    url: str  # of its dashboard
    token: str
    temporary: Path
    gcs: str  # what a driver joins


@contextlib.contextmanager
def ray_head(token: str, num_cpus: int, path: Path, workers: dict[str, Any] | None = None) -> Iterator[Head]:
    """Starts the head, waits until its dashboard answers, and ends exactly what it started.

    Its processes, and those of its jobs, have `path` on their PYTHONPATH. workers: a node type of a cluster file, from
    none of which to its `max_workers` Ray's autoscaler, that of `ray up` and KubeRay (v2), starts nodes here.
    `AutoscalingCluster` of ray.cluster_utils does the same, but ends the clusters of others first (`ray stop --force`),
    and the file that it and its type of provider begin with is not in Ray's wheel: the provider is named as if it were
    somebody else's ("external").
    """
    # Unix sockets below it may have 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    command = [
        sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        f"--num-cpus={num_cpus}", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--object-store-memory={80 * 2**20}", f"--temp-dir={temporary}",
    ]  # fmt: skip
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    cleared = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    # Where there is a token, and nobody says otherwise, Ray asks for it.
    environment = inherited | {"RAY_AUTH_TOKEN": token, "PATH": programs}
    environment["PYTHONPATH"] = str(path)
    if workers is not None:
        environment |= {
            "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }  # fmt: skip
        (temporary / "cluster.json").write_text(json.dumps(_autoscaled(f"127.0.0.1:{gcs}", num_cpus, workers)))
        command.append(f"--autoscaling-config={temporary / 'cluster.json'}")
    with (temporary / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=temporary)
    try:
        head = Head(f"http://127.0.0.1:{dashboard}", token, temporary, f"127.0.0.1:{gcs}")
        _wait(head, process)
        yield head
    finally:
        _end(process, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _autoscaled(gcs: str, num_cpus: int, workers: dict[str, Any]) -> dict[str, Any]:
    """A cluster file whose provider starts nodes as processes."""
    head = {"resources": {"CPU": num_cpus}, "node_config": {}, "max_workers": 0}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    return {
        "cluster_name": "fake", "max_workers": workers["max_workers"], "idle_timeout_minutes": 0.05,
        "upscaling_speed": 10.0, "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
        "provider": {
            "type": "external", "module": FAKE_PROVIDER, "gcs_address": gcs, "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True, "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, "worker": {"node_config": {}, **workers}},
    }  # fmt: skip


def _wait(head: Head, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, (head.temporary / "head.log").read_text()
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"no dashboard: {(head.temporary / 'head.log').read_text()}")


def _end(process: subprocess.Popen[bytes], temporary: Path) -> None:
    """By id: a `ray stop` would end the clusters of others on this machine."""
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    psutil.wait_procs(started, timeout=10)
    for left in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if left in started or str(temporary) in " ".join(left.info["cmdline"] or []):
                left.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    """None of those that the system gives to whoever asks for any (from 32,768 on): until the head listens, it would
    give them to others."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(range(22_000, 32_000), 1_000):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no ports")
