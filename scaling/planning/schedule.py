"""How long jobs take on a cluster whose nodes fail: simulated event by event, as the driver hands out packs.

A job goes to devices as soon as there are enough of them that nobody uses, the costliest first, where a later one that
finds room does not wait for an earlier one that finds none. When a node fails, what each job on it has done since its
last checkpoint is lost; the job goes on elsewhere after `restart_s`, and the node is back after `repair_s`.
"""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from saescale.storage.errors import SaescaleError

_HOPELESS = 4.0  # failures to expect until the next checkpoint, from which on hardly any attempt reaches it


class Job(NamedTuple):
    """`work_s` seconds on `gpus` devices at once, of which each checkpoint holds all up for `checkpoint_s`."""

    work_s: float
    gpus: int = 1
    checkpoint_s: float = 0.0


class Cluster(NamedTuple):
    """`gpus` on nodes of `per_node`, each of which fails every `mtbf_s` seconds on average (exponential)."""

    gpus: int
    per_node: int = 8
    mtbf_s: float = math.inf
    restart_s: float = 0.0
    repair_s: float = 0.0
    checkpoint_every_s: float = 60.0

    @property
    def nodes(self) -> list[int]:
        """Devices of each."""
        whole, rest = divmod(self.gpus, self.per_node)
        return [self.per_node] * whole + ([rest] if rest else [])


class Outcome(NamedTuple):
    """Seconds until all is done, seconds of work that devices do again, failures that hit a job, and of each job when
    it first began and when it was done."""

    seconds: float
    lost_s: float
    failures: int
    spans: tuple[tuple[float, float], ...]


def wall_s(work_s: float, checkpoint_s: float, every_s: float) -> float:
    """With a checkpoint after every `every_s` of work but the last."""
    return work_s + checkpoint_s * max(0, math.ceil(work_s / every_s - 1e-9) - 1)


def best_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose the least (Young 1974), of a job of so many seconds between failures."""
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def require_progress(jobs: Sequence[Job], cluster: Cluster) -> None:
    """Raises SaescaleError for a job that finds no room, and where nodes fail before any checkpoint is reached."""
    for job in jobs:
        if job.gpus > cluster.gpus:
            raise SaescaleError(
                f"a cell needs a mesh of {job.gpus} GPUs and the cluster has {cluster.gpus}: give more (--gpus), or a "
                "GPU with more memory (--gpu)"
            )
        every = min(cluster.checkpoint_every_s, job.work_s) + job.checkpoint_s + cluster.restart_s
        if every * math.ceil(job.gpus / cluster.per_node) > _HOPELESS * cluster.mtbf_s:
            raise SaescaleError(
                f"a job on {job.gpus} GPUs takes {every:.3g} s to its next checkpoint, and a node of it fails every "
                f"{cluster.mtbf_s / math.ceil(job.gpus / cluster.per_node):.3g} s: it gets nowhere; take checkpoints "
                "more often (resources.checkpoint_every_s)"
            )


class _Running(NamedTuple):
    number: int
    began: float  # of its work: after its restart
    taken: dict[int, int]  # devices of each node
    version: int


def simulate(jobs: Sequence[Job], cluster: Cluster, rng: np.random.Generator) -> Outcome:
    """One possible course; `jobs` the costliest first."""
    every = cluster.checkpoint_every_s
    free = dict(enumerate(cluster.nodes))
    left = [job.work_s for job in jobs]
    begun: list[float | None] = [None] * len(jobs)
    done = [0.0] * len(jobs)
    waiting, ready = list(range(len(jobs))), [0.0] * len(jobs)
    running: dict[int, _Running] = {}
    events: list[tuple[float, int, int, int]] = []  # time, kind, number, version; _END before a failure at that moment
    now = lost = 0.0
    failures = version = 0

    def fail_later(node: int) -> None:
        if cluster.mtbf_s < math.inf:
            heappush(events, (now + rng.exponential(cluster.mtbf_s), _FAILS, node, 0))

    for node in free:
        fail_later(node)
    while waiting or running:
        for number in list(waiting):
            taken = _place(jobs[number].gpus, free)
            if taken is None:
                if not free or not any(free.values()):
                    break
                continue
            waiting.remove(number)
            version += 1
            began = max(now, ready[number]) + (cluster.restart_s if begun[number] is not None else 0.0)
            begun[number] = now if begun[number] is None else begun[number]
            running[number] = _Running(number, began, taken, version)
            heappush(events, (began + wall_s(left[number], jobs[number].checkpoint_s, every), _END, number, version))
        now, kind, number, of = heappop(events)
        if kind == _END and number in running and running[number].version == of:
            _give_back(running.pop(number), free)
            done[number] = now
        elif kind == _BACK:
            free[number] = cluster.nodes[number]
            fail_later(number)
        elif kind == _FAILS:
            for run in [run for run in running.values() if number in run.taken]:
                failures += 1
                del running[run.number]
                _give_back(run, free)
                saved, again = _reached(
                    max(0.0, now - run.began), left[run.number], every, jobs[run.number].checkpoint_s
                )
                lost += again * jobs[run.number].gpus
                left[run.number] -= saved
                waiting.append(run.number)
            waiting.sort()
            del free[number]
            heappush(events, (now + cluster.repair_s, _BACK, number, 0))
    return Outcome(max(done, default=0.0), lost, failures, tuple(zip((b or 0.0 for b in begun), done, strict=True)))


def _reached(spent_s: float, left_s: float, every_s: float, checkpoint_s: float) -> tuple[float, float]:
    """Seconds of work, of `left_s`, that are saved after an attempt of `spent_s`, and those that are lost."""
    checkpoints, since = divmod(spent_s, every_s + checkpoint_s)
    saved = min(checkpoints * every_s, left_s)
    return saved, min(since, every_s, left_s - saved)


_END, _BACK, _FAILS = range(3)


def _place(gpus: int, free: dict[int, int]) -> dict[int, int] | None:
    """Devices of as few nodes as can be: the fullest node that has them all, else the emptiest ones."""
    fitting = [node for node, count in free.items() if count >= gpus]
    if fitting:
        node = min(fitting, key=lambda node: (free[node], node))
        free[node] -= gpus
        return {node: gpus}
    if sum(free.values()) < gpus:
        return None
    taken: dict[int, int] = {}
    for node in sorted(free, key=lambda node: (-free[node], node)):
        if gpus and free[node]:
            taken[node] = min(gpus, free[node])
            free[node] -= taken[node]
            gpus -= taken[node]
    return taken


def _give_back(run: _Running, free: dict[int, int]) -> None:
    for node, count in run.taken.items():
        free[node] += count


def courses(jobs: Sequence[Job], cluster: Cluster, count: int, seed: int = 0) -> list[Outcome]:
    """`count` of them, alike for a seed. Raises SaescaleError as `require_progress` does."""
    require_progress(jobs, cluster)
    return [simulate(jobs, cluster, np.random.default_rng([seed, number])) for number in range(count)]
