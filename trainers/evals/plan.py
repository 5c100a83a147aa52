"""What is still to be measured on a run: pairs of a finished cell and an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saescale.storage.columns import RESULTS
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.evaluation import EVALUATIONS
from saescale.trainers.evals.wanted import Wanted


class Pair(NamedTuple):
    cell: str  # its id
    evaluation: str
    latents: int | None = None  # how many it looks at; None: as many as it says itself
    others: tuple[str, ...] = ()  # ids of the cells that it is compared with


class Plan(NamedTuple):
    """Pairs without rows in evals.parquet, cell by cell, how many have theirs, and why some evaluations have none."""

    missing: list[Pair]
    there: int
    none: tuple[str, ...] = ()

    def require_some(self) -> None:
        """Raises SaescaleError where nothing that was asked for can be."""
        if not self.missing and not self.there:
            raise SaescaleError("; ".join(self.none))


def plan_evaluations(run: RunDirectory, wanted: Sequence[Wanted], cells: Sequence[str] = ()) -> Plan:
    """The wanted evaluations of the named cells (all finished ones).

    Rows with another number of latents than is asked for, or from a comparison with other cells than there are now,
    do not count as there. Loads those evaluations alone that compare cells. Raises SaescaleError for an unknown
    evaluation, cell or column, and where `run` has no finished cell.
    """
    for entry in wanted:
        entry.check()
    finished = finished_cells(run)
    if unknown := [cell for cell in cells if cell not in finished]:
        raise SaescaleError(f"{run.url}: there is no finished cell {unknown[0]}; there are {', '.join(finished)}")
    order = {cell: place for place, cell in enumerate(cells or finished)}
    asked = [finished[cell] for cell in order]
    found: list[Pair] = []
    none: dict[str, list[str]] = {}  # the evaluations that no cell can have, by the reason
    for entry in wanted:
        name = entry.evaluation
        pairs = [Pair(cell, name, entry.latents) for cell in entry.select(asked, run.url)]
        if not pairs:
            none.setdefault(entry.no_cell(asked, run.url), []).append(name)
        elif EVALUATIONS.defines(name, "partners"):
            pairs = [pair._replace(others=_partners(pair, finished)) for pair in pairs]
            pairs = [pair for pair in pairs if pair.others]
            if not pairs:
                none.setdefault(f"{run.url}: no cell has others that it would be compared with", []).append(name)
        found += pairs
    found.sort(key=lambda pair: order[pair.cell])
    measured = _measured(run)
    missing = [pair for pair in found if not _is_there(pair, measured)]
    why = tuple(f"{', '.join(names)}: {reason}" for reason, names in none.items())
    return Plan(missing, len(found) - len(missing), why)


def finished_cells(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The rows of results.parquet of the cells that have an SAE, by their ids, in the order of the alphabet.

    While a sweep runs, and at its end, the table may not have its last cells yet: theirs are read from cells/. Raises
    SaescaleError where there is none.
    """
    rows = {row["cell_id"]: row for row in run.read_results().to_pylist() if row["status"] == "done"}
    finished = {}
    for cell in run.cells_with_weights():
        row = rows.get(cell) or run.read_cell_result(cell) or {}
        finished[cell] = {name: row.get(name) for name in RESULTS.names} | {"cell_id": cell}
    if not finished:
        raise SaescaleError(f"{run.url} is no run directory with a finished cell; run saescale sweep first")
    return finished


def _measured(run: RunDirectory) -> dict[tuple[str, str], tuple[int | None, str | None]]:
    """With how many latents, and compared with which cells, each pair of cell and evaluation was measured."""
    evals = run.read_evals()
    columns = [evals[name].to_pylist() for name in ("cell_id", "evaluation", "latents", "others")]
    return {(cell, name): (latents, others) for cell, name, latents, others in zip(*columns, strict=True)}


def _is_there(pair: Pair, measured: Mapping[tuple[str, str], tuple[int | None, str | None]]) -> bool:
    if (pair.cell, pair.evaluation) not in measured:
        return False
    latents, others = measured[pair.cell, pair.evaluation]
    return pair.latents in (None, latents) and " ".join(pair.others) == (others or "")


def _partners(pair: Pair, finished: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    name, cell = pair.evaluation, pair.cell
    try:
        found = tuple(EVALUATIONS.load(name).partners(cell, list(finished.values())))
    except SaescaleError:
        raise
    except Exception as error:  # maybe of a user's own
        raise SaescaleError(f"`partners` of {name} fails with {type(error).__name__}: {one_line(error)}") from error
    if unknown := [other for other in found if other not in finished or other == cell]:
        raise SaescaleError(f"`partners` of {name} names {unknown[0]!r} for {cell}, which is no other finished cell")
    return found
