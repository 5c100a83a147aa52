"""The best over what a law does not name: of cells that differ in choices of training alone, those of the best choice.

A law in N and k says what N and k do, not what a learning rate does that happened to be tried. So of several rates (or
batches, averages, weights of AuxK, budgets of tokens, settings of an architecture) at one N and k it sees the one with
the lowest mean nmse over seeds, and all of its seeds.

The lowest of m noisy means is low by chance as well: by up to the expected minimum of m normal variables times their
standard error, if all choices are equally good in truth, and by less otherwise. Where every N has as many choices the
whole law shifts by that and its exponents hardly move; a floor does. Several seeds make it smaller, and where there are
some `Best.notes` says how large it may be. The sparsity penalty's own coefficient is no such choice, since it moves L0.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from saescale.scaling.kinds import IDENTITY
from saescale.scaling.tables import Table, known, number
from saescale.scaling.words import listed

SETTING = "settings."  # before the name of a setting of an architecture, which has no column
CHOICES = frozenset(("lr", "batch_tokens", "ema", "k_aux", "auxk_coefficient", "tokens"))
_NO_CHOICE = ("coefficient", "stream_seed")  # settings: one moves L0, the other is another draw of the same
_ALIKE = 0.01  # relative difference of numbers of tokens of which one is rounded to batches
_DIGITS = 12


class Winner(NamedTuple):
    """The value of an axis that won at one N and k, and whether it is the "smallest" or "largest" of those tried."""

    n_latents: float | None
    k: float | None
    value: float | str
    edge: str


class Axis(NamedTuple):
    """A choice of training of which several were tried on cells that are equal otherwise."""

    name: str
    winners: tuple[Winner, ...]

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        won = [{name: value for name, value in w._asdict().items() if value not in (None, "")} for w in self.winners]
        return {"axis": self.name, "winners": won}


class Best(NamedTuple):
    """The cells (their rows, bool [rows]) of the best choice at each N and k, and the axes over which they are it.
    `chance`: by how much of nmse the best of `most` may be low by chance; None where no seeds repeat."""

    rows: np.ndarray
    axes: tuple[Axis, ...]
    chance: float | None
    most: int = 1

    def apart(self, table: Table) -> Table:
        """The table without what these axes are: what is left differs for another reason than the choice of them."""
        names = {axis.name for axis in self.axes}
        columns = {name: values for name, values in table.columns.items() if name not in names}
        if "settings" in columns and names:
            rows = [_parsed(text) for text in columns["settings"].tolist()]
            left = [{name: value for name, value in row.items() if name not in names} for row in rows]
            columns["settings"] = np.array([json.dumps(row, sort_keys=True) if row else "" for row in left])
        return replace(table, columns=columns)

    def notes(self) -> list[str]:
        """What won, and where a winner is the last that was tried."""
        if not self.axes:
            return []
        chance = "" if self.chance is None else f"; the best of {self.most} is low by chance by up to {self.chance:.2%}"
        said = [
            f"laws of cells take the best {axis.name} at each N and k, those of compute the lowest of all curves: "
            + _who_won(axis)
            for axis in self.axes
        ]
        said[-1] += chance
        for axis in self.axes:
            for edge in ("smallest", "largest"):
                cases = [_where(w) for w in axis.winners if w.edge == edge]
                if cases and axis.name != "tokens":  # more of them are better as a rule
                    said.append(
                        f"the best {axis.name} is the {edge} that was tried at {listed(cases)}: a better one may lie "
                        "beyond"
                    )
        return said


def settings_of(table: Table) -> dict[str, np.ndarray]:
    """The settings of the cells, from their JSON: float64 [rows] where all are numbers, else text; "" or NaN where a
    cell has none."""
    if "settings" not in table:
        return {}
    rows = [_parsed(text) for text in table["settings"].tolist()]
    found = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
            found[SETTING + name] = np.array([np.nan if v is None else float(v) for v in values])
        else:
            found[SETTING + name] = np.array(["" if v is None else json.dumps(v).strip('"') for v in values])
    return found


def find_best(cells: Table, lost: np.ndarray, named: Collection[str] = ()) -> Best:
    """The cells of one kind that a law sees which names the columns `named`: of those that differ in nothing but
    choices of training and seeds, the ones whose choice has the lowest mean nmse.

    `lost` (bool [rows]) are cells that diverged: a choice that diverges with one of its seeds loses to all that never
    do. A choice that is not known of every cell is no axis.
    """
    settings = settings_of(cells)
    choices = {name: cells[name] for name in sorted(CHOICES) if name in cells and known(cells[name]).all()}
    choices |= {name: v for name, v in settings.items() if name.removeprefix(SETTING) not in _NO_CHOICE}
    choices = {name: values for name, values in choices.items() if name not in named}
    fixed = [name for name in dict.fromkeys((*IDENTITY, *named)) if name in cells]
    fixed = [name for name in fixed if name not in (*choices, "seed", "settings")]
    groups = _numbered([*(cells[n] for n in fixed), *(v for n, v in settings.items() if n not in choices)], len(cells))
    levels = {name: _levels(name, values) for name, values in choices.items()}
    configs = _numbered(list(levels.values()), len(cells))
    pairs, pair, counts = np.unique(
        np.stack([groups, configs], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    pair = pair.ravel()
    if len(pairs) == groups.max(initial=-1) + 1:
        return Best(np.ones(len(cells), dtype=bool), (), None)
    means = np.bincount(pair, np.where(lost, 0.0, cells["nmse"])) / counts
    means[np.bincount(pair, lost) > 0] = np.inf
    best = {int(group): int(i) for i, group in reversed(list(enumerate(pairs[:, 0])))}
    for i, group in enumerate(pairs[:, 0].tolist()):
        if means[i] < means[best[group]]:
            best[group] = i
    chosen = np.array([best[int(group)] for group in groups])
    axes = [_axis(cells, name, choices[name], levels[name], groups, pair, best) for name in choices]
    chance = _chance(cells, lost, pair, pairs[:, 0])
    return Best(pair == chosen, tuple(filter(None, axes)), chance, int(np.bincount(pairs[:, 0]).max()))


def _axis(
    cells: Table,
    name: str,
    values: np.ndarray,
    levels: np.ndarray,
    groups: np.ndarray,
    pair: np.ndarray,
    best: Mapping[int, int],
) -> Axis | None:
    """What won at each N and k where several values were tried; None where at none."""
    winners: list[Winner] = []
    for group, won in best.items():
        own = groups == group
        if len(tried := np.unique(levels[own])) < 2:
            continue
        row = int(np.flatnonzero(pair == won)[0])
        edge = ""
        if values.dtype.kind == "f":
            edge = {tried[0]: "smallest", tried[-1]: "largest"}.get(levels[row], "")
            if edge == "smallest" and values[row] == 0:
                edge = ""  # nothing lies below
        size = [float(cells[c][row]) if c in cells else None for c in ("n_latents", "k")]
        winners.append(Winner(size[0], size[1], values[row].item(), edge))
    return Axis(name.removeprefix(SETTING), tuple(sorted(winners, key=_size))) if winners else None


def _chance(cells: Table, lost: np.ndarray, pair: np.ndarray, groups: np.ndarray) -> float | None:
    """By how much of nmse the lowest mean of a group's choices is low by chance, at most; None without repeats."""
    own = ~lost
    sizes = np.bincount(pair[own], minlength=len(groups))
    if sizes.max(initial=0) < 2:
        return None
    log_nmse = np.log(cells["nmse"][own])
    means = np.bincount(pair[own], log_nmse, len(groups)) / np.maximum(sizes, 1)
    free = int((sizes[sizes > 0] - 1).sum())
    scatter = float(np.sqrt(((log_nmse - means[pair[own]]) ** 2).sum() / free))
    most = int(np.bincount(groups).max())
    # Blom's approximation of the expected largest of `most` normal variables.
    return scatter / float(np.sqrt(sizes[sizes > 0].min())) * float(norm.ppf((most - 0.375) / (most + 0.25)))


def _who_won(axis: Axis) -> str:
    """Such as "0.0012 won at N <= 512, 0.0006 above"; by k where that matters."""
    of_k: dict[float | None, str] = {}
    for _, same in groupby(axis.winners, lambda w: w.k):
        winners = list(same)
        of_k[winners[0].k] = _over_n(winners)
    if len(set(of_k.values())) == 1:
        return next(iter(of_k.values()))
    alike: dict[str, list[str]] = {}
    for k, text in of_k.items():
        alike.setdefault(text, []).append(f"{k:g}")
    return listed(f"at k = {listed(ks, ', ')} {text}" for text, ks in alike.items())


def _over_n(winners: Iterable[Winner]) -> str:
    runs = [(value, [w.n_latents for w in same]) for value, same in groupby(winners, lambda w: w.value)]
    if len(runs) == 1:
        return f"{_shown(runs[0][0])} won everywhere"
    if len(runs) == 2:
        return f"{_shown(runs[0][0])} won at N <= {number(runs[0][1][-1] or 0)}, {_shown(runs[1][0])} above"
    ends = [(_shown(value), number(sizes[0] or 0), number(sizes[-1] or 0)) for value, sizes in runs]
    won = [f"{value} at N = {low}" + (f" to {high}" if high != low else "") for value, low, high in ends]
    return "won " + listed(won, ", ")


def _where(winner: Winner) -> str:
    sizes = [f"{name} = {number(v)}" for name, v in (("N", winner.n_latents), ("k", winner.k)) if v is not None]
    return ", ".join(sizes)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _size(winner: Winner) -> tuple[float, float]:
    return winner.k or 0.0, winner.n_latents or 0.0


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _numbered(columns: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """A number for each combination of values [rows], the same where they are equal."""
    if not columns:
        return np.zeros(rows, dtype=int)
    levels = [np.unique(values, return_inverse=True)[1].ravel() for values in columns]
    return np.unique(np.stack(levels, axis=1), axis=0, return_inverse=True)[1].ravel()


def _levels(name: str, values: np.ndarray) -> np.ndarray:
    """A number for each value [rows], in their order; of tokens the same for what is rounded otherwise."""
    if values.dtype.kind != "f":
        return np.unique(values, return_inverse=True)[1].ravel()
    found, inverse = np.unique([float(f"{value:.{_DIGITS}g}") for value in values], return_inverse=True)
    apart = np.diff(found) > (_ALIKE * found[1:] if name == "tokens" else 0.0)
    return np.concatenate([[0], np.cumsum(apart)]).astype(int)[inverse.ravel()]
