"""A pack in a process of its own that is killed (SIGKILL) at some moment after so many batches of its own.

The process kills itself: whoever watches it from outside may find no processor before it has ended.
"""

import os
import signal
import threading
import time
from itertools import count

from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.forked import forked


def run(job: PackJob, batches: int, pause_s: float, environment: dict[str, str]) -> None:
    """Trains the pack; `pause_s` after that batch the process is gone, whatever it does then."""
    os.environ.update(environment)  # the server that forks may be older than it
    trained = count(1)

    def kill() -> None:
        time.sleep(pause_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def look() -> bool:
        if next(trained) == batches:
            threading.Thread(target=kill, daemon=True).start()
        return False

    train_pack(job, should_stop=look)
    os._exit(0)


def killed_after(batches: int, pause_s: float, job: PackJob) -> bool:
    """Whether the process was killed; False where it had trained the pack before."""
    process = forked().Process(target=run, args=(job, batches, pause_s, dict(os.environ)), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
