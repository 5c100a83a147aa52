"""A cell that several workers share: which ones are, how they begin together, and how they part when one has ended."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from saescale.cluster.crew.claims import NeedsOnMesh
from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.crew.train_worker import Place
from saescale.cluster.sweep.standing import Attempt, Pack
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout, MeshBroken
from saescale.trainers.training.job import PackJob

COMPANY_S = 20.0  # for the others of a mesh to break off by themselves, after one ended


class Meshes(NamedTuple):
    """Which cells several workers share, by their names, and what each of these needs."""

    layouts: Mapping[str, Layout] = {}
    needs: NeedsOnMesh = lambda cell, layout: 0.0

    def of(self, cells: Sequence[Cell]) -> Layout:
        return self.layouts.get(cells[0].cell_id, Layout()) if len(cells) == 1 else Layout()


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
    fit = [worker for worker, info in crew.ready.items() if pack.bytes <= info.memory]
    if len(fit) < pack.layout.ranks and not crew.is_starting:
        raise SaescaleError(
            f"cell {pack.cells[0].cell_id} is to be shared by {pack.layout.ranks} workers ({pack.layout}) with "
            f"{pack.bytes / 2**30:.1f} GiB each, and of {len(crew.ready)} that came up {len(fit)} have so "
            "much; look at the cluster (`ray status`), or ask for a smaller mesh (resources.mesh)"
        )


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
