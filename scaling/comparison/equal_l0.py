"""Architectures at equal N and equal L0: who is ahead, in which order, and who does not beat a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from saescale.scaling.comparison.arms import Arms
from saescale.scaling.comparison.scatter import Interval, interval
from saescale.scaling.order import BASELINES, in_order
from saescale.scaling.tables import number

_SIGNS = {-1: " < ", 0: " ~ ", 1: " > "}  # of neighbours in an order, by the sign of their difference
_SAME = 0.005  # relative difference of L0 that is none
_BEYOND = 0.05  # how far beyond what was measured an architecture's own slope, or its nearest cell, still speaks
# d ln nmse / d ln L0 is not steeper than minus this: 0.24 in the law published for GPT-4 at N = 2^17, up to 0.4 here.
_STEEPEST = 0.5


@dataclass(frozen=True)
class Place:
    """An architecture at one N and one L0. `weights` [groups]: what its ln nmse is made of, one group or two of them;
    `l0` is that of its cells with this k (NaN where it has none). `off`: ln of the L0 over k of the one group that
    stands for it, 0 where ln nmse is interpolated."""

    architecture: str
    n_latents: float
    k: float
    weights: np.ndarray
    l0: float
    off: float


@dataclass(frozen=True)
class Places:
    """Everything that can be compared at equal N and L0, and what cannot, in words. `draws` as of Scatter.draws."""

    arms: Arms
    draws: np.ndarray
    places: tuple[Place, ...]
    left_out: tuple[str, ...]

    def nmse(self, place: Place) -> Interval:
        """nmse there."""
        return self._interval(place.weights, place.off).exp

    @cached_property
    def by_point(self) -> dict[tuple[float, float], dict[str, Place]]:
        """The architectures at each (N, L0) at which at least two compare, in their order."""
        found: dict[tuple[float, float], dict[str, Place]] = {}
        for place in self.places:
            found.setdefault((place.n_latents, place.k), {})[place.architecture] = place
        return {point: own for point, own in sorted(found.items()) if len(own) > 1}

    def difference(self, first: Place, second: Place) -> Interval:
        """ln nmse of the first less that of the second: below 0 the first is ahead."""
        return self._interval(first.weights - second.weights, first.off - second.off)

    def mean_difference(self, first: str, second: str) -> tuple[Interval, int] | None:
        """Over every (N, L0) that both have, and how many these are; it is of these cells. None where they share
        none."""
        shared = [(own[first], own[second]) for own in self.by_point.values() if {first, second} <= own.keys()]
        if not shared:
            return None
        weights = np.mean([a.weights - b.weights for a, b in shared], axis=0)
        return self._interval(weights, float(np.mean([a.off - b.off for a, b in shared]))), len(shared)

    def _interval(self, weights: np.ndarray, off: float) -> Interval:
        """Of what `weights` [groups] make of ln nmse: as far as seeds move it, and beyond that as far as its being at
        another L0 than k may."""
        found = interval(weights @ self.arms.log_nmse, self.draws @ weights)
        if found.low is None or found.high is None:
            return found
        reach = _STEEPEST * off
        return Interval(found.value, found.low + min(reach, 0.0), found.high + max(reach, 0.0))


@dataclass(frozen=True)
class Order:
    """Architectures from the lowest nmse at equal N and L0 to the highest. `pairs`: the mean difference of ln nmse of
    each two of them, the one ahead first, with the number of points that both have."""

    architectures: tuple[str, ...]
    pairs: Mapping[tuple[str, str], tuple[Interval, int]]

    @property
    def words(self) -> str:
        """ "topk ~ gated < relu": ~ where neighbours are not told apart, > where what both of them have says that the
        second is ahead, a comma where nothing tells."""
        text = self.architectures[0] if self.architectures else ""
        for first, second in zip(self.architectures, self.architectures[1:], strict=False):
            found = self.pairs.get((first, second))
            known = found is not None and found[0].low is not None
            text += (", " if not known or found is None else _SIGNS[found[0].sign]) + second
        return text


@dataclass(frozen=True)
class Unbeaten:
    """A trained architecture that does not beat a baseline at one N and L0: ln of their ratio of nmse."""

    architecture: str
    baseline: str
    n_latents: float
    k: float
    difference: Interval


def find_places(arms: Arms, draws: np.ndarray) -> Places:
    """Every architecture at every N and every L0 = k of the grid.

    Where its L0 is not k, ln nmse is interpolated along ln L0 between its cells of that N; up to 5 % beyond them its
    slope still speaks, and where it has but one cell, that cell does. Further out it is left out: no frontier is
    extrapolated.
    """
    found, left_out = [], []
    for n in np.unique(arms.n_latents):
        for k in np.unique(arms.k[arms.n_latents == n]):
            for name in arms.architectures:
                own = arms.at(name, n)
                if not len(own):
                    continue
                nominal = own[arms.k[own] == k]
                l0 = float(arms.l0[nominal[0]]) if len(nominal) else np.nan
                weights = _weights(arms, own, float(k))
                if weights is not None:
                    used = np.flatnonzero(weights)
                    off = float(np.log(arms.l0[used[0]] / k)) if len(used) == 1 else 0.0
                    found.append(Place(name, float(n), float(k), weights, l0, off))
                elif len(nominal):
                    left_out.append(f"{name} at N = {number(n)}, k = {number(k)}: its L0 is {l0:.3g}")
    return Places(arms, draws, tuple(found), tuple(left_out))


def find_order(places: Places) -> Order:
    """By the mean difference over what they share: an additive model of architecture and point, so that an architecture
    that lacks a point is not judged by the others' hardest."""
    points = list(places.by_point)
    rows = [place for own in places.by_point.values() for place in own.values()]
    names = in_order(p.architecture for p in rows)
    if len(names) < 2:
        return Order((), {})
    design = np.zeros((len(rows), len(names) + len(points)))
    for row, place in enumerate(rows):
        design[row, names.index(place.architecture)] = 1.0
        design[row, len(names) + points.index((place.n_latents, place.k))] = 1.0
    values = np.array([place.weights @ places.arms.log_nmse for place in rows])
    effects = np.linalg.lstsq(design, values, rcond=None)[0][: len(names)]
    ordered = tuple(names[i] for i in np.argsort(effects, kind="stable"))
    pairs = {pair: found for pair in combinations(ordered, 2) if (found := places.mean_difference(*pair))}
    return Order(ordered, pairs)


def find_unbeaten(places: Places) -> list[Unbeaten]:
    """Where the interval of the difference from a baseline does not lie below 0; by the values alone where there are no
    intervals."""
    found = []
    for point, own in places.by_point.items():
        for baseline in (name for name in own if name in BASELINES):
            for name in (name for name in own if name not in BASELINES):
                difference = places.difference(own[name], own[baseline])
                end = difference.value if difference.high is None else difference.high
                if end >= 0:
                    found.append(Unbeaten(name, baseline, *point, difference))
    return found


def _weights(arms: Arms, own: np.ndarray, k: float) -> np.ndarray | None:
    """What ln nmse at L0 = k is made of, [groups], from the groups `own` of one architecture and N; None too far."""
    weights = np.zeros(len(arms))
    l0 = arms.l0[own]
    near = own[np.abs(l0 / k - 1) <= _SAME]
    if len(near):
        weights[near[np.argmin(np.abs(arms.l0[near] / k - 1))]] = 1.0
        return weights
    if not l0.min() / (1 + _BEYOND) <= k <= l0.max() / (1 - _BEYOND):
        return None
    ordered = _apart(arms, own)
    if len(ordered) == 1:
        weights[ordered[0]] = 1.0
        return weights
    x = np.log(arms.l0[ordered])
    i = int(np.clip(np.searchsorted(x, np.log(k)) - 1, 0, len(x) - 2))
    along = (np.log(k) - x[i]) / (x[i + 1] - x[i])
    weights[ordered[i]], weights[ordered[i + 1]] = 1 - along, along
    return weights


def _apart(arms: Arms, own: np.ndarray) -> Sequence[int]:
    """Groups by L0, of those closer than 5 % the one nearest to its k: a slope between them would be scatter."""
    kept: list[int] = []
    for group in own[np.argsort(arms.l0[own])].tolist():
        if kept and arms.l0[group] / arms.l0[kept[-1]] < 1 + _BEYOND:
            off = [abs(np.log(arms.l0[g] / arms.k[g])) for g in (kept[-1], group)]
            if off[1] < off[0]:
                kept[-1] = group
        else:
            kept.append(group)
    return kept
