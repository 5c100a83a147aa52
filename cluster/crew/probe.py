"""Asks what answers at the address of a Ray cluster, before this process joins it.

In a process of its own (this file, with HOST:PORT), which can be ended: Ray waits there for the better part of a
minute, for some answers without an end, and writes about it on the console from C++.
"""

import json
import select
import socket
import subprocess
import sys
from typing import Literal, NamedTuple

# Nothing of saescale: as a script this file need not find it.

PATIENCE_S = 15.0
_START_S = 60.0  # for that process to come up, which on a busy machine takes long and says nothing of the cluster
_READY = "ready"

Verdict = Literal["cluster", "elsewhere", "token", "silent", "other"]


class Answer(NamedTuple):
    """verdict: a cluster that this machine is a node of; one that it is no node of (`elsewhere`); one that refuses the
    token; nothing within PATIENCE_S; or something else, of which `said` tells."""

    verdict: Verdict
    said: str = ""


def ask(address: str) -> Answer:
    """What answers at `address`, HOST:PORT, within PATIENCE_S."""
    command = [sys.executable, "-P", __file__, address]
    piped = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=piped, stderr=piped) as process:
        assert process.stdout is not None
        try:
            select.select([process.stdout], [], [], _START_S)
            out, errors = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return Answer("silent")
    lines = out.decode(errors="replace").splitlines()
    try:
        return Answer(*json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        said = errors.decode(errors="replace").strip().splitlines() or ["nothing"]
        return Answer("other", said[-1][-300:])


def silence(host: str, port: int, limit_s: float) -> str | None:
    """Why nobody can be reached at HOST:PORT, in words; None where somebody listens."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=limit_s).close()
    except (OSError, UnicodeError) as error:
        return "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
    return None


def _look(address: str) -> Answer:
    from ray import exceptions
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    print(_READY, flush=True)
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=PATIENCE_S)
    except getattr(exceptions, "AuthenticationError", ()):
        return Answer("token")
    except Exception as error:
        return Answer("other", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Answer("cluster" if find_node_ids() & {node.hex() for node in nodes} else "elsewhere")


if __name__ == "__main__":
    print(json.dumps(_look(sys.argv[1])))
