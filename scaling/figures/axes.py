"""Axes with the ticks that a careful paper would have."""

from collections.abc import Iterable, Sequence

import numpy as np

from saescale.scaling.figures.views import Axis

_MOST_COUNTS = 8
# Ticks of each decade; and, over less than one, how far they are apart, of the decade that the axis ends in.
_MANTISSAS = ([1], [1, 2, 5], [1, 2, 3, 5, 7], range(1, 10))
_STEPS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def count_axis(label: str, counts: Iterable[float], room: float = 1.12) -> Axis:
    """A logarithmic axis with the counts that occur as ticks (512, 1,024 ...), thinned where there are many."""
    values = np.unique(np.asarray(list(counts), dtype=float))
    step = -(-len(values) // _MOST_COUNTS)
    ticks = tuple((float(v), f"{v:,.0f}") for v in values[::step])
    minor = tuple(float(v) for v in values if float(v) not in dict(ticks))
    return Axis(label, "log", float(values[0] / room), float(values[-1] * room), ticks, minor)


def log_axis(label: str, values: np.ndarray) -> Axis:
    """A logarithmic axis over positive `values`, round ticks in plain numbers also over much less than a decade."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    room = max((high / low) ** 0.05, 1.02)
    low, high = low / room, high * room
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = [share * 10.0 ** np.floor(np.log10(high)) for share in _STEPS]
    grids = [np.outer(decades, list(mantissas)).ravel() for mantissas in _MANTISSAS]
    grids += [np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step for step in steps]
    grids = [grid[(grid >= low) & (grid <= high)] for grid in grids]
    enough = next((i for i, grid in enumerate(grids) if len(grid) >= 4), len(grids) - 1)
    major = grids[enough]
    finer = (
        grid for grid in grids[enough + 1 :]
        if len(grid) > 1.5 * len(major) and np.isclose(grid[:, None], major).sum() == len(major)
    )  # fmt: skip
    minor = next(finer, major)
    minor = minor[~np.isclose(minor[:, None], major).any(axis=1)]
    return Axis(
        label,
        "log",
        low,
        high,
        tuple((float(v), f"{v:,.0f}" if v >= 1000 else f"{v:.4g}") for v in major),
        tuple(minor.tolist()),
    )


def power_axis(label: str, low: float, high: float) -> Axis:
    """A logarithmic axis over orders of magnitude, ticks as "10^12", "2×10^12" over fewer than two; over less
    than lies between these, the next finer ones."""
    low, high = low / 1.15, high * 1.15
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    choices = ((1, 2, 5) if high / low < 100 else (1,), range(1, 10), np.arange(10, 100) / 10)
    grids = ([(m, p) for p in decades for m in marks if low <= m * 10.0**p <= high] for marks in choices)
    chosen = next(filter(None, grids))  # room is left for a mark: high / low >= 1.3, and the last are 1.1 apart at most
    step = -(-len(chosen) // 8)
    ticks = tuple((float(m * 10.0**p), f"10^{p:.0f}" if m == 1 else f"{m:g}×10^{p:.0f}") for m, p in chosen[::step])
    minor = [float(m * 10.0**p) for p in decades for m in range(1, 10)]
    return Axis(label, "log", low, high, ticks, tuple(v for v in minor if low <= v <= high and v not in dict(ticks)))


def linear_axis(
    label: str, values: Sequence[float] | np.ndarray, *, zero: bool = False, symmetric: bool = False, unit: str = ""
) -> Axis:
    """A linear axis with four to eight round ticks; from 0 with `zero`, with 0 in the middle where `symmetric`."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    if symmetric:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    span = (high - min(low, 0.0) if zero else high - low) or abs(high) or 1.0
    low, high = (0.0 if zero else low - 0.07 * span), high + 0.07 * span
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (5.0, 2.0, 1.0) if (high - low) / (m * step) >= 4 or m == 1.0)
    places = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    ticks = tuple((float(v), f"{v + 0.0:.{digits}f}{unit}".replace("-", "−")) for v in np.round(places, digits))
    return Axis(label, "linear", low, high, ticks)
