"""Finds the coefficient of a sparsity penalty at which k latents are active on average, and then holds it.

With `coefficient` given there is nothing to find. Else, in the first part of training, its logarithm follows how far
the logarithm of L0 is from where it should be: the sum of what was off so far and a share of what is off now. The sum
is twice as quick once the first swings are over, for the better a dictionary gets, the less of a penalty it takes. L0
answers late, since biases move by a learning rate a step, so what is off is taken as it will be a little later if it
goes on as it does. Where few latents are active L0 answers at once, through W_enc, and looking ahead makes it swing:
so each time that it goes from above to below or back sooner than is looked ahead, for which late answers are too slow,
half as far is looked from then on (as steps get smaller with each change of sign in Kesten 1958). At the end of that
part the coefficient stays at its mean over the last tenth, and as much higher as L0 was too high there, so that what a
cell ends with was trained by one fixed objective, which any other trainer could be given.

Where L0 should be is a line in its logarithm: it starts at the most that a batch had and reaches k after `RAMP` of that
part. With k from the first step the sum would grow while nothing has had the time to answer, and the penalty that it
makes then kills latents that k needs later.

L0 is reported of the averaged weights, and that is some percent off that of the steps (their biases jitter, and an
average is in the middle of it). So every few steps it is measured with the averaged weights too, and compared with what
the steps had, averaged just as long; steps then aim at as much more or fewer. FLOPs count these forward passes.
"""

import math
from typing import NamedTuple

from saescale.trainers.architectures.architecture import FOUND_AT, PenaltySettings, Settings

START = 5e-2
RAMP = 0.2
MEASURED_EVERY = 8  # steps between two measurements with averaged weights, from the end of the ramp on
# A coefficient below the floor, times the start, changes nothing that can be seen: a penalty that got there is off.
FLOOR, CEILING = 1e-3, 1e2
_REACH = 12.0  # how far its logarithm moves in that part by the sum, where L0 is e times too high all the time
_DAMPING = 0.15  # share of what is off now
_AHEAD = 0.1  # how much later, of that part, at first
_SWING = 0.05  # log ratio from which on L0 counts as above or below
_SHORTER, _SHORTEST = 0.5, 0.1  # what a swing leaves of how far is looked ahead, and the least share of it
_SMOOTH, _SMOOTH_SLOPE = 0.8, 0.9  # decays of the averages over steps of L0 and of its change
_MOST = 2.0  # log ratio that counts
_APART = 0.5  # log ratio of L0 with averaged weights to that of steps that is believed
_SMOOTH_APART = 0.7


class _State(NamedTuple):
    finding: bool
    coefficient: float  # of the step that comes
    sum: float = 0.0
    first: float = 0.0  # the highest log of L0 / k in the ramp, at least 0
    off: float = 0.0
    slope: float = 0.0
    mean: float = 0.0  # of log(L0 / k) over steps, as weights are averaged, not yet corrected for its start at 0
    apart: float = 0.0  # log ratio of L0 with averaged weights to that
    measured: int = 0
    ahead: float = 1.0  # share of _AHEAD
    side: float = 0.0  # 1 where L0 was above last, -1 below, from the end of the ramp on
    turned: int = 0  # step at which it last came to that side
    held: float = 0.0  # sum of logarithms in the last tenth, of the coefficient and of what was off
    counted: int = 0


def is_off(settings: Settings, coefficient: float | None) -> bool:
    """Whether the coefficient that was found is that of a penalty which is off: L0 is below k without one."""
    if not isinstance(settings, PenaltySettings) or settings.coefficient is not None or coefficient is None:
        return False
    return coefficient < 1.5 * FLOOR * START


class Controller:
    """Says the coefficient of each step; 0.0 where the settings have none. `ema`: the decay of averaged weights."""

    def __init__(self, settings: Settings, steps: int, ema: float) -> None:
        self._k, self._ema = settings.k, ema
        self._until = max(1, math.ceil(FOUND_AT * steps))
        given = settings.coefficient if isinstance(settings, PenaltySettings) else 0.0
        self._bounds = (math.log(START * FLOOR), math.log(START * CEILING))
        self.state = _State(False, given) if given is not None else _State(True, START, math.log(START))

    @property
    def coefficient(self) -> float:
        return self.state.coefficient

    def measures(self, step: int) -> bool:
        """Whether `after` of that step takes L0 with averaged weights too."""
        return self.state.finding and step > RAMP * self._until and step % MEASURED_EVERY == 0

    def after(self, step: int, active: float | None, averaged: float | None = None) -> None:
        """Takes what the batch of `step`, counted from 1, had: `active` latents a token, `averaged` where `measures`
        says so with averaged weights."""
        last = self.state
        if not last.finding or active is None:
            return
        ratio = math.log(max(active, 1e-3) / self._k)
        ramp = max(0.0, 1 - step / (RAMP * self._until))
        first = max(last.first, ratio) if ramp else last.first
        mean = self._ema * last.mean + (1 - self._ema) * ratio
        apart, measured = last.apart, last.measured
        if averaged is not None:
            new = math.log(max(averaged, 1e-3) / self._k) - mean / (1 - self._ema**step)
            new = min(_APART, max(-_APART, new))
            smooth = min(_SMOOTH_APART, measured / (measured + 1))
            apart, measured = smooth * apart + (1 - smooth) * new, measured + 1
        aim = ramp * first - apart
        off = ratio - aim if step == 1 else _SMOOTH * last.off + (1 - _SMOOTH) * (ratio - aim)
        slope = 0.0 if step == 1 else _SMOOTH_SLOPE * last.slope + (1 - _SMOOTH_SLOPE) * (off - last.off)
        ahead, side, turned = last.ahead, last.side, last.turned
        if not ramp and abs(off) > _SWING:
            if side * off < 0:
                quick = step - turned < _AHEAD * self._until
                ahead, turned = max(_SHORTEST, ahead * _SHORTER) if quick else ahead, step
            side = math.copysign(1.0, off)
        later = min(_MOST, max(-_MOST, off + ahead * _AHEAD * self._until * slope))
        low, high = self._bounds
        quicker = min(1.0, max(0.0, 4 * step / self._until - 1))
        total = min(high, max(low, last.sum + later * _REACH * (1 + quicker) / self._until))
        late = step > 0.9 * self._until
        held, counted = (last.held + total + ratio - aim, last.counted + 1) if late else (0.0, 0)
        found = step >= self._until
        logarithm = held / counted if found else total + _DAMPING * later
        coefficient = math.exp(min(high, max(low, logarithm)))
        self.state = _State(
            not found, coefficient, total, first, off, slope, mean, apart, measured, ahead, side, turned, held, counted
        )  # fmt: skip

    def restore(self, state: dict[str, float | bool | int]) -> None:
        """Goes on from `state._asdict()` of another; a cell that has nothing to find stays as it begins."""
        if self.state.finding:
            self.state = _State(**state)  # type: ignore[arg-type]
