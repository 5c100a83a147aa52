"""How workers are let end: they save their checkpoints first, where they can."""

import time
from typing import Any

import ray

from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.crew.train_worker import Trained
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.standing import Attempt, ask
from saescale.cluster.sweep.watcher import SweepDisplay
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.lease import Lease
from saescale.storage.waiting import waiting

TIMEOUT_S = 45.0  # less than a job that is stopped gets (service.STOP_WAIT_S)
LOOK_S = 1.0  # between two looks at workers that stop
HOPELESS_S = 15.0  # since when a store has to be silent; a large checkpoint takes a while to be put there


def stop(running: dict[Any, Attempt], ledger: Ledger, crew: TrainCrew, lease: Lease, display: SweepDisplay) -> bool:
    """Tells the workers of `running` (by the reference of `train`) to save and return, and takes up what they reached.

    Returns whether the stores answer: a worker that waits for one that does not is not waited for.
    """
    if not running:
        return True
    for attempt in running.values():
        attempt.worker.stop.remote()
    display.stage("stopping: the workers save their checkpoints")
    until, hopeless = time.monotonic() + TIMEOUT_S, False
    with waiting("the workers to save their checkpoints (a second Ctrl-C ends them at once)", TIMEOUT_S):
        while running and time.monotonic() < until and not hopeless:
            ready, _ = ray.wait(list(running), num_returns=len(running), timeout=LOOK_S)
            for reference in ready:
                del running[reference]
                _take(reference, ledger, crew, lease)
            ask(running.values())
            hopeless = bool(running) and all(_is_stuck(attempt) for attempt in running.values())
    if running:
        why = "since a store does not answer" if hopeless else f"within {TIMEOUT_S:.0f} s"
        crew.warn(f"{len(running)} workers did not save {why}; they go on from what they had")
    return not hopeless


def _is_stuck(attempt: Attempt) -> bool:
    return any(time.time() - wait.since > HOPELESS_S for wait in attempt.waits)


def _take(reference: Any, ledger: Ledger, crew: TrainCrew, lease: Lease) -> None:
    try:
        trained: Trained = ray.get(reference)
        if not lease.lost:  # else the tables are another driver's
            ledger.record(trained.results)
    except (ray.exceptions.RayError, SaescaleError) as error:
        crew.warn(f"a worker failed while stopping: {one_line(getattr(error, 'cause', None) or error)[:300]}")
