"""Asks what answers at the address of a Ray cluster, before this process joins it.

In a process of its own (this file, with HOST:PORT), which can be ended: Ray waits there for the better part of a
minute, for some answers without an end, and writes about it on the console from C++.
"""

import json
import subprocess
import sys
from typing import Literal, NamedTuple

PATIENCE_S = 15.0

Verdict = Literal["cluster", "elsewhere", "token", "silent", "other"]


class Answer(NamedTuple):
    """verdict: a cluster that this machine is a node of; one that it is no node of (`elsewhere`); one that refuses the
    token; nothing within PATIENCE_S; or something else, of which `said` tells."""

    verdict: Verdict
    said: str = ""


def ask(address: str) -> Answer:
    """What answers at `address`, HOST:PORT, within PATIENCE_S."""
    command = [sys.executable, "-P", __file__, address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Answer("silent")
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        return Answer(*json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        return Answer("other", said[-1][-300:])


def _look(address: str) -> Answer:
    from ray import exceptions
    from ray._private.services import find_node_ids
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=PATIENCE_S)
    except getattr(exceptions, "AuthenticationError", ()):
        return Answer("token")
    except Exception as error:
        return Answer("other", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Answer("cluster" if find_node_ids() & {node.hex() for node in nodes} else "elsewhere")


if __name__ == "__main__":
    print(json.dumps(_look(sys.argv[1])))
