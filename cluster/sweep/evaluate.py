"""The evaluations that a sweep file names, measured when all cells are trained and before the report is written."""

import warnings
from collections.abc import Iterable

from saescale.cluster.sweep.spec import SweepSpec
from saescale.cluster.sweep.watcher import SweepDisplay
from saescale.storage.errors import SaescaleError, SaescaleWarning, Superseded
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.plan import Plan, plan_evaluations


def missing_evaluations(spec: SweepSpec, run: RunDirectory) -> Plan:
    """What the sweep asks for and its finished cells do not have. Raises SaescaleError for an unknown evaluation."""
    if not spec.eval.evaluations or not run.cells_with_weights():
        return Plan([], 0)
    return plan_evaluations(run, spec.eval.evaluations)


def evaluate(spec: SweepSpec, run: RunDirectory, address: str | None, display: SweepDisplay) -> None:
    """Measures them: by this process where it is all there is, else by actors on the cluster at `address` (default:
    RAY_ADDRESS) or on this machine's GPUs.

    What cannot be measured is a warning, and does not end the sweep: `saescale eval` says it again. Raises Superseded
    where another driver than the owner of `run` has it.
    """
    plan = missing_evaluations(spec, run)
    if not plan.missing:
        _tell(plan.none)
        return
    display.stage(f"evaluating: {', '.join(entry.evaluation for entry in spec.eval.evaluations)}")
    try:
        why = _measure(spec, run, address, display)
    except Superseded:
        raise
    except SaescaleError as error:
        why = (f"the evaluations were not measured: {error}",)
    _tell(why)


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, SaescaleWarning, stacklevel=3)


def _measure(spec: SweepSpec, run: RunDirectory, address: str | None, display: SweepDisplay) -> tuple[str, ...]:
    """Why some were not measured."""
    # Only here: a sweep that is finished is shown without torch.
    from saescale.cluster.crew.connect import wanted_address
    from saescale.trainers.device import set_threads, usable_cores
    from saescale.trainers.evals.run import evaluate_run

    wanted = spec.eval.evaluations
    if wanted_address(address) is not None or _gpus() > 1:
        from saescale.cluster.crew.evals import evaluate_on_actors

        return evaluate_on_actors(run.url, wanted, (), "auto", address, display, owner=run.owner).why
    set_threads(usable_cores())
    return evaluate_run(run.url, wanted, display=display, owner=run.owner).why


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
