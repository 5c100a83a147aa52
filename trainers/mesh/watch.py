"""Who keeps a mesh waiting: each process says twice a second that it is there, and how far it has come.

It is said through the store in which the processes met, by a thread of its own, so a process that computes for long
still says it, and one that was halted does not. When a collective fails, those that wait read what all have said. Half
of the deadline before that they warn of it: under NCCL, where nothing fails but the whole process is ended (by torch's
watchdog), nobody could say it later.
"""

import os
import socket
import threading
import time
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from saescale.storage.errors import SaescaleWarning
from saescale.trainers.mesh.layout import Layout

_BEAT_S = 0.5
_ANSWER_S = 5.0  # of the store, which is in the process of rank 0
_FIRST_S = 60.0  # until rank 0, which has met the others already, has said its first word
_MISSED_S = 5.0  # without a sign after which a process counts as gone or halted


class _Said(NamedTuple):
    """What a process said of itself."""

    at: str  # when, by its own clock: differs from word to word
    calls: int  # collectives that it has entered
    kind: str  # the last one
    place: str


_Heard = dict[int, _Said]  # by rank


class Watch:
    """Says what this process does; `entered` counts collectives, which all processes of a mesh enter in one order."""

    def __init__(self, layout: Layout, rank: int, deadline_s: float) -> None:
        self._layout, self._rank, self._late_s = layout, rank, deadline_s / 2
        # A prefix store on the connection that the group has: a beat is a message of some bytes.
        self._store = dist.PrefixStore("saescale-watch", dist.distributed_c10d._get_default_store())
        self._store.set_timeout(timedelta(seconds=_ANSWER_S))
        self._calls, self._kind, self._moved = 0, "start", time.monotonic()
        self._place = f"{socket.gethostname()}, pid {os.getpid()}"
        self._closed = threading.Event()
        self._say()
        # When rank 0 is halted its store is, and nobody could ask any more where that is.
        self._store.wait(["0"], timedelta(seconds=_FIRST_S))
        self._last: _Heard = {0: self._word(0)}
        self._thread = threading.Thread(target=self._beat, name="saescale-watch", daemon=True)
        self._thread.start()

    def entered(self, kind: str) -> None:
        self._calls += 1
        self._kind, self._moved = kind, time.monotonic()

    def suspects(self) -> str | None:
        """Which processes gave no sign of life for seconds, or else which are behind the others; None: nobody knows."""
        before = self._heard()
        if before:
            time.sleep(_MISSED_S)
        after = self._heard()
        if after:  # or whoever speaks to the store would wait with those who do
            self._part({rank for rank, said in after.items() if said != before.get(rank)})
        return self._suspects(before, after)

    def close(self) -> None:
        self._closed.set()
        # Whoever speaks to the store of a process that is halted may not come back.
        self._thread.join(_ANSWER_S)

    def _suspects(self, before: _Heard, after: _Heard) -> str | None:
        if not before or not after:
            return f"{self._named(0)} does not answer, or is gone"
        silent = [rank for rank in range(self._layout.ranks) if after.get(rank) == before.get(rank)]
        silent = [rank for rank in silent if rank != self._rank]
        if silent:
            return "; ".join(f"{self._named(rank)} gives no sign of life" for rank in silent)
        behind = [rank for rank, said in after.items() if said.calls < max(each.calls for each in after.values())]
        return "; ".join(f"{self._named(rank)} is behind the others" for rank in behind) or None

    def _part(self, alive: set[int]) -> None:
        """Has asked all that there is to ask. Rank 0, with which the store goes, waits for the others to have asked."""
        try:
            self._store.set(f"asked-{self._rank}", "")
            until = time.monotonic() + 2 * _MISSED_S if self._rank == 0 else 0.0
            while time.monotonic() < until and not self._store.check([f"asked-{rank}" for rank in sorted(alive)]):
                time.sleep(_BEAT_S / 5)
        except RuntimeError:  # it is gone
            return

    def _named(self, rank: int) -> str:
        shard, replica = self._layout.place(rank)
        said = self._last.get(rank)
        what = f"{said.place}; last heard of at {said.kind}" if said else "never came up"
        return f"rank {rank} (shard {shard}, replica {replica}; {what})"

    def _heard(self) -> _Heard:
        """What each said last; nothing where the store does not answer, which would block whoever asks it."""
        found: _Heard = {}
        asking = threading.Thread(target=self._ask, args=(found,), daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        if asking.is_alive() or 0 not in found:
            return {}
        self._last |= found
        return found

    def _ask(self, found: _Heard) -> None:
        try:
            there = {rank: self._word(rank) for rank in range(self._layout.ranks) if self._store.check([str(rank)])}
        except RuntimeError:  # the store went with rank 0
            return
        found |= there

    def _word(self, rank: int) -> _Said:
        at, calls, kind, place = self._store.get(str(rank)).decode().split("|", 3)
        return _Said(at, int(calls), kind, place)

    def _say(self) -> None:
        self._store.set(str(self._rank), f"{time.time()}|{self._calls}|{self._kind}|{self._place}")

    def _beat(self) -> None:
        asked, before, calls = 0.0, _Heard(), 0
        while not self._closed.wait(_BEAT_S):
            try:
                self._say()
            except RuntimeError:
                return
            now = time.monotonic()
            if now - self._moved < self._late_s:
                before = {}
            elif not before or calls != self._calls:
                asked, before, calls = now, self._heard() or self._last, self._calls
            elif now - asked > _MISSED_S:
                self._warn(before)
                self._moved = now  # said again when as much time has passed

    def _warn(self, before: _Heard) -> None:
        found = self._suspects(before, self._heard())
        if found is not None:
            text = f"the mesh of {self._layout} waits: {found}"
            warnings.warn(text, SaescaleWarning, stacklevel=2)
