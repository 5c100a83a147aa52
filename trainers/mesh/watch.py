"""Who keeps a mesh waiting: each process says twice a second that it is there, and how far it has come.

It is said through the store in which the processes met, by a thread of its own, so a process that computes for long
still says it, and one that was halted does not. When a collective fails, those that wait read what all have said.
"""

import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from saescale.trainers.mesh.layout import Layout

_BEAT_S = 0.5
_ANSWER_S = 10.0  # of the store, which is in the process of rank 0
_MISSED_S = 5.0  # without a sign after which a process counts as gone or halted


class Watch:
    """Says what this process does; `entered` counts collectives, which all processes of a mesh enter in one order."""

    def __init__(self, layout: Layout, rank: int, deadline_s: float) -> None:
        self._layout, self._rank = layout, rank
        # A prefix store on the connection that the group has: a beat is a message of some bytes.
        self._store = dist.PrefixStore("saescale-watch", dist.distributed_c10d._get_default_store())
        self._store.set_timeout(timedelta(seconds=min(deadline_s, _ANSWER_S)))
        self._calls, self._kind = 0, "start"
        self._place = f"{socket.gethostname()}, pid {os.getpid()}"
        self._closed = threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._beat, name="saescale-watch", daemon=True)
        self._thread.start()

    def entered(self, kind: str) -> None:
        self._calls += 1
        self._kind = kind

    def suspects(self) -> str | None:
        """Which processes gave no sign of life for seconds, or else which are behind the others; None: nobody knows."""
        before = self._heard()
        time.sleep(_MISSED_S)
        after = self._heard()
        if not after:
            return f"{self._named(0, before)} does not answer, or is gone"
        silent = [rank for rank in range(self._layout.ranks) if after.get(rank) == before.get(rank)]
        silent = [rank for rank in silent if rank != self._rank]
        if silent:
            return "; ".join(f"{self._named(rank, after)} gives no sign of life" for rank in silent)
        calls = {rank: int(said[1]) for rank, said in after.items()}
        behind = [rank for rank, count in calls.items() if count < max(calls.values(), default=0)]
        return "; ".join(f"{self._named(rank, after)} is behind the others" for rank in behind) or None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _named(self, rank: int, heard: dict[int, list[str]]) -> str:
        shard, replica = self._layout.place(rank)
        place, doing = (heard[rank][3], heard[rank][2]) if rank in heard else ("never came up", "nothing")
        return f"rank {rank} (shard {shard}, replica {replica}; {place}; last at {doing})"

    def _heard(self) -> dict[int, list[str]]:
        found = {}
        for rank in range(self._layout.ranks):
            try:
                if self._store.check([str(rank)]):
                    found[rank] = self._store.get(str(rank)).decode().split("|", 3)
            except RuntimeError:  # the store went with rank 0
                break
        return found

    def _say(self) -> None:
        self._store.set(str(self._rank), f"{time.time()}|{self._calls}|{self._kind}|{self._place}")

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            try:
                self._say()
            except RuntimeError:
                return
