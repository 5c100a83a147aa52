"""What evaluations cost: seconds for a cell, measured on those that are done, and with them the time that is left."""

from collections.abc import Iterable

from saescale.trainers.evals.bench import Measured
from saescale.trainers.evals.plan import Pair


class Costs:
    """`processes` measure side by side, each of which makes for itself what cells share."""

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._seconds: dict[str, list[float]] = {}  # of each cell, by evaluation

    def note(self, done: Measured) -> None:
        """One that failed at once says nothing of the others."""
        if done.error is None:
            self._seconds.setdefault(done.pair.evaluation, []).append(done.seconds)

    def of_a_cell(self) -> dict[str, float]:
        """Mean seconds of each evaluation that was measured."""
        return {name: sum(seconds) / len(seconds) for name, seconds in self._seconds.items()}

    def left_s(self, left: Iterable[Pair]) -> float | None:
        """For those that are left; None while one of their evaluations has not been measured yet."""
        each = self.of_a_cell()
        names = [pair.evaluation for pair in left]
        return None if set(names) - each.keys() else sum(each[name] for name in names) / self._processes

    def words(self) -> str:
        """Such as "core 2.1 s, downstream_loss 11 s a cell"; nothing before the first is done."""
        each = ", ".join(f"{name} {_short(seconds)}" for name, seconds in self.of_a_cell().items())
        return f"{each} a cell" if each else ""


def _short(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
