"""Evaluations shared by the actors of a Ray cluster, whose rows this process alone writes."""

from collections.abc import Sequence

from saescale.cluster.crew.eval_crew import EvalCrew
from saescale.storage.rundir import RunDirectory
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.own import own_files
from saescale.trainers.evals.bench import Bench
from saescale.trainers.evals.plan import plan_evaluations
from saescale.trainers.evals.run import EvalDisplay, Evaluated, record
from saescale.trainers.evals.wanted import Entry, entries


def evaluate_on_actors(
    url: str,
    wanted: Sequence[Entry],
    cells: Sequence[str],
    actors: int | str,
    address: str | None,
    display: EvalDisplay,
    trust_remote_code: bool = False,
    owner: str | None = None,
    device_map: str | None = None,
) -> Evaluated:
    """What `evaluate_run` does, by `actors` processes ("auto": one for each GPU or node) of the Ray cluster at
    `address` (default: RAY_ADDRESS, else a local one).

    Run directory and stores have to be in sight of every node. Each process loads the subject and prepares what cells
    share for itself. Raises what `evaluate_run` and `EvalCrew` raise.
    """
    run = RunDirectory(url, owner)
    plan = plan_evaluations(run, entries(run, wanted), cells)
    plan.require_some()
    if not plan.missing:
        return Evaluated(0, plan.there, 0, plan.none)
    bench = Bench(run, device_map=device_map)
    missing = bench.in_order(plan.missing)
    recorded = (run.read_spec() or {}).get("resolved", {}).get("architectures", {})
    own = own_files(name for name in recorded if name in ARCHITECTURES.names())
    with EvalCrew(url, len(missing), actors, address, trust_remote_code, own, device_map, bench.spread) as crew:
        return record(run, plan._replace(missing=missing), crew.measure(missing), display, crew.size)
