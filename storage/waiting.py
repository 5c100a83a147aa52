"""What a process waits for. Whoever waits says so here, whatever it is that does not answer; what lasts is said by
those who look: the console (cluster/front/waits.py), and the driver's file (lease.py), of which a status tells it.

    with waiting("an answer of s3://bucket/run", limit_s=60):
        ...
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from saescale.storage.secrets import hide_secrets

SAY_AFTER_S = 5.0  # so that nobody looks at a silent screen for ten seconds, whatever came before

_QUERY, _PATH = re.compile(r"[?#].*"), re.compile(r"(?<=[^:/])/.*")


class Wait(NamedTuple):
    """`what` as after "waiting for"; `since` and `until` (None: for as long as it takes) in seconds since 1970."""

    what: str
    since: float
    until: float | None = None


_LOCK = threading.Lock()
_NUMBERS = count()
_open: dict[int, Wait] = {}
_heard: dict[str, list[Wait]] = {}


@contextmanager
def waiting(what: str, limit_s: float | None = None) -> Iterator[None]:
    """Around whatever may take long without a word: `what` is waited for, for `limit_s` seconds at most."""
    number, now = next(_NUMBERS), time.time()
    with _LOCK:
        _open[number] = Wait(what, now, None if limit_s is None else now + limit_s)
    try:
        yield
    finally:
        with _LOCK:
            del _open[number]


def hear(source: str, found: Sequence[Wait]) -> None:
    """What `source` (a thread that watches something, or other processes) waits for now, in place of what it said."""
    with _LOCK:
        if found:
            _heard[source] = list(found)
        else:
            _heard.pop(source, None)


def waits(over_s: float = SAY_AFTER_S) -> list[Wait]:
    """What is waited for since more than so many seconds, the longest first; of several for the same the first."""
    with _LOCK:
        found = sorted([*_open.values(), *(wait for several in _heard.values() for wait in several)], key=_since)
    before = time.time() - over_s
    return list({wait.what: wait for wait in reversed(found) if wait.since <= before}.values())[::-1]


def _since(wait: Wait) -> float:
    return wait.since


def server(url: str) -> str:
    """Who has to answer for a URL: its bucket or host, or a path of this machine."""
    return _PATH.sub("", hide_secrets(_QUERY.sub("", url))) if "://" in url else url
