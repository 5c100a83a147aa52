"""What evaluations cost: seconds for a cell, those of what cells share, and with them the time that is left.

Each evaluation goes by the cells that were measured in this call; before there is one, by those that the run has rows
of, maybe from another machine.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pyarrow as pa

from saescale.trainers.evals.bench import Measured
from saescale.trainers.evals.plan import Pair

_WORTH_A_WORD_S = 1.0


class Earlier(NamedTuple):
    """Seconds by evaluation: mean ones of a cell, and the most that a process took for what cells share."""

    of_a_cell: Mapping[str, float] = {}
    shared: Mapping[str, float] = {}


class Costs:
    """`processes` measure side by side, each of which makes for itself what cells share."""

    def __init__(self, processes: int = 1, earlier: Earlier | None = None) -> None:
        self._processes = processes
        self._earlier = earlier or Earlier()
        self._seconds: dict[str, list[float]] = {}  # of each cell, by evaluation
        self._failed: dict[str, list[float]] = {}

    def note(self, done: Measured) -> None:
        """One that failed says nothing of the others, unless none of that evaluation has done better so far."""
        of = self._seconds if done.error is None else self._failed
        of.setdefault(done.pair.evaluation, []).append(done.seconds)

    def of_a_cell(self) -> dict[str, float]:
        """Mean seconds of each evaluation that was measured."""
        return {**self._earlier.of_a_cell, **_means(self._seconds)}

    def shared_s(self, left: Iterable[Pair]) -> float:
        """For what is still to be made for those that are left, once for all cells."""
        begun = self._seconds.keys() | self._failed.keys()
        names = {pair.evaluation for pair in left} - begun
        return sum(self._earlier.shared.get(name, 0.0) for name in names)

    def left_s(self, left: Iterable[Pair]) -> float | None:
        """For those that are left; None while one of their evaluations has not been tried yet."""
        each, left = _means(self._failed) | self.of_a_cell(), list(left)
        if {pair.evaluation for pair in left} - each.keys():
            return None
        return sum(each[pair.evaluation] for pair in left) / self._processes + self.shared_s(left)

    def words(self, left: Iterable[Pair] = ()) -> str:
        """Such as "core 2.1 s, probe_loss 11 s a cell and 2.7 min once"; nothing where nothing was measured."""
        each = ", ".join(f"{name} {_short(seconds)}" for name, seconds in self.of_a_cell().items())
        shared = self.shared_s(left)
        return f"{each} a cell" + (f" and {_short(shared)} once" if shared >= _WORTH_A_WORD_S else "") if each else ""


def earlier_costs(evals: pa.Table, names: Iterable[str]) -> Earlier:
    """Of those of the evaluations `names` that evals.parquet has, in their order."""
    columns = (evals[name].to_pylist() for name in ("evaluation", "cell_id", "seconds", "shared_seconds"))
    of_cells = {(name, cell): seconds for name, cell, *seconds in zip(*columns, strict=True)}
    own: dict[str, list[float]] = {name: [] for name in names}
    shared: dict[str, float] = {}
    for (name, _), (seconds, of_all) in of_cells.items():
        if name in own and seconds is not None:
            own[name].append(seconds)
            shared[name] = max(shared.get(name, 0.0), of_all or 0.0)
    return Earlier(_means(own), shared)


def _means(found: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(seconds) / len(seconds) for name, seconds in found.items() if seconds}


def _short(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
