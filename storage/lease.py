"""Who drives a run, and how far it is: RUN/driver-N.json, renewed every few seconds while a driver lives.

One run has one driver: that with the highest N. A driver creates the file of the next number, which of several that try
one can, and writes no other one, so that one that was halted and wakes takes nothing back. It holds the run for as long
as its beat goes on; that works wherever files do, object stores included. A driver that was killed is succeeded at once
on its own machine, where its process can be looked for, and elsewhere as soon as its beat has been seen to stand still
for LEASE_S, or where its last beat is longer ago than any two clocks differ.
"""

import os
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files, watched
from saescale.storage.documents import read_model
from saescale.storage.errors import Damaged, SaescaleError, SaescaleWarning, Superseded
from saescale.storage.secrets import hide_secrets
from saescale.storage.waiting import waiting, waits

_FORMAT = 1
_FILE = re.compile(r"driver(?:-(\d+))?\.json")  # that without a number is of version 0.1.0
BEAT_S = 3.0
LEASE_S = 20.0  # without a beat for so long, a driver is taken for dead
_LATEST_S = 1e11  # the year 5138: whoever says more is damaged
END_S = 3.0  # that a driver which ends gives the store to take its last word
_OBVIOUS_S = 600.0  # no two clocks differ by more: an older beat needs no watching


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class RunningCell(_Document):
    """A cell that a worker trains now; nmse and dead_fraction are those of its last evaluation."""

    cell_id: str
    worker: str
    step: int
    steps: int
    nmse: float | None = None
    dead_fraction: float | None = None


class RunningWorker(_Document):
    """A worker with a pack. `stream_wait` is the share of its time that it waits for the stream."""

    name: str  # HOST/PID
    cells: int
    tokens_per_s: float  # of the stream
    stream_wait: float


class LiveStanding(_Document):
    """What the producer of a live source does (live.py): in words, tokens that it computed, and those of them in blocks
    that had been made before; what lies on the disk."""

    source: str  # fingerprint
    state: str
    made: int = 0
    again: int = 0
    tokens_per_s: float = 0.0
    blocks: int = 0
    bytes: int = 0
    max_bytes: int | None = None


class Standing(_Document):
    """Where a sweep stands. What its cells reached for good is in results.parquet."""

    cells: int = 0
    done: int = 0
    failed: int = 0
    fraction: float = 0.0  # of the FLOPs that this driver found undone
    tokens_per_s: float = 0.0  # SAE training tokens: stream tokens times the cells that each trains, over all workers
    left_s: float | None = None
    interrupted: int = 0  # packs that went on elsewhere after their worker or its node was lost
    running: list[RunningCell] = []
    workers: list[RunningWorker] = []
    live: list[LiveStanding] = []


class WaitsFor(_Document):
    """What a driver waits for and since when; until when, where it does not wait for ever. Seconds since 1970."""

    what: str
    since: float
    until: float | None = None


# lost: the cluster went away under it; died: it ended without a word, and the process beside it said so.
EndState = Literal["finished", "stopped", "failed", "lost", "died"]


class Driver(_Document):
    """Content of driver-N.json. `state` says how it ended, once it has: a driver that was killed with all that stood
    beside it leaves `running`."""

    format: int = _FORMAT
    driver: str
    host: str
    machine: str  # one machine and process namespace, in which `pid` means something
    pid: int = Field(ge=1, le=2**31)
    job: str | None = None  # the Ray job that it runs in
    started_at: float = Field(ge=0, le=_LATEST_S)  # seconds since 1970, as are the others
    beat: int = 0
    beat_at: float = Field(ge=0, le=_LATEST_S)
    state: Literal["running"] | EndState = "running"
    error: str | None = None
    standing: Standing = Standing()
    waits: list[WaitsFor] = []  # of what lasts

    def may_live(self) -> bool:
        """False where it certainly ended; True where only its beat can tell."""
        if self.state != "running" or time.time() - self.beat_at > _OBVIOUS_S:
            return False
        return not self.is_here or _process_lives(self.pid)

    def lives(self) -> bool:
        """Whether it probably drives its run now, by this machine's clock; for showing, not for deciding."""
        return self.may_live() and time.time() - self.beat_at < LEASE_S

    @property
    def is_here(self) -> bool:
        """Whether `pid` is a process of this machine."""
        return self.machine == _machine()

    @property
    def name(self) -> str:
        """For a person to find it by."""
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")


def newest_file(run: str) -> tuple[str, int]:
    """The URL and the number of the newest driver's file in `run`; number 0 where there is none."""
    numbers = {int(match[1] or 0): name for name in files.list_names(run) if (match := _FILE.fullmatch(name))}
    last = max(numbers, default=0)
    return files.join(run, numbers.get(last, "driver.json")), last


def read_driver(run: str) -> Driver | None:
    """What the newest driver of the run directory `run` says; None where it has had none. Raises Damaged and Newer."""
    where, _ = newest_file(run)
    try:
        return read_model(where, Driver, "remove it if no driver of this run lives, and try again", _FORMAT)
    except FileNotFoundError:
        # It was removed by a newer one between the two requests, or there is none.
        return read_driver(run) if newest_file(run)[0] != where else None


def require_free(
    run: str, known_dead: Driver | None = None, sleep: Callable[[float], None] = time.sleep
) -> Driver | None:
    """Returns when no other driver holds `run`, after watching for a beat where that alone can tell: what the last one
    said then, which need not be watched again as `known_dead`.

    Raises SaescaleError where one does.
    """
    found = read_driver(run)
    if found is None or not found.may_live():
        return found
    if known_dead is not None and (found.driver, found.beat) == (known_dead.driver, known_dead.beat):
        return found
    with waiting(f"a sign of life of {found.name}, which drove {hide_secrets(run)} last", LEASE_S):
        return _watch(run, found, sleep)


def _watch(run: str, found: Driver, sleep: Callable[[float], None]) -> Driver:
    """What a driver said last that does nothing for LEASE_S. SaescaleError where it does something."""
    for _ in range(int(LEASE_S)):
        sleep(1.0)
        now = read_driver(run)
        if now is None or not now.may_live():
            return now or found
        if (now.driver, now.beat) != (found.driver, found.beat):
            raise SaescaleError(
                f"{run} is driven by another process already ({now.name}); look on with `saescale status {run}`, or "
                "end that one first"
            )
    warnings.warn(
        f"{found.name} has not been heard of for {LEASE_S:.0f} s and is taken for dead: going on in its place",
        SaescaleWarning,
        stacklevel=3,
    )
    return found


class Lease:
    """Holds `run` for this process: a context manager whose thread keeps the beat, with what `standing` says.

    Raises SaescaleError when another driver holds it; `known_dead` as for `require_free`. `end` says how it ended;
    leaving the context without it means `stopped` or, for an error, `failed`.
    """

    def __init__(self, run: str, job: str | None = None, known_dead: Driver | None = None) -> None:
        # Has to go before the look at who drives: a number that another takes after it cannot be taken again.
        before, number = newest_file(run)
        require_free(run, known_dead)
        now = time.time()
        self._run = run
        self._document = Driver(
            driver=uuid.uuid4().hex, host=socket.gethostname(), machine=_machine(), pid=os.getpid(), job=job,
            started_at=now, beat_at=now,
        )  # fmt: skip
        self.standing = Standing()  # to be replaced, never changed: the beat's thread reads it
        self._lost: SaescaleError | None = None
        self._ended = threading.Event()
        self._end: tuple[EndState, str | None] = ("stopped", None)
        self._where = files.join(run, f"driver-{number + 1:05d}.json")
        if not files.create(self._where, self._document.model_dump_json(indent=1).encode()):
            raise SaescaleError(f"{run} was just taken by another driver; look on with `saescale status {run}`")
        watched.tell(driver={"file": self._where, "id": self._document.driver})
        files.remove(before)
        self._check()
        self._thread = threading.Thread(target=self._keep, name="saescale-lease", daemon=True)
        self._thread.start()

    @property
    def driver(self) -> str:
        """What a worker compares with before it writes (`require_owner`)."""
        return self._document.driver

    @property
    def lost(self) -> bool:
        """Whether another driver has taken the run over."""
        return self._lost is not None

    def require(self) -> None:
        """Raises SaescaleError once another driver has taken the run over."""
        if self._lost is not None:
            raise self._lost

    def end(self, state: EndState, error: str | None = None) -> None:
        """Says how it ended, and lets go of the run. May be called again, which changes nothing.

        A store that does not answer is not waited for: such a lease ends by itself.
        """
        if self._ended.is_set():
            return
        self._end = state, error
        self._ended.set()
        self._thread.join(END_S)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.end("failed", str(error))
        else:
            self.end("stopped")

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._check()
                self._write()
            except SaescaleError as error:
                if self._lost is not None:
                    return
                # The store may answer again before the lease is up; what could not be written is written next time.
                warnings.warn(f"the beat of this driver could not be written: {error}", SaescaleWarning, stacklevel=2)
        state, error_said = self._end
        self._document = self._document.model_copy(update={"state": state, "error": error_said})
        # A lease that could not be given back ends by itself.
        with suppress(SaescaleError):
            self._check()
            self._write()

    def _write(self) -> None:
        now = [WaitsFor(**wait._asdict()) for wait in waits()] if self._document.state == "running" else []
        beat = {"beat": self._document.beat + 1, "beat_at": time.time(), "standing": self.standing, "waits": now}
        self._document = document = self._document.model_copy(update=beat)
        files.write_atomic(self._where, document.model_dump_json(indent=1).encode())

    def _check(self) -> None:
        try:
            require_owner(self._run, self.driver)
        except Superseded as error:
            self._lost = error
            raise


def close_for(where: str, driver: str, state: EndState, error: str) -> None:
    """Says in the file `where` how its driver ended, for one that cannot any more; nothing where it has said it."""
    with suppress(FileNotFoundError, Damaged):
        document = read_model(where, Driver, "remove it")
        if (document.driver, document.state) == (driver, "running"):
            document = document.model_copy(update={"state": state, "error": error, "waits": []})
            files.write_atomic(where, document.model_dump_json(indent=1).encode())


def require_owner(run: str, driver: str | None) -> None:
    """Raises Superseded where `run` is driven by another driver than `driver`; None: whoever drives it.

    Asked by workers before they write what a second driver's workers might write as well.
    """
    if driver is None:
        return
    found = read_driver(run)
    if found is not None and found.driver != driver:
        raise Superseded(f"{run} has been taken over by another driver ({found.name}); this one stops")


def _machine() -> str:
    """Differs between any two machines and between containers, in which the same number names other processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # A zombie has ended; only its parent has not asked yet.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0] != "Z"
    return True
