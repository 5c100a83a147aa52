"""Says on the console what is waited for, when it lasts (storage/waiting.py)."""

import threading
import time
from collections.abc import Callable

from saescale.storage.waiting import Wait, waits

_LOOK_S = 1.0
_PAUSES_S = (30.0, 60.0, 120.0, 300.0)  # until it is said again
_SAME_S = 5.0  # what begins again so soon has not stopped


class SaysWaits:
    """A thread that calls `say` with a line for each wait that lasts, again after pauses that grow, and at its end."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: dict[str, _Said] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="saescale-waits", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, found: list[Wait], now: float) -> None:
        """Says what is to be said of `found` at `now`, in seconds since 1970."""
        for wait in found:
            said = self._said.setdefault(wait.what, _Said(wait.since, now))
            said.seen = now
            if now >= said.due:
                self._say(waits_line(wait, now, said.since))
                said.due = now + _PAUSES_S[min(said.times, len(_PAUSES_S) - 1)]
                said.times += 1
        for what, said in list(self._said.items()):
            if now - said.seen > _SAME_S:
                del self._said[what]
                self._say(f"waited {duration(said.seen - said.since)} for {what}")

    def _work(self) -> None:
        while not self._over.wait(_LOOK_S):
            self.look(waits(), time.time())


class _Said:
    """A wait that was said: since when it lasts, when it was last seen, when it is to be said again."""

    def __init__(self, since: float, due: float) -> None:
        self.since, self.seen, self.due, self.times = since, due, due, 0


def waits_line(wait: Wait, now: float, since: float | None = None) -> str:
    """`waiting for X: 24 s so far, 36 s more at most`."""
    text = f"waiting for {wait.what}: {duration(now - (wait.since if since is None else since))} so far"
    return text if wait.until is None else f"{text}, {duration(max(0.0, wait.until - now))} more at most"


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
