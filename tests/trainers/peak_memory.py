"""By how much a process grows at most while it trains packs, one after another; measured in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from saescale.trainers.training.train import PackJob, train_pack

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COUNTABLE = _RESET.exists()  # Linux


def measure(warm_up: PackJob, jobs: Sequence[PackJob], stopped: int = 0) -> list[int]:
    """The peak of each job in bytes, beyond what the process has after `warm_up`: compiled kernels and the
    allocator's habits belong to a process, not to a pack. The first `stopped` jobs are stopped after three batches.
    """
    text = json.dumps([job.model_dump() for job in (warm_up, *jobs)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.peak_memory", text, str(stopped)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [int(peak) for peak in json.loads(done.stdout.split("peaks ")[-1])]


def _memory(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _after_three_batches() -> Callable[[], bool]:
    batches = count()
    return lambda: next(batches) > 2


def _main(text: str, stopped: int) -> None:
    warm_up, *jobs = (PackJob.model_validate(job) for job in json.loads(text))
    train_pack(warm_up)
    before, peaks = _memory("VmRSS"), []
    for number, job in enumerate(jobs):
        _RESET.write_text("5")  # the peak is counted from here
        train_pack(job, should_stop=_after_three_batches() if number < stopped else lambda: False)
        peaks.append(_memory("VmHWM") - before)
    print("peaks", json.dumps(peaks))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
