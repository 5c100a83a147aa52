"""Finds the coefficient of a sparsity penalty at which k latents are active on average, and then holds it.

With `coefficient` given there is nothing to find. Else, in the first part of training, its logarithm follows how far
the logarithm of L0 is from that of k: the sum of what was off so far and, against overshooting, a share of what is off
now. Afterwards it stays at its mean over the last tenth of that part, so that what a cell ends with was trained by
one fixed objective, which any other trainer could be given.
"""

import math
from collections.abc import Mapping

from saescale.trainers.architectures.architecture import PenaltySettings, Settings

FOUND_AT = 0.8  # share of training in which it is found
START = 1e-2
_REACH = 24.0  # how far the logarithm moves in that part at most, by the sum
_DAMPING = 0.5  # share of what is off now
_SMOOTH = 0.8  # decay of the average of L0 over steps
_MOST = 2.0  # of one step's log ratio


class Controller:
    """`coefficient` of the step that comes; 0.0 where the settings have none."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self.k = settings.k
        given = settings.coefficient if isinstance(settings, PenaltySettings) else 0.0
        self.finding = given is None
        self.coefficient = START if given is None else given
        self._until = max(1, math.ceil(FOUND_AT * steps))
        self._sum, self._off = math.log(self.coefficient) if self.finding else 0.0, 0.0
        self._held, self._counted = 0.0, 0

    def after(self, step: int, active: float | None) -> None:
        """Takes what the batch of `step`, counted from 1, had: `active` latents a token."""
        if not self.finding or active is None:
            return
        off = math.log(max(active, 1e-3) / self.k)
        self._off = off if step == 1 else _SMOOTH * self._off + (1 - _SMOOTH) * off
        bounded = min(_MOST, max(-_MOST, self._off))
        self._sum += bounded * _REACH / self._until / _MOST
        if step > self._until * 9 // 10:
            self._held, self._counted = self._held + self._sum, self._counted + 1
        if step >= self._until:
            self.finding = False
            self.coefficient = math.exp(self._held / self._counted)
        else:
            self.coefficient = math.exp(self._sum + _DAMPING * bounded)

    def state(self) -> dict[str, float | bool | int]:
        """For a checkpoint."""
        return {
            "coefficient": self.coefficient, "finding": self.finding, "sum": self._sum, "off": self._off,
            "held": self._held, "counted": self._counted,
        }  # fmt: skip

    def restore(self, state: Mapping[str, float | bool | int]) -> None:
        self.coefficient, self.finding = float(state["coefficient"]), bool(state["finding"])
        self._sum, self._off = float(state["sum"]), float(state["off"])
        self._held, self._counted = float(state["held"]), int(state["counted"])
