"""One cell, or a pack, trained by several processes of one machine, without Ray.

    outcome = train_sharded(job, shards=2, replicas=1)

On GPUs, one for each process where there are as many, else all on the first one, through the host's memory. What a
cluster does over machines is cluster/crew's; both call `train_pack` in each process.
"""

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing as mp

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.mesh.distributed import DEADLINE_S, Backend, joined
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.network import meeting_at
from saescale.trainers.training.train import PackJob, PackOutcome, train_pack

_POLL_S = 0.2
_LEAVE_S = 15.0  # for the others to say why they broke off, after one was lost


def train_sharded(
    job: PackJob,
    shards: int = 1,
    replicas: int = 1,
    device: str = "cpu",
    deadline_s: float = DEADLINE_S,
    started: Callable[[list[BaseProcess]], None] = lambda processes: None,
) -> PackOutcome:
    """Trains the cells of `job` by shards x replicas new processes on `device` (cpu, or cuda).

    Raises SaescaleError where the mesh cannot be, and with what each process said where one was lost, hung for longer
    than `deadline_s`, or failed; the same call goes on from the last checkpoint. `started` is told of the processes.
    """
    for cell in job.cells:
        Layout.checked(shards, replicas, cell.n_latents, cell.batch_tokens)
    layout = Layout(shards, replicas)
    context = mp.get_context("spawn")
    said, meeting = context.SimpleQueue(), meeting_at("127.0.0.1")
    processes = [
        context.Process(target=_work, args=(job, layout, rank, device, deadline_s, meeting, said), daemon=True)
        for rank in range(layout.ranks)
    ]
    for process in processes:
        process.start()
    started(list(processes))
    answers = _answers(processes, said)
    faults = {rank: answer for rank, answer in answers.items() if isinstance(answer, str)}
    if faults or 0 not in answers:
        # Who lost its connection to another one knows less than who failed by itself.
        first = sorted(faults.values(), key=lambda fault: "the mesh of" in fault)
        raise SaescaleError("; ".join(dict.fromkeys(first)) or "a process of the mesh ended without a word")
    return answers[0]


def _answers(processes: Sequence[BaseProcess], said: Any) -> dict[int, Any]:
    """What each process ended with, an outcome or a fault; when one was lost the others are given time to say so."""
    answers: dict[int, Any] = {}
    until = None
    try:
        while len(answers) < len(processes):
            ended = {rank: process for rank, process in enumerate(processes) if process.exitcode is not None}
            while not said.empty():
                rank, answer = said.get()
                answers[rank] = answer
            lost = {rank: process for rank, process in ended.items() if rank not in answers}
            if (lost or any(isinstance(answer, str) for answer in answers.values())) and until is None:
                until = time.monotonic() + _LEAVE_S
            if until is not None and (time.monotonic() > until or len(lost) + len(answers) == len(processes)):
                for rank, process in lost.items():
                    answers.setdefault(rank, f"rank {rank} (pid {process.pid}) ended with status {process.exitcode}")
                break
            time.sleep(_POLL_S)
    finally:
        for process in processes:
            if len(answers) == len(processes) and until is None:
                process.join(_LEAVE_S)
            if process.is_alive():
                process.kill()  # one that is halted would not hear a gentler word
            process.join()
    return answers


def _work(
    job: PackJob, layout: Layout, rank: int, device: str, deadline_s: float, meeting: str, said: Any
) -> None:  # fmt: skip
    try:
        own, backend = place(rank, layout, device)
        with joined(layout, rank, meeting, backend, own, deadline_s) as group:
            said.put((rank, train_pack(job, group=group, device=own)))
    except SaescaleError as error:
        said.put((rank, str(error)))
    except Exception as error:
        said.put((rank, f"{type(error).__name__}: {one_line(error)[:300]}"))


def place(rank: int, layout: Layout, device: str) -> tuple[torch.device, Backend]:
    """The device of a process of this machine, and how it speaks to the others: by NCCL where each has a GPU."""
    if device == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // layout.ranks))
        return torch.device("cpu"), "gloo"
    gpus = torch.cuda.device_count()
    if not gpus:
        raise SaescaleError(f"{device}: torch sees no GPU here; give the device cpu")
    own = torch.device("cuda", rank if layout.ranks <= gpus else 0)
    torch.cuda.set_device(own)
    return own, "nccl" if 1 < layout.ranks <= gpus else "gloo"
