"""How a driver joins a Ray cluster, or starts a local Ray."""

import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import ray

from saescale.cluster.crew.head import joining
from saescale.storage.errors import SaescaleError, one_line

_ANSWER_S = 10.0


def connect(address: str | None) -> None:
    """Joins the cluster at `address` (default: RAY_ADDRESS), or starts a local Ray. SaescaleError when it cannot."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    # Checkpoints and results go through the run directory, so the object store carries next to nothing.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 128 * 2**20}
    if address:
        _reach(address)
    started, at_terminate = time.monotonic(), signal.getsignal(signal.SIGTERM)
    try:
        # Without an address Ray would join any cluster that happens to run on this machine.
        with joining(address):
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise SaescaleError(
            f"could not reach {where} after {time.monotonic() - started:.0f} s: {one_line(error)}; "
            "check the address and that the cluster is up (`ray status`)"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would leave at once, before the workers have saved their checkpoints.
        signal.signal(signal.SIGTERM, at_terminate)


def _reach(address: str) -> None:
    """Ray itself asks for minutes on end at an address where nothing answers."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():  # `auto`, or a name that only Ray knows
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else one_line(error)
        raise SaescaleError(
            f"could not reach the Ray cluster at {address}: {reason}; check the address and that the cluster is up "
            "(`ray status`)"
        ) from error
