"""A worker that halts itself (SIGSTOP) just before it does one thing to one file, in a process of its own.

    with halted_before("write_atomic", r"step-.*safetensors", 2, job) as worker: ...

The process stands between its last look at who owns the run and what it does next, as one does that the system has
suspended there; `wake` sends SIGCONT and waits for its end.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from saescale.storage import files
from saescale.storage.errors import Superseded
from saescale.storage.lease import Lease
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.forked import forked

SUPERSEDED = 3  # exit status


def run(operation: str, pattern: str, which: int, job: PackJob, environment: dict[str, str]) -> None:
    """Drives the run, trains the pack, and halts before the operation `which` (from 1) on a URL that has `pattern`."""
    os.environ.update(environment)  # the server that forks may be older than it
    plain, seen = getattr(files, operation), 0

    def halting(url: str, *rest: Any) -> Any:
        nonlocal seen
        if re.search(pattern, url):
            seen += 1
            if seen == which:
                os.kill(os.getpid(), signal.SIGSTOP)
        return plain(url, *rest)

    setattr(files, operation, halting)
    try:
        with Lease(job.run) as lease:
            train_pack(job.model_copy(update={"driver": lease.driver}))
    except Superseded:
        os._exit(SUPERSEDED)
    os._exit(0)


class Halted:
    def __init__(self, process: Any) -> None:
        self._process = process

    def wake(self) -> int:
        """Lets it go on; how it ended."""
        os.kill(self._process.pid, signal.SIGCONT)
        self._process.join(timeout=120)
        return int(self._process.exitcode)


@contextmanager
def halted_before(operation: str, pattern: str, which: int, job: PackJob) -> Iterator[Halted]:
    """Such a process once it has halted."""
    process = forked().Process(target=run, args=(operation, pattern, which, job, dict(os.environ)), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + 120
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert process.is_alive(), "it ended without coming to that operation"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield Halted(process)
    finally:
        process.kill()
        process.join()
