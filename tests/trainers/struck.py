"""A mesh of new processes one of which is struck (SIGKILL or SIGSTOP) as it comes to do a certain thing.

The process strikes itself, just before it does the thing for the n-th time: whoever watches it from outside may find no
processor before it is over.
"""

import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.mesh import channel, distributed, watch
from saescale.trainers.mesh.distributed import joined
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.network import meeting_at
from saescale.trainers.training.job import PackJob
from saescale.trainers.training.train import train_pack
from tests.trainers.forked import forked

PLACES: dict[str, tuple[Any, str]] = {
    "start": (distributed, "Watch"),
    "a collective": (channel, "_all_gather"),
    "an evaluation": (HeldOut, "evaluate"),
    "a part of a checkpoint": (RunDirectory, "write_checkpoint_part"),
    "the pointer": (RunDirectory, "commit_checkpoint"),
    "the weights": (RunDirectory, "name_now"),
    "the result": (RunDirectory, "write_cell_result"),
}


class Strike(NamedTuple):
    """Before rank `rank` does what PLACES calls `place` for the `number`-th time, from 1."""

    rank: int
    place: str
    number: int
    how: signal.Signals


def _arm(strike: Strike) -> None:
    where, name = PLACES[strike.place]
    plain: Callable[..., Any] = getattr(where, name)
    seen = 0

    def struck(*given: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == strike.number:
            os.kill(os.getpid(), strike.how)
        return plain(*given, **named)

    setattr(where, name, struck)


def _work(
    job: PackJob, layout: Layout, rank: int, meeting: str, strike: Strike | None, deadline_s: float, way: Any,
    environment: dict[str, str],
) -> None:  # fmt: skip
    os.environ.update(environment)  # the server that forks may be older than it
    torch.set_num_threads(1)
    watch._MISSED_S, watch._ANSWER_S, distributed.MEET_S = 1.5, 1.5, deadline_s
    if strike is not None and strike.rank == rank:
        _arm(strike)
    cpu = torch.device("cpu")
    try:
        with joined(layout, rank, meeting, "gloo", cpu, deadline_s) as group:
            answer: Any = train_pack(job, group=group, device=cpu).results
    except SaescaleError as error:
        answer = f"{type(error).__name__}: {error}"
    way.send(answer)


def train_struck(job: PackJob, layout: Layout, strike: Strike | None = None, deadline_s: float = 60.0) -> list[Any]:
    """What each rank ended with: results or an error's text; None of the one that was struck."""
    context, meeting = forked(), meeting_at("127.0.0.1")
    ways = [context.Pipe(duplex=False) for _ in range(layout.ranks)]
    processes = [
        context.Process(
            target=_work, args=(job, layout, rank, meeting, strike, deadline_s, way, dict(os.environ)), daemon=True
        )
        for rank, (_, way) in enumerate(ways)
    ]
    for process in processes:
        process.start()
    try:
        answers = []
        for rank, (mine, _) in enumerate(ways):
            if strike is not None and strike.rank == rank:
                answers.append(None)
                continue
            assert mine.poll(120), f"rank {rank} says nothing"
            answers.append(mine.recv())
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()
