"""The head of the cluster that this process has joined: what is asked of it, and whether it answers.

When it is gone Ray waits for it without a word, and then ends this process where it stands; one that was started anew
ends it at once. Said before that by `HeadWatch`, and after it by the process beside this one (front/supervise.py).
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray

from saescale.cluster.crew.probe import silence
from saescale.storage import watched
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.waiting import Wait, hear, waiting

GIVES_UP_S = 60.0  # Ray's own limit (gcs_rpc_server_reconnect_timeout_s)
GRACE_S = 30.0  # more, for Ray to do it
LOOK_S = 2.0
_ANEW = "WrongClusterID"
_ANSWER_S = 5.0


class HeadLost(SaescaleError):
    """The head of the cluster is gone, and all that ran on it with it."""


@contextmanager
def joining(address: str | None) -> Iterator[None]:
    """Around joining Ray at `address` (None: starting it here): whatever Ray does to this process can be explained."""
    watched.tell(cluster=address or "")
    with suppress(AttributeError):
        # `log_to_driver` does not keep back the logs of nodes that were lost.
        ray._private.worker._worker_logs_enabled = False
    with waiting(f"the Ray cluster at {address}" if address else "a local Ray to start"):
        yield


def resources() -> dict[str, float]:
    """What all nodes have together ("CPU", "GPU", "memory")."""
    with _asking():
        found: dict[str, float] = ray.cluster_resources()
        return found


def free() -> dict[str, float]:
    """What nobody has claimed of it."""
    with _asking():
        found: dict[str, float] = ray.available_resources()
        return found


def finds_no_room(claim: Mapping[str, float]) -> bool:
    """Whether somebody asks in vain for what `claim` says ("CPU", "GPU"): what only starts has its share already."""
    with _asking():
        try:
            from ray.autoscaler.v2.sdk import get_cluster_status

            asked = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, TimeoutError):
            return False  # the interface may be another in other versions of Ray; a wait is said without it
    wanted = {name: share for name, share in claim.items() if share}
    return any(dict(request.bundle) == wanted for demand in asked for request in demand.bundles_by_count)


def nodes() -> list[dict[str, float]]:
    """The resources of each node that the cluster has now."""
    return [node["Resources"] for node in _alive()]


def node_ids() -> set[str]:
    """Ray's, hex, of the nodes that the cluster has now."""
    return {node["NodeID"] for node in _alive()}


def _alive() -> list[dict[str, Any]]:
    with _asking():
        return [node for node in ray.nodes() if node["Alive"]]


@contextmanager
def explained() -> Iterator[None]:
    """Around whatever asks Ray itself (of errors of tasks others know what to do): HeadLost in place of Ray's errors.

    Of a head that was started anew it says, for one, that a token is wrong.
    """
    address = ray.get_runtime_context().gcs_address
    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        how = "is gone, or was started anew" if _ANEW in str(error) else f"does not answer ({one_line(error)[:200]})"
        raise _lost(address, how) from error


@contextmanager
def _asking() -> Iterator[None]:
    with waiting(_answer_of(ray.get_runtime_context().gcs_address), GIVES_UP_S), explained():
        yield


def _answer_of(address: str) -> str:
    return f"an answer of the head of the Ray cluster at {address}"


def _lost(address: str, how: str) -> HeadLost:
    again = "when it is up, run the same command again, it goes on from what was saved"
    return HeadLost(f"the head of the Ray cluster at {address} {how}; {again}")


class HeadWatch:
    """Looks whether the head at `address` (HOST:PORT) answers, in a thread, and says so while it does not."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._host, self._port = address.rpartition(":")[0], int(address.rpartition(":")[2])
        self._silent: float | None = None  # since when, in time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="saescale-head", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises HeadLost where it has been silent for so long that Ray should have ended this process."""
        silent = 0.0 if self._silent is None else time.time() - self._silent
        if silent > GIVES_UP_S + GRACE_S:
            raise _lost(self._address, f"has not answered for {silent:.0f} s")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        hear("head", [])

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            if silence(self._host, self._port, _ANSWER_S) is None:
                self._silent = None
                hear("head", [])
            else:
                self._silent = self._silent or time.time()
                wait = Wait(_answer_of(self._address), self._silent, self._silent + GIVES_UP_S)
                hear("head", [wait])
