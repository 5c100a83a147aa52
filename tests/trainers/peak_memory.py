"""By how much a process grows at most while it trains packs, one after another; measured in processes of its own, one
or as many as a mesh has."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from saescale.trainers.mesh.distributed import joined
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.training.train import PackJob, train_pack

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COUNTABLE = _RESET.exists()  # Linux
_DEADLINE_S = 120.0


def measure(warm_up: PackJob, jobs: Sequence[PackJob], stopped: int = 0, layout: Layout | None = None) -> list[int]:
    """The peak of each job in bytes, beyond what the process has after `warm_up`: compiled kernels and the
    allocator's habits belong to a process, not to a pack. The first `stopped` jobs are stopped after three batches.

    Of the processes of a `layout`, that of the one which has the most.
    """
    text = json.dumps([job.model_dump() for job in (warm_up, *jobs)])
    with TemporaryDirectory(prefix="saescale-memory-") as folder:
        meeting = [str(layout.shards), str(layout.replicas), f"file://{folder}/meeting"] if layout else []
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainers.peak_memory", text, str(stopped), str(rank), *meeting],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(layout.ranks if layout else 1)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in processes]
    if failed := [process.args for process in processes if process.returncode]:
        raise RuntimeError(f"{len(failed)} of {len(said)} processes failed")
    return [max(of_job) for of_job in zip(*(json.loads(each.split("peaks ")[-1]) for each in said), strict=True)]


def _main(text: str, stopped: str, rank: str, *meeting: str) -> None:
    jobs = [PackJob.model_validate(job) for job in json.loads(text)]
    if not meeting:
        peaks = _peaks(jobs, int(stopped), ONE)
    else:
        shards, replicas, where = meeting
        layout = Layout(int(shards), int(replicas))
        with joined(layout, int(rank), where, "gloo", torch.device("cpu"), _DEADLINE_S) as group:
            peaks = _peaks(jobs, int(stopped), group)
    print("peaks", json.dumps(peaks))


def _peaks(jobs: Sequence[PackJob], stopped: int, group: Group) -> list[int]:
    train_pack(jobs[0], group=group)
    before, peaks = _resident("VmRSS"), []
    for number, job in enumerate(jobs[1:]):
        _RESET.write_text("5")  # the peak is counted from here
        train_pack(job, should_stop=_after_three_batches() if number < stopped else lambda: False, group=group)
        peaks.append(_resident("VmHWM") - before)
    return peaks


def _after_three_batches() -> Callable[[], bool]:
    batches = count()
    return lambda: next(batches) > 2


def _resident(field: str) -> int:
    """Bytes: VmRSS, what this process has in memory now, or VmHWM, the most since the peak is counted."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
