"""A cell that several workers share: which ones are, how they begin together, and how they part when one has ended."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray

from saescale.cluster.crew.claims import NeedsOnMesh
from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.crew.train_worker import Place
from saescale.cluster.sweep.standing import Attempt, Pack
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.waiting import Wait, hear
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout, MeshBroken
from saescale.trainers.training.job import PackJob

PATIENCE_S, MOST_PATIENCE_S = 60.0, 900.0  # of workers that wait for more of them, before they are given away
ROOM_S = 5.0  # between two looks why there are no more
COMPANY_S = 20.0  # for the others of a mesh to break off by themselves, after one ended


class Meshes(NamedTuple):
    """Which cells several workers share, by their names, and what each of these needs."""

    layouts: Mapping[str, Layout] = {}
    needs: NeedsOnMesh = lambda cell, layout: 0.0

    def of(self, cells: Sequence[Cell]) -> Layout:
        return self.layouts.get(cells[0].cell_id, Layout()) if len(cells) == 1 else Layout()


def nearest(free: Sequence[Any], layout: Layout, node_of: Callable[[Any], str]) -> list[Any]:
    """Of free workers as many as the layout takes, in the order of their ranks. The shards of a replica, which have to
    say most to each other, are on one node where one has so many free, the fullest such; else on as few as can be."""
    by_node: dict[str, list[Any]] = defaultdict(list)
    for worker in free:
        by_node[node_of(worker)].append(worker)
    chosen: list[Any] = []
    for replica in range(layout.replicas):
        while left := (replica + 1) * layout.shards - len(chosen):
            there = [workers for workers in by_node.values() if workers]
            enough = [workers for workers in there if len(workers) >= left]
            node = min(enough, key=len) if enough else max(there, key=len)
            chosen += node[:left]
            del node[:left]
    return chosen


def fit(pack: Pack, crew: TrainCrew) -> list[Any]:
    """The workers that have the memory for it."""
    return [worker for worker, info in crew.ready.items() if pack.bytes <= info.memory]


def begin(
    workers: Sequence[Any], job: PackJob, number: int, layout: Layout, deadline_s: float
) -> tuple[Any, dict[Any, Any]]:
    """Has one worker, or as many as the layout takes, train a job. The reference of the first one's `train`, and the
    other workers by those of theirs.

    deadline_s: how long a worker may keep the others waiting.
    """
    worker, *others = workers
    if not others:
        return worker.train.remote(job, number), {}
    # Where they meet is the first one's to say; it goes from worker to worker, and nobody waits for it here.
    meeting = worker.meeting.remote()
    places = [Place(layout, rank, deadline_s) for rank in range(len(workers))]
    reference = worker.train.remote(job, number, places[0], meeting)
    company = {
        other.train.remote(job, number, place, meeting): other
        for other, place in zip(others, places[1:], strict=True)
    }  # fmt: skip
    return reference, company


def require_company(pack: Pack, crew: TrainCrew) -> None:
    """Raises SaescaleError where a shared pack waits for more workers than will ever be there."""
    fitting = len(fit(pack, crew))
    if fitting < pack.layout.ranks and not crew.is_starting:
        raise SaescaleError(
            f"cell {pack.cells[0].cell_id} is to be shared by {pack.layout.ranks} workers ({pack.layout}) with "
            f"{pack.bytes / 2**30:.1f} GiB each, and of {len(crew.ready)} that came up {fitting} have so "
            "much; look at the cluster (`ray status`), or ask for a smaller mesh (resources.mesh)"
        )


class Company:
    """A shared pack that waits for more workers than have come up. That is said; and since another sweep may wait for
    those that this one holds, and both for ever, they are given away for a while when they have nothing else to do."""

    def __init__(self, crew: TrainCrew) -> None:
        self._crew, self._since, self._said = crew, 0.0, (0.0, "")
        self._patience = self._quiet = 0.0

    def look(self, pack: Pack | None, working: bool) -> None:
        """`pack`: the first such one; `working`: whether anything is trained."""
        now = time.time()
        if pack is None:
            self._since = 0.0
            hear("company", [])
            return
        if not self._since:
            self._since, self._patience = now, PATIENCE_S * (1 + random.random())  # not all sweeps at once
        if now - self._said[0] > ROOM_S:
            self._said = now, self._crew.no_room()
        there, why = len(fit(pack, self._crew)), self._said[1]
        what = (
            f"{pack.layout.ranks} workers for cell {pack.cells[0].cell_id} ({pack.layout}), of which {there} are up"
            f"{f': {why}' if why else ''}"
        )
        hear("company", [Wait(what, self._since)])
        if working or not self._crew.idle:
            self._quiet = now
        elif now - max(self._since, self._quiet) > self._patience:
            self._crew.warn(f"{there} workers wait for others, and are given away to who needs no more than them")
            self._crew.give_way(self._patience * random.random())
            self._quiet, self._patience = now, min(MOST_PATIENCE_S, 2 * self._patience)


def failed(reference: Any) -> bool:
    """Whether a worker whose `train` has ended did not do so by itself."""
    try:
        ray.get(reference)
    except (ray.exceptions.RayError, SaescaleError):
        return True
    return False


def part(running: Attempt, first: Any, crew: TrainCrew) -> tuple[Any, Any, int]:
    """Takes the other workers of a mesh back when the first one has ended, or others in the place of those that are
    gone or hang.

    Who tells what became of the pack, and the reference that does: the first one, or where that only knows that the
    mesh broke, the one which failed for a reason of its own. And how many workers were lost.
    """
    ended, late = ray.wait(list(running.company), num_returns=len(running.company), timeout=COMPANY_S)
    teller, telling, lost = running.worker, first, 0
    for reference in ended:
        worker = running.company[reference]
        try:
            ray.get(reference)
            crew.idle.append(worker)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MeshBroken):
                crew.idle.append(worker)
                if running.killed is not None:  # the first one, which can say nothing any more
                    crew.warn(one_line(error.cause))
            elif _broke(telling):
                crew.idle.append(teller)
                teller, telling = worker, reference
            else:
                crew.replace(worker)
        except ray.exceptions.RayError as error:
            name = crew.replace(worker, error).name
            lost += 1
            crew.warn(f"a worker of a mesh died ({name})")
    for reference in late:
        worker = running.company[reference]
        crew.warn(f"worker {crew.ready[worker].name} does not leave its mesh and is ended")
        crew.kill(worker)
        crew.replace(worker)
    return teller, telling, lost


def _broke(reference: Any) -> bool:
    """Whether a worker ended because others of its mesh did."""
    if not ray.wait([reference], timeout=0)[0]:
        return False
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return isinstance(error.cause, MeshBroken)
    except ray.exceptions.RayError:
        return False
    return False
