"""What evaluations cost: seconds for a cell, and with them the time that is left.

Each evaluation goes by the cells that were measured in this call; before there is one, by those that the run has rows
of, maybe from another machine.
"""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from saescale.trainers.evals.bench import Measured
from saescale.trainers.evals.plan import Pair


class Costs:
    """`processes` measure side by side, each of which makes for itself what cells share. `earlier`: seconds a cell."""

    def __init__(self, processes: int = 1, earlier: Mapping[str, float] | None = None) -> None:
        self._processes = processes
        self._earlier = dict(earlier or {})
        self._seconds: dict[str, list[float]] = {}  # of each cell, by evaluation
        self._failed: dict[str, list[float]] = {}

    def note(self, done: Measured) -> None:
        """One that failed says nothing of the others, unless none of that evaluation has done better so far."""
        of = self._seconds if done.error is None else self._failed
        of.setdefault(done.pair.evaluation, []).append(done.seconds)

    def of_a_cell(self) -> dict[str, float]:
        """Mean seconds of each evaluation that was measured."""
        return self._earlier | _means(self._seconds)

    def left_s(self, left: Iterable[Pair]) -> float | None:
        """For those that are left; None while one of their evaluations has not been tried yet."""
        each = _means(self._failed) | self.of_a_cell()
        names = [pair.evaluation for pair in left]
        return None if set(names) - each.keys() else sum(each[name] for name in names) / self._processes

    def words(self) -> str:
        """Such as "core 2.1 s, downstream_loss 11 s a cell"; nothing where nothing was measured."""
        each = ", ".join(f"{name} {_short(seconds)}" for name, seconds in self.of_a_cell().items())
        return f"{each} a cell" if each else ""


def earlier_costs(evals: pa.Table, names: Iterable[str]) -> dict[str, float]:
    """Mean seconds a cell of those of the evaluations `names` that evals.parquet has, in their order."""
    rows = zip(*(evals[name].to_pylist() for name in ("evaluation", "cell_id", "seconds")), strict=True)
    of_cells = {(name, cell): seconds for name, cell, seconds in rows if seconds is not None}
    found: dict[str, list[float]] = {name: [] for name in names}
    for (name, _), seconds in of_cells.items():
        if name in found:
            found[name].append(seconds)
    return _means(found)


def _means(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items() if seconds}


def _short(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
