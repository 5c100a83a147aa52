"""How much compute architectures need for equal nmse at one k: lower envelopes of their curves, and their ratios."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saescale.scaling.comparison.arms import Arms
from saescale.scaling.comparison.scatter import Interval, interval
from saescale.scaling.laws.frontier import at_its_k
from saescale.scaling.tables import Table

_GRID = 160
_WARM_UP = 0.05  # of every curve, as for the frontier of law c
_LEVELS = 5
_WIDE = 1.25  # of nmse: how far the levels reach up where an architecture has one N
MISSED = 0.10  # a cell whose L0 is further from k than this has no part in what is compared at one k
_NO_ROWS = np.empty(0, dtype=int)

Reached = Literal["both", "never", "sooner"]


@dataclass(frozen=True)
class Envelope:
    """The lowest nmse of an architecture at one k by training compute. `log_nmse` [groups, grid]: the mean curve of
    each group over its seeds, infinite where it has none; `groups` are their indices."""

    architecture: str
    grid: np.ndarray
    groups: np.ndarray
    log_nmse: np.ndarray

    @property
    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """(FLOPs, nmse) [points] where there is a curve, never rising."""
        lowest = _lowest(self.log_nmse[None])[0]
        there = np.isfinite(lowest)
        return self.grid[there], np.exp(lowest[there])

    def compute_for(self, level: float, shifts: np.ndarray) -> np.ndarray:
        """ln FLOPs with which ln nmse = `level` is first reached, with every curve shifted by `shifts` [draws, groups]:
        [draws]. +inf where it never is, -inf where the first point is there already."""
        lowest = _lowest(self.log_nmse + shifts[:, :, None])
        return _first_at(lowest, np.log(self.grid), level)


@dataclass(frozen=True)
class Ratio:
    """Compute of an architecture over that of the reference for one nmse. `reached`: whether both reach it, the
    architecture never does, or has it already where its curves begin; then there is no ratio."""

    nmse: float
    reached: Reached
    ratio: Interval | None


@dataclass(frozen=True)
class Ratios:
    """Of one architecture at one k, against a reference. `median`: over all levels, those never reached above and those
    reached sooner below every ratio; None where it is one of these itself, which `reached` says."""

    architecture: str
    reference: str
    k: float
    levels: tuple[Ratio, ...]
    median: Interval | None
    reached: Reached


Lines = Mapping[int, list[tuple[np.ndarray, np.ndarray]]]


def find_lines(arms: Arms, curves: Table | None) -> Lines:
    """(FLOPs, ln nmse) of every cell of each group that belongs to its k, FLOPs rising: curves without their first 5 %
    and what is not at their k (at_its_k), or without curves the ends of cells. Groups whose L0 is more than 10 % off k
    have no part."""
    used = np.flatnonzero(np.abs(arms.l0 / arms.k - 1) <= MISSED).tolist()
    table = arms.table
    if curves is None or "cell_id" not in table or not {"cell_id", "flops", "nmse"} <= set(curves.columns):
        return {group: _ends_of(table, arms.rows[group]) for group in used} if "flops" in table else {}
    usable = np.isfinite(curves["nmse"]) & (curves["nmse"] > 0) & (curves["flops"] > 0)
    of_cell = curves.rows_of("cell_id")
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for group in used:
        for row in np.arange(len(table))[arms.rows[group]].tolist():
            own = of_cell.get(table["cell_id"][row].item(), _NO_ROWS)
            own = at_its_k(table, row, curves, own[usable[own]])
            if len(own):
                flops, first = np.unique(curves["flops"][own], return_index=True)
                later = flops >= _WARM_UP * flops[-1]
                line = flops[later], np.log(curves["nmse"][own][first][later])
                found.setdefault(group, []).append(line)
    return found


def find_envelopes(arms: Arms, lines: Lines, k: float) -> dict[str, Envelope]:
    """The envelope of each architecture at one k, on one grid of compute; {} where no compute is known. Seeds are
    averaged before the lowest of the N is taken, else more seeds would look better."""
    own = {group: lines[group] for group in np.flatnonzero(arms.k == k).tolist() if lines.get(group)}
    if not own:
        return {}
    ends = [flops for found in own.values() for flops, _ in found]
    low, high = min(float(flops[0]) for flops in ends), max(float(flops[-1]) for flops in ends)
    grid = np.geomspace(low, high, _GRID) if high > low else np.array([low])
    envelopes = {}
    for name in arms.architectures:
        groups = [group for group in arms.at(name, k=k).tolist() if group in own]
        if groups:
            log_nmse = np.stack([_mean_curve(own[group], grid) for group in groups])
            envelopes[name] = Envelope(name, grid, np.array(groups), log_nmse)
    return envelopes


def find_ratios(arms: Arms, envelopes: Mapping[str, Envelope], reference: str, k: float,
                draws: np.ndarray) -> list[Ratios]:  # fmt: skip
    """Each architecture against `reference` at five levels of nmse, from where the reference's smallest N ends to the
    lowest that it reaches. `draws` as of Scatter.draws: a draw shifts the curve of a cell as a whole, since its points
    are of one training."""
    if reference not in envelopes:
        return []
    base = envelopes[reference]
    levels = _levels(base)
    found = []
    for name, own in envelopes.items():
        if name == reference:
            continue
        values = [float(_log_ratio(own, base, level, np.zeros((1, len(arms))))[0]) for level in levels]
        drawn = [_log_ratio(own, base, level, draws - arms.log_nmse) for level in levels]
        rows = [
            Ratio(float(np.exp(level)), _reached(value), _raised(value, by_draw))
            for level, value, by_draw in zip(levels, values, drawn, strict=True)
        ]
        middle = float(np.median(values))
        median = _raised(middle, np.median(drawn, axis=0))
        found.append(Ratios(name, reference, k, tuple(rows), median, _reached(middle)))
    return found


def _reached(value: float) -> Reached:
    return "both" if np.isfinite(value) else "sooner" if value < 0 else "never"


def _raised(value: float, drawn: np.ndarray) -> Interval | None:
    """The interval of a ratio from logarithms; an end that some draws never reach is open (None). None where there is
    no ratio."""
    if not np.isfinite(value):
        return None
    if not len(drawn):
        return Interval(float(np.exp(value)), None, None)
    # What a draw does not reach lies beyond all that it does.
    drawn = np.where(np.isnan(drawn), value, drawn)
    low, high = np.percentile(drawn, (2.5, 97.5), method="nearest")
    if np.isfinite([low, high]).all():
        return interval(value, drawn[np.isfinite(drawn)]).exp
    # Where some never get there the ratio may be anything above: no draws on the other side mirror that.
    ends = min(float(low), value), max(float(high), value)
    low_end, high_end = (float(np.exp(end)) if np.isfinite(end) else None for end in ends)
    return Interval(float(np.exp(value)), low_end, high_end)


def _log_ratio(own: Envelope, base: Envelope, level: float, shifts: np.ndarray) -> np.ndarray:
    """[draws]; infinite as of Envelope.compute_for."""
    first, second = (e.compute_for(level, shifts[:, e.groups]) for e in (own, base))
    with np.errstate(invalid="ignore"):
        return first - second


def _levels(base: Envelope) -> np.ndarray:
    """ln nmse of the levels, the highest first; the lowest is reached with the last compute of the reference."""
    ends = [curve[np.isfinite(curve)][-1] for curve in base.log_nmse if np.isfinite(curve).any()]
    low = float(np.min(ends))
    high = max(float(np.max(ends)), low + np.log(_WIDE))
    # A hair inside: at the very end noise alone says whether a level is reached.
    return np.linspace(high, low + 0.02 * (high - low), _LEVELS)


def _lowest(log_nmse: np.ndarray) -> np.ndarray:
    """The envelope [draws, grid] of curves [draws, groups, grid], never rising."""
    return np.minimum.accumulate(log_nmse.min(axis=1), axis=1)


def _first_at(lowest: np.ndarray, log_flops: np.ndarray, level: float) -> np.ndarray:
    """Where envelopes [draws, grid] first are at `level`, linear between points; see Envelope.compute_for."""
    below = lowest <= level
    first = below.argmax(axis=1)
    rows = np.arange(len(lowest))
    before = np.maximum(first - 1, 0)
    high, low = lowest[rows, before], lowest[rows, first]
    with np.errstate(invalid="ignore", divide="ignore"):
        along = np.where(np.isfinite(high) & (high > low), (high - level) / (high - low), 1.0)
    value = log_flops[before] + along * (log_flops[first] - log_flops[before])
    # The first point that there is: reached before, nobody knows where.
    unknown = (first == 0) | ~np.isfinite(high)
    value = np.where(unknown & (low < level), -np.inf, np.where(unknown, log_flops[first], value))
    return np.where(below.any(axis=1), value, np.inf)


def _ends_of(table: Table, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    own = [row for row in rows.tolist() if np.isfinite(table["flops"][row]) and table["flops"][row] > 0]
    return [(table["flops"][row : row + 1], np.log(table["nmse"][row : row + 1])) for row in own]


def _mean_curve(found: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> np.ndarray:
    """The mean of ln nmse over the seeds of a group at each compute that all of them have, else infinite: [grid]."""
    lines = []
    for flops, log_nmse in found:
        if len(flops) == 1:
            # An end alone: reached with that much compute, and kept with more.
            line = np.where(grid >= flops[0] * (1 - 1e-9), log_nmse[0], np.inf)
        else:
            inside = (grid >= flops[0] * (1 - 1e-9)) & (grid <= flops[-1] * (1 + 1e-9))
            line = np.where(inside, np.interp(np.log(grid), np.log(flops), log_nmse), np.inf)
        lines.append(line)
    return np.mean(lines, axis=0)
