"""How a driver joins a Ray cluster, or starts a local Ray, and how it leaves."""

import logging
import os
import signal
import threading
import time
from typing import Any

import ray

from saescale.cluster.crew import local_ray
from saescale.cluster.crew.head import joining
from saescale.cluster.crew.probe import PATIENCE_S, Answer, ask, silence
from saescale.cluster.crew.token import has_to_send_one, has_token, refused, use_token
from saescale.storage import watched
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.waiting import waiting

_ANSWER_S = 10.0
_LOOK = "check the address and that the cluster is up (`ray status`)"


def wanted_address(address: str | None) -> str | None:
    """The cluster that is meant: `address`, else RAY_ADDRESS; None for a local Ray."""
    wanted = (address or os.environ.get("RAY_ADDRESS") or "").strip()
    return None if wanted in ("", "local") else wanted


def connect(address: str | None) -> None:
    """Joins the cluster at `address` (default: RAY_ADDRESS), or starts a local Ray. SaescaleError when it cannot."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wanted, at_terminate = wanted_address(address), signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if wanted is not None:
        try:
            _join(wanted, options)
        except SaescaleError as error:
            raise error if address else SaescaleError(f"{error} (RAY_ADDRESS is {wanted})") from error
    else:
        # Checkpoints and results go through the run directory, so the object store carries next to nothing.
        # What goes wrong in its start is said here.
        options["logging_level"] = logging.CRITICAL
        with joining(None):
            local_ray.start(options | {"include_dashboard": False, "object_store_memory": 128 * 2**20})
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would leave at once, before the workers have saved their checkpoints.
        signal.signal(signal.SIGTERM, at_terminate)


def disconnect() -> None:
    """Leaves the cluster; ends a local Ray, of which nothing stays behind."""
    ray.shutdown()
    watched.tell(cluster=None)  # what ends this process from now on is not Ray
    local_ray.remove_folder()


def _join(wanted: str, options: dict[str, Any]) -> None:
    address = _running_here() if wanted == "auto" else wanted
    _require_address(address)
    _reach(address)
    # Ray would end this process for want of a token.
    with waiting(f"an answer of the Ray cluster at {address}"):
        answer = Answer("token") if has_to_send_one() and not has_token() else ask(address)
        if answer.verdict == "token" and use_token():
            answer = ask(address)
    if answer.verdict != "cluster":
        raise _refusal(address, answer)
    began = time.monotonic()
    try:
        with joining(address):
            ray.init(address=address, **options)
    except Exception as error:  # Ray raises bare ones, and errors of its own for other versions of it or of Python
        raise SaescaleError(
            f"could not join the Ray cluster at {address} after {time.monotonic() - began:.0f} s: {one_line(error)}; "
            f"{_LOOK}"
        ) from error


def _require_address(address: str) -> None:
    """Raises SaescaleError for what is no HOST:PORT."""
    if address.startswith(("http://", "https://")):
        raise SaescaleError(
            f"{address} is the address of a dashboard, to which `saescale submit` sends a sweep; to run it from here, "
            "on a node of the cluster, give the cluster's own, HOST:6379 where nobody changed the port (or auto)"
        )
    if "://" in address:
        raise SaescaleError(
            f"{address} cannot be used; on a node of the cluster give its own address, HOST:6379 where nobody changed "
            "the port (or auto), and from another machine submit the sweep to its dashboard: saescale submit SWEEP "
            "--address http://HEAD:8265"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise SaescaleError(
            f"{address} is no address of a Ray cluster; give HOST:PORT, whose port is 6379 where nobody changed it, or "
            "auto for the cluster of this machine"
        )


def _running_here() -> str:
    """The address of the cluster that runs on this machine. Ray itself tries for minutes to reach one that has gone."""
    from ray._private.services import find_gcs_addresses
    from ray._private.utils import read_ray_address

    last = read_ray_address()  # that `ray start` wrote down
    if last and _answers(last):
        return str(last)
    found = sorted(filter(_answers, find_gcs_addresses()))
    if len(found) == 1:
        return str(found[0])
    gone = f"; the last one, at {last}, does not answer any more" if last else ""
    running = f"several Ray clusters run ({', '.join(found)})" if found else f"no Ray cluster runs{gone}"
    raise SaescaleError(
        f"--address auto: on this machine {running}; {'name one' if found else 'start one (`ray start --head`)'}: "
        "--address HOST:PORT"
    )


def _answers(address: str) -> bool:
    try:
        _require_address(address)
        _reach(address)
    except SaescaleError:
        return False
    return True


def _reach(address: str) -> None:
    """Ray itself asks for minutes on end at an address where nothing answers."""
    host, _, port = address.rpartition(":")
    with waiting(f"an answer of the Ray cluster at {address}"):
        reason = silence(host, int(port), _ANSWER_S)
    if reason is not None:
        raise SaescaleError(f"could not reach the Ray cluster at {address}: {reason}; {_LOOK}")


def _refusal(address: str, answer: Answer) -> SaescaleError:
    where = f"the Ray cluster at {address}"
    if answer.verdict == "token":
        return refused(where)
    if answer.verdict == "elsewhere":
        return SaescaleError(
            f"this machine is no node of {where}: run the command on one, or submit the sweep to its dashboard "
            "(saescale submit SWEEP --address http://HEAD:8265)"
        )
    said = f"no answer of Ray within {PATIENCE_S:.0f} s" if answer.verdict == "silent" else answer.said
    port = (
        "; 8265 is the dashboard's port, to which `saescale submit` sends a sweep" if address.endswith(":8265") else ""
    )
    return SaescaleError(f"could not reach {where}: {said}; its port is 6379 where nobody changed it{port}; {_LOOK}")
