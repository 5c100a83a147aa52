"""Which cells to train next: the grid that narrows an interval the most within a budget.

Optimal design (Fedorov 1972; Atkinson, Donev and Tobias 2007): a cell adds the outer product of the derivatives of
ln nmse to the Fisher information, and the variance of what is wanted follows from the inverse. Cells are added by what
they gain for their cost, then exchanged until no exchange gains.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import t

from saescale.scaling.laws.law import SYMBOLS, Law, log_sum
from saescale.storage.errors import SaescaleError

Target = Literal["exponent", "floor", "prediction", "coefficients"]
TARGETS = ("exponent", "floor", "prediction", "coefficients")
# What a target can be asked at.
_POINT = {"exponent": ("k",), "floor": ("k",), "prediction": ("n_latents", "k"), "coefficients": ()}
# Variance of a fit of absolute residuals over that of least squares where the scatter is normal: pi / 2.
_ABSOLUTE = np.pi / 2
# Information of coefficients before any cell, in units of one cell's: only to start from. So little that it narrows no
# interval: a thousand times more takes percents off where cells say little, such as about gamma at small k.
_PRIOR = 1e-8
LEVELS = 3  # of n and of k: what a fit of L(N, k) takes
_EXCHANGES = 200
_WORTH = 0.25  # of one cell's information: a seed that adds less, since the others share most of it, is not trained


@dataclass(frozen=True)
class Wanted:
    """What should be known well: `value` [quantities] at the best coefficients, and its derivatives by the raw ones
    (law.py) in `rows` [quantities, coefficients].

    Without rows all coefficients together are wanted (the volume of their confidence ellipsoid: D-optimality), and
    `value` is theirs.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """Cells that could be trained: `n_latents`, `k` and `hours` [cells] each, and the law's derivatives at each
    [prior draws, cells, coefficients]. `sd` is that of ln nmse of one cell about the law, and `shared` the share of its
    variance that all seeds of one n and k have in common, since the form misses it there (a lack of fit)."""

    law: Law
    raw: np.ndarray
    n_latents: np.ndarray
    k: np.ndarray
    hours: np.ndarray
    gradients: np.ndarray
    sd: float
    shared: float = 0.0

    def weight(self, seeds: np.ndarray) -> np.ndarray:
        """The information of `seeds` cells of one n and k, in units of one cell's: as many where their scatter is their
        own, and never more than 1 / `shared` where the form misses something."""
        return seeds / (1 + np.maximum(seeds - 1, 0) * self.shared)


class Design(NamedTuple):
    """How many cells of each candidate (seeds) [candidates], their hours, and for each wanted quantity its value and
    the half-width of the 95 % interval to expect."""

    counts: np.ndarray
    hours: float
    value: np.ndarray
    half_width: np.ndarray
    objective: float


def candidates(
    law: Law, raw: np.ndarray, n_latents: np.ndarray, k: np.ndarray, hours: np.ndarray, sd: float, shared: float = 0.0
) -> Candidates:
    """Of a law over n and k with coefficients `raw` [prior draws, coefficients], the best ones first: a design is made
    for all of them, so that it does not rest on one guess."""
    return Candidates(law, raw, n_latents, k, hours, _gradients(law, raw, n_latents, k), sd, shared)


def wanted(target: Target, law: Law, raw: np.ndarray, ks: Sequence[float], at: Mapping[str, float]) -> Wanted:
    """The rows of a target: exponents of n at each k (or the one of `at`), the floor there, a prediction at `at`.

    Raises SaescaleError where `at` lacks n or k of a prediction, or has what the target knows nothing of.
    """
    _check_point(target, at)
    names = law.names
    if target == "coefficients":
        return Wanted((), np.empty((0, len(names))), raw[0])
    if target == "prediction":
        point = {column: np.array([at[column]]) for column in _POINT[target]}
        label = f"ln nmse at n = {at['n_latents']:g}, k = {at['k']:g}"
        # Not linear in the coefficients: the rows are its derivatives there, and its value is the law's own.
        return Wanted((label,), _gradients(law, raw[:1], **point)[0], law.log_value(raw[0], point))
    rows = []
    labels = []
    for k in [at["k"]] if "k" in at else ks:
        row = np.zeros(len(names))
        if target == "exponent":
            for i, exponent in enumerate(law.terms[0].exponents, 1):
                if "n_latents" in exponent.columns:
                    row[i] = np.prod([np.log(k) for c in exponent.columns if c != "n_latents"])
            labels.append(f"exponent of n at k = {k:g}")
        else:
            last = np.flatnonzero(law.term_of == len(law.terms) - 1)
            design = law.design({"n_latents": np.zeros(1), "k": np.array([np.log(k)])})[0]
            row[last] = design[last]
            labels.append(f"ln floor at k = {k:g}")
        rows.append(row)
    return Wanted(tuple(labels), np.array(rows), np.array(rows) @ raw[0])


def _check_point(target: Target, at: Mapping[str, float]) -> None:
    if target == "prediction" and not set(_POINT[target]) <= set(at):
        raise SaescaleError("a prediction is wanted at one n and k: add --at n=65536,k=64")
    ignored = [SYMBOLS.get(column, column) for column in at if column not in _POINT[target]]
    if ignored:
        use = {"prediction": "give n and k alone, such as --at n=65536,k=64", "coefficients": "leave --at out"}
        raise SaescaleError(
            f"--at {', '.join(ignored)}: --target {target} does not depend on it; "
            + use.get(target, "give k alone, such as --at k=32, or --target prediction for one cell")
        )


def propose(
    cells: Candidates, goal: Wanted, budget: float, existing: Mapping[str, np.ndarray], seeds: int = 3
) -> Design:
    """The design within `budget` hours beside `existing` cells (n_latents and k [cells] each), at most `seeds` of each.

    Raises SaescaleError where the budget does not reach for a law.
    """
    search = _Search(cells, goal, budget, existing, seeds)
    best = min((search.run(power) for power in (1.0, 0.5, 0.0)), key=search.objective)
    short = [name for name, there in search.levels(best).items() if there < LEVELS]
    total = int(best.sum()) + len(existing["k"])
    if short or total < least_cells(cells.law):
        raise SaescaleError(
            f"{budget:.3g} hours are too few for a law: it takes {least_cells(cells.law)} cells with {LEVELS} "
            f"values of n and of k; the cheapest cell takes {cells.hours.min():.3g} h. Raise --budget or lower --n-min"
        )
    if not best.sum() and cells.shared:
        raise SaescaleError(
            "more seeds of the n and k that are there narrow nothing, since the law misses something at each of them "
            "(lack of fit): raise --n-max or --budget, or add --k"
        )
    return search.design(best)


def least_cells(law: Law) -> int:
    """How many cells a design has at least, those there included: a fit of fewer has no scatter to speak of."""
    return len(law.names) + 2


def expected(cells: Candidates, goal: Wanted, existing: Mapping[str, np.ndarray]) -> Design:
    """What is known from `existing` cells alone."""
    return _Search(cells, goal, 0.0, existing, 0).design(np.zeros(len(cells.hours), dtype=int))


def best_rectangle(
    cells: Candidates, goal: Wanted, budget: float, existing: Mapping[str, np.ndarray], seeds: int = 3
) -> Design | None:
    """The best full grid of evenly spaced n and k within the budget: what one would train without a planner."""
    search = _Search(cells, goal, budget, existing, seeds)
    found = [c for c in _rectangles(cells, seeds) if c @ cells.hours <= budget]
    found = [c for c in found if min(search.levels(c).values()) >= LEVELS and c.sum() > len(cells.law.names) + 1]
    return search.design(min(found, key=search.objective)) if found else None


class _Search:
    def __init__(
        self, cells: Candidates, goal: Wanted, budget: float, existing: Mapping[str, np.ndarray], seeds: int
    ) -> None:
        self.cells, self.goal, self.budget, self.seeds, self.existing = cells, goal, budget, seeds, existing
        gradients = cells.gradients
        self.outer = np.einsum("scp,scq->scpq", gradients, gradients)
        scale = np.einsum("scpp->sp", self.outer) / gradients.shape[1]
        # Cells of one n and k are of one kind: what the form misses there they share with those to come.
        sizes, levels = existing["n_latents"], existing["k"]
        there, counts = np.unique(np.stack([sizes, levels], axis=1), axis=0, return_counts=True)
        known = _gradients(cells.law, cells.raw, there[:, 0], there[:, 1])
        before = np.einsum("c,scp,scq->spq", cells.weight(counts), known, known)
        self.kinds = len(there)
        self.there = np.array(
            [((sizes == n) & (levels == k)).sum() for n, k in zip(cells.n_latents, cells.k, strict=True)]
        )
        self.before = before + _PRIOR * np.einsum("sp,pq->spq", scale, np.eye(scale.shape[1]))

    def run(self, power: float) -> np.ndarray:
        """Counts [candidates]: from a few cheap cells of enough levels, by gain over cost^power, then by exchange."""
        counts = self._first()
        while True:
            free = self._worth(counts) & (counts @ self.cells.hours + self.cells.hours <= self.budget)
            if not free.any():
                break
            gain = self.objective(counts) - self._after(self._information(counts)[None], self._next(counts))[0]
            gain = np.where(free, gain / self.cells.hours**power, -np.inf)
            counts[int(np.argmax(gain))] += 1
        for _ in range(_EXCHANGES):
            better = self._exchange(counts)
            if better is None:
                break
            counts = better
        return counts

    def objective(self, counts: np.ndarray) -> float:
        """The mean over prior draws of the log of the mean variance wanted."""
        return float(self._value(self._information(counts)[None])[0])

    def levels(self, counts: np.ndarray) -> dict[str, int]:
        there = counts > 0
        values = {"n": (self.cells.n_latents, "n_latents"), "k": (self.cells.k, "k")}
        return {name: len({*v[there], *self.existing[column]}) for name, (v, column) in values.items()}

    def design(self, counts: np.ndarray) -> Design:
        cells, total = self.cells, int(counts.sum()) + len(self.existing["k"])
        if cells.shared:
            total = self.kinds + int(((counts > 0) & (self.there == 0)).sum())
        covariance = np.linalg.inv(self._information(counts)[0]) * cells.sd**2 * _ABSOLUTE
        rows = self.goal.rows if len(self.goal.rows) else np.eye(len(cells.law.names))
        free = max(total - len(cells.law.names), 1)
        half = t.ppf(0.975, free) * np.sqrt(np.einsum("qp,pr,qr->q", rows, covariance, rows))
        return Design(counts, float(counts @ cells.hours), self.goal.value, half, self.objective(counts))

    def _information(self, counts: np.ndarray) -> np.ndarray:
        gained = self.cells.weight(self.there + counts) - self.cells.weight(self.there)
        return self.before + np.einsum("c,scpq->spq", gained, self.outer)

    def _next(self, counts: np.ndarray) -> np.ndarray:
        """What one more cell of each candidate adds, in units of one cell's information: [candidates]."""
        return self.cells.weight(self.there + counts + 1) - self.cells.weight(self.there + counts)

    def _value(self, information: np.ndarray) -> np.ndarray:
        """The objective of each of [..., draws, coefficients, coefficients]."""
        if not len(self.goal.rows):
            return -np.linalg.slogdet(information)[1].mean(axis=-1)
        variance = np.einsum("qp,...pr,qr->...q", self.goal.rows, np.linalg.inv(information), self.goal.rows)
        return np.log(variance.mean(axis=-1)).mean(axis=-1)

    def _worth(self, counts: np.ndarray) -> np.ndarray:
        """Of which candidates one more cell may be trained: [candidates]."""
        return (counts < self.seeds) & (self._next(counts) > _WORTH)

    def _after(self, information: np.ndarray, gained: np.ndarray) -> np.ndarray:
        """The objective with so much of each candidate [candidates] besides: [designs, candidates]."""
        return self._value(information[:, None] + (gained[:, None, None, None] * self.outer.swapaxes(0, 1))[None])

    def _first(self) -> np.ndarray:
        """One cheap cell for each of three n and k, spread over their ranges, where those are not there yet."""
        counts = np.zeros(len(self.cells.hours), dtype=int)
        if min(self.levels(counts).values()) >= LEVELS:
            return counts
        ks = np.unique(self.cells.k)
        sizes = np.unique(self.cells.n_latents)
        for k, n in zip(ks[[0, len(ks) // 2, -1]], sizes[:LEVELS], strict=False):
            counts[np.flatnonzero((self.cells.k == k) & (self.cells.n_latents == n))] = 1
        return counts if counts @ self.cells.hours <= self.budget else np.zeros_like(counts)

    def _exchange(self, counts: np.ndarray) -> np.ndarray | None:
        """The best of all exchanges of one cell for another, and then of what the rest of the budget pays for."""
        now = self.objective(counts)
        used = np.flatnonzero(counts)
        spent = float(counts @ self.cells.hours)
        lost = self._next(counts - 1)[used, None, None, None] * self.outer.swapaxes(0, 1)[used]
        objective = self._after(self._information(counts)[None] - lost, self._next(counts))
        left = self.budget - spent + self.cells.hours[used]
        objective[self.cells.hours[None] > left[:, None]] = np.inf
        objective[:, ~self._worth(counts)] = np.inf
        for place in np.argsort(objective, axis=None):
            i, j = np.unravel_index(place, objective.shape)
            if objective[i, j] > now - 1e-6:
                return None
            trial = counts.copy()
            trial[used[i]] -= 1
            trial[j] += 1
            if min(self.levels(trial).values()) >= min(LEVELS, *self.levels(counts).values()):
                return trial
        return None


def _gradients(law: Law, raw: np.ndarray, n_latents: np.ndarray, k: np.ndarray) -> np.ndarray:
    design = law.design({"n_latents": np.log(n_latents), "k": np.log(k)})
    return np.stack([log_sum(one, design, law.term_of, law.join)[1] for one in raw])


def _rectangles(cells: Candidates, seeds: int) -> Iterator[np.ndarray]:
    sizes, ks = np.unique(cells.n_latents), np.unique(cells.k)
    spaced = [
        [values[np.unique(np.round(np.linspace(first, last, count)).astype(int))]
         for first, last in ((0, end) for end in range(len(values)))
         for count in range(min(LEVELS, last + 1), last + 2)]
        for values in (sizes, ks)
    ]  # fmt: skip
    for n, k, repeats in itertools.product(spaced[0], spaced[1], range(1, seeds + 1)):
        yield repeats * (np.isin(cells.n_latents, n) & np.isin(cells.k, k)).astype(int)
