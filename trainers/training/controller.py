"""Finds the coefficient of a sparsity penalty at which k latents are active on average, and then holds it.

With `coefficient` given there is nothing to find. Else, in the first part of training, its logarithm follows how far
the logarithm of L0 is from that of k: the sum of what was off so far and a share of what is off now. L0 answers late,
for biases move by a learning rate a step, so what is off is taken as it will be a little later if it goes on as it
does. At the end of that part the coefficient stays at its mean over the last tenth, so that what a cell ends with was
trained by one fixed objective, which any other trainer could be given.
"""

import math
from typing import NamedTuple

from saescale.trainers.architectures.architecture import PenaltySettings, Settings

FOUND_AT = 0.8  # share of training in which it is found
START = 1e-2
_REACH = 12.0  # how far its logarithm moves in that part by the sum, where L0 is e times k all the time
_DAMPING = 0.5  # share of what is off now
_AHEAD = 0.1  # how much later, of that part
_SMOOTH, _SMOOTH_SLOPE = 0.8, 0.9  # decays of the averages over steps of L0 and of its change
_MOST = 2.0  # log ratio that counts


class _State(NamedTuple):
    finding: bool
    coefficient: float  # of the step that comes
    sum: float = 0.0
    off: float = 0.0
    slope: float = 0.0
    held: float = 0.0  # sum of logarithms in the last tenth
    counted: int = 0


class Controller:
    """Says the coefficient of each step; 0.0 where the settings have none."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self._k = settings.k
        self._until = max(1, math.ceil(FOUND_AT * steps))
        given = settings.coefficient if isinstance(settings, PenaltySettings) else 0.0
        self.state = _State(False, given) if given is not None else _State(True, START, math.log(START))

    @property
    def coefficient(self) -> float:
        return self.state.coefficient

    def after(self, step: int, active: float | None) -> None:
        """Takes what the batch of `step`, counted from 1, had: `active` latents a token."""
        last = self.state
        if not last.finding or active is None:
            return
        new = math.log(max(active, 1e-3) / self._k)
        off = new if step == 1 else _SMOOTH * last.off + (1 - _SMOOTH) * new
        slope = 0.0 if step == 1 else _SMOOTH_SLOPE * last.slope + (1 - _SMOOTH_SLOPE) * (off - last.off)
        later = min(_MOST, max(-_MOST, off + _AHEAD * self._until * slope))
        total = last.sum + later * _REACH / self._until
        late = step > 0.9 * self._until
        held, counted = (last.held + total, last.counted + 1) if late else (0.0, 0)
        found = step >= self._until
        coefficient = math.exp(held / counted if found else total + _DAMPING * later)
        self.state = _State(not found, coefficient, total, off, slope, held, counted)

    def restore(self, state: dict[str, float | bool | int]) -> None:
        """Goes on from `state._asdict()` of another."""
        self.state = _State(**state)  # type: ignore[arg-type]
