"""Commands that hold Ray run in a process of their own, and this one stays beside it: Ray ends the process that has
joined it with a C++ stack and status 1 when its cluster's head is gone, so that nobody would be left to say so.

What the process has to say it says itself; it leaves a fact when it has (storage/watched.py). One that ends without
is explained here, on the console and in the driver's file.
"""

import ctypes
import faulthandler
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import IO, Any, NoReturn

from saescale.storage import watched
from saescale.storage.errors import SaescaleError

# What comes within so many seconds is the same: a terminal and a batch system tell every process of a command.
SAME_S = 1.0
LEAVE_S = 5.0  # after its last word, a process that does not end is ended
_LOOK_S = 0.05
_PDEATHSIG = 1
_TAIL = 16_384  # bytes
# Of Ray's own account of a head that is gone; lines of stacks, which name no cause.
_OF_HEAD = re.compile(r"WrongClusterID|cluster.?id|GCS|gcs_", re.IGNORECASE)
_FRAME = re.compile(r"@ +0x|^File |^\*\*\*|^Extension modules|most recent call first|^Fatal Python error|\.so\b")
_AGAIN = "run the same command again, it goes on from what was saved"


def supervise(work: Callable[[], None]) -> None:
    """Runs `work` in a process of its own, and ends this one as that ended.

    Ctrl-C and SIGTERM reach it once; told a second time, it is ended at once.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    errors = _somewhere()
    sys.stdout.flush()
    sys.stderr.flush()
    watcher = os.getpid()
    child = os.fork()
    if child:
        os.close(writing)
        _Watch(child, reading, errors).until_it_ends()
    os.close(reading)
    _end_with(watcher)
    watched.watched_by(writing)
    if errors is not None:
        _keep_apart(errors)
    _mind_signals_once()
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        watched.tell(ended=code)
    sys.exit(0)


def _somewhere() -> IO[bytes] | None:
    """Where libraries may write what they say to their makers; with --debug that is for the user."""
    if "--debug" in sys.argv:
        return None
    with suppress(OSError):
        return tempfile.TemporaryFile(prefix="saescale-")
    return None


def _end_with(watcher: int) -> None:
    """Who kills the process that was started means this one too; where the system cannot do that, it works on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != watcher:
        os._exit(1)


def _keep_apart(errors: IO[bytes]) -> None:
    """Python goes on to write to the user's stderr, and C++ (stacks, logs of lost nodes) to `errors`."""
    theirs = sys.stderr
    own = os.dup(2)
    os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding=theirs.encoding, errors=theirs.errors)
    # Before Ray does it, for whom the user's stderr would be the place of a crash's stacks.
    faulthandler.enable(errors, all_threads=False)


def _mind_signals_once() -> None:
    told: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        told.append(time.monotonic())
        if len(told) == 1:  # of a second one the watcher takes care
            raise KeyboardInterrupt

    _on_signals(interrupt)


def _on_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell tells those in its background
            signal.signal(number, handle)


class _Watch:
    """Waits for the end of a process, and says how it ended where that could not."""

    def __init__(self, child: int, reading: int, errors: IO[bytes] | None) -> None:
        self._child, self._reading, self._errors = child, reading, errors
        self._facts: dict[str, Any] = {}
        self._unread = b""
        self._told: float | None = None  # to end
        self._hurried = False
        _on_signals(self._pass_on)

    def until_it_ends(self) -> NoReturn:
        last_word: float | None = None
        while not (ended := os.waitpid(self._child, os.WNOHANG))[0]:
            self._read()
            if "ended" in self._facts:
                last_word = last_word or time.monotonic()
                if time.monotonic() - last_word > LEAVE_S:
                    self._kill()
            time.sleep(_LOOK_S)
        self._read()
        if "ended" in self._facts:
            sys.exit(self._facts["ended"])
        sys.exit(self._explain(os.waitstatus_to_exitcode(ended[1])))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told is None:
            self._told = now
            with suppress(ProcessLookupError):
                os.kill(self._child, number)
        elif now - self._told > SAME_S:
            self._hurried = True
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self._reading, 65_536):
                self._unread += part
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._facts |= json.loads(line)

    def _explain(self, code: int) -> int:
        """The one line about an end without a word, and what a status will say. Returns the exit status."""
        if sys.stdout.isatty():
            print("\x1b[?25h", flush=True)  # the cursor, which a progress display hides
        self._remove(self._facts.get("ray_folder"))
        state, line, status = self._reason(code)
        driver = self._facts.get("driver")
        if driver is not None:
            from saescale.storage.lease import close_for

            with suppress(SaescaleError, OSError):
                close_for(driver["file"], driver["id"], state, line)
        print(line if self._hurried else f"error: {line}", file=sys.stderr)
        return status

    def _reason(self, code: int) -> tuple[Any, str, int]:
        if self._hurried:
            return "stopped", f"ended at once; {_AGAIN}", 130
        cluster, signalled = self._facts.get("cluster"), code < 0
        if cluster is not None and (not signalled or (-code == signal.SIGABRT and self._names_the_head())):
            if not cluster:
                return "lost", f"the local Ray is gone; {_AGAIN}", 2
            head = f"the head of the Ray cluster at {cluster} is gone, or was started anew"
            return "lost", f"{head}; when it is up, {_AGAIN}", 2
        what = f"was killed ({signal.Signals(-code).name})" if signalled else f"ended without a word (status {code})"
        why = ", maybe since memory ran out" if -code == signal.SIGKILL else ""
        last = f"; it last said: {said}" if (said := self._last_line()) else ""
        return "died", f"the process that worked {what}{why}{last}; {_AGAIN}", 2

    def _names_the_head(self) -> bool:
        return any(_OF_HEAD.search(line) for line in self._last_lines())

    def _last_line(self) -> str:
        return next((line[:200] for line in reversed(self._last_lines()) if line and not _FRAME.search(line)), "")

    def _last_lines(self) -> list[str]:
        """Of what libraries wrote for their makers."""
        if self._errors is not None:
            with suppress(OSError):
                end = self._errors.seek(0, os.SEEK_END)
                self._errors.seek(max(0, end - _TAIL))
                return [line.strip() for line in self._errors.read().decode(errors="replace").splitlines()]
        return []

    def _remove(self, folder: str | None) -> None:
        """The files of a local Ray, whose processes end with the one that started it, if not at once."""
        for _ in range(20):
            if folder is None or not os.path.exists(folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(_LOOK_S)
