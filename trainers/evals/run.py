"""Evaluations of the finished cells of a run directory, whose rows go into its evals.parquet.

What is there already is not measured again, and each evaluation of each cell is written when it is done: killed at any
moment, the same call goes on from there.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.bench import Bench, Measured
from saescale.trainers.evals.costs import Costs, earlier_costs
from saescale.trainers.evals.plan import Pair, Plan, plan_evaluations
from saescale.trainers.evals.wanted import Entry, entries


class EvalDisplay(Protocol):
    """What shows the progress of evaluations."""

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None:
        """Pairs of cell and evaluation that are done (first none), what is known of their cost, and seconds left where
        that is known."""


class Evaluated(NamedTuple):
    """What a call did, in pairs of cell and evaluation; `why` has a line for each reason of failures, for each
    evaluation that no cell, or no subject or SAE of that kind, can have: where there is anything else, no failure; and
    for what those that were measured leave out."""

    measured: int
    there: int
    failed: int
    why: tuple[str, ...]


def evaluate_run(
    url: str,
    wanted: Sequence[Entry] = (),
    cells: Sequence[str] = (),
    cache: str | None = None,
    display: EvalDisplay | None = None,
    trust_remote_code: bool = False,
    owner: str | None = None,
    device_map: str | None = None,
) -> Evaluated:
    """Measures the wanted evaluations (where none is, those of `wanted.py` and the sweep file) of the named cells (all
    finished ones), in this process.

    The source of each cell is the store of sweep.yaml that it was trained on. What fails for a cell is told in `why`,
    and so are evaluations that no cell can have; the others go on. `owner`: the driver on whose behalf rows are written
    (storage/lease.py); for the others see Bench.

    Raises SaescaleError for an unknown evaluation, cell or column, where no cell can have anything of what is wanted,
    and where `url` is no run with a finished cell or none of its stores can be opened.
    """
    run = RunDirectory(url, owner)
    plan = plan_evaluations(run, entries(run, wanted), cells)
    plan.require_some()
    if not plan.missing:
        return Evaluated(0, plan.there, 0, plan.none)
    bench = Bench(run, cache, trust_remote_code, device_map)
    missing = bench.in_order(plan.missing)
    return record(run, plan._replace(missing=missing), map(bench.measure, missing), display)


def record(
    run: RunDirectory, plan: Plan, results: Iterable[Measured], display: EvalDisplay | None, processes: int = 1
) -> Evaluated:
    """Writes each of `results`, one for each missing pair of the plan in any order, when it is there."""
    left, failed, unsuited, left_out = dict.fromkeys(plan.missing), _Reasons(), _Reasons(), _Reasons()
    costs = Costs(processes, earlier_costs(run.read_evals(), [pair.evaluation for pair in left]))
    total, first = len(left), plan.missing[0]
    if display is not None:
        unknown = f"{first.evaluation} of {first.cell} is the first, by which the others are told"
        display.evals(0, total, costs.words(left) or unknown, costs.left_s(left))
    for done in results:
        del left[done.pair]
        if done.error is None:
            took = {"seconds": round(done.seconds, 3), "shared_seconds": round(done.shared_s, 3)}
            rows = [row | took for row in done.rows]
            for row in done.rows:
                if why := row.get("left_out"):
                    left_out.add(done.pair, f"no {row['metric']}: {why}")
            run.write_evals(done.pair.cell, done.pair.evaluation, rows, done.metrics)
        else:
            (unsuited if done.unsuited else failed).add(done.pair, done.error)
        costs.note(done)
        if display is not None:
            display.evals(total - len(left), total, costs.words(left), costs.left_s(left))
    measured = total - len(failed) - len(unsuited)
    failures = len(failed) + (0 if measured or plan.there else len(unsuited))
    return Evaluated(
        measured, plan.there, failures, (*failed.lines(), *unsuited.lines(), *left_out.lines(), *plan.none)
    )


class _Reasons:
    """Those of one reason are one line, however many cells they are."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], list[str]] = {}

    def add(self, pair: Pair, error: str) -> None:
        self._cells.setdefault((pair.evaluation, error), []).append(pair.cell)

    def __len__(self) -> int:
        return sum(map(len, self._cells.values()))

    def lines(self) -> tuple[str, ...]:
        return tuple(
            f"{evaluation} of {cells[0] if len(cells) == 1 else f'{len(cells)} cells'}: {error}"
            for (evaluation, error), cells in self._cells.items()
        )
