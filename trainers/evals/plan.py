"""What is still to be measured on a run: pairs of a finished cell and an evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.evaluation import EVALUATIONS


class Pair(NamedTuple):
    cell: str  # its id
    evaluation: str


class Plan(NamedTuple):
    """Pairs without rows in evals.parquet, cell by cell, and how many have theirs."""

    missing: list[Pair]
    there: int


def plan_evaluations(run: RunDirectory, names: Sequence[str] = (), cells: Sequence[str] = ()) -> Plan:
    """The named evaluations (all that there are where none is named) of the named cells (all finished ones).

    Loads no evaluation. Raises SaescaleError for an unknown evaluation or cell, and where `run` has no finished cell.
    """
    wanted = list(dict.fromkeys(name.replace("-", "_") for name in names or EVALUATIONS.names()))
    for name in wanted:
        EVALUATIONS.check(name)
    if not wanted:
        raise SaescaleError("there is no evaluation; see trainers/evals/README.md for how to add one")
    found = _cells(run, cells)
    table = run.read_evals()
    there = set(zip(table["cell_id"].to_pylist(), table["evaluation"].to_pylist(), strict=True))
    missing = [Pair(cell, name) for cell in found for name in wanted if (cell, name) not in there]
    return Plan(missing, len(found) * len(wanted) - len(missing))


def _cells(run: RunDirectory, wanted: Sequence[str]) -> list[str]:
    """Ids of the finished cells, in the order of the alphabet."""
    finished = run.cells_with_weights()
    if unknown := [cell for cell in wanted if cell not in finished]:
        raise SaescaleError(
            f"{run.url}: there is no finished cell {unknown[0]}; there are {', '.join(finished) or 'none'}"
        )
    if not finished:
        raise SaescaleError(f"{run.url} is no run directory with a finished cell; run saescale sweep first")
    return list(wanted) or finished
