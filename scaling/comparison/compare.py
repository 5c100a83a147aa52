"""The comparison of architectures, whole: what fits.json, reports and figures are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saescale.scaling.comparison.arms import Arms, find_arms
from saescale.scaling.comparison.depth import AtDepth, find_depth
from saescale.scaling.comparison.equal_l0 import Order, Places, Unbeaten, find_order, find_places, find_unbeaten
from saescale.scaling.comparison.equal_nmse import Envelope, Ratios, find_envelopes, find_lines, find_ratios
from saescale.scaling.comparison.hierarchy import Gaps, find_gaps
from saescale.scaling.comparison.scatter import Scatter, find_scatter
from saescale.scaling.laws.fit import LawsOfKinds
from saescale.scaling.tables import Table

REFERENCE = "topk"


@dataclass(frozen=True)
class Comparison:
    """Architectures that were trained on the same source. `reference`: what compute is compared with. `envelopes` by k,
    then architecture; `ratios` of every other architecture at each k."""

    arms: Arms
    scatter: Scatter
    places: Places
    order: Order
    reference: str
    envelopes: Mapping[float, Mapping[str, Envelope]]
    ratios: tuple[Ratios, ...]
    unbeaten: tuple[Unbeaten, ...]
    gaps: Gaps | None

    def leaders(self) -> list[dict[str, Any]]:
        """At each N and L0 every architecture's nmse, which is the lowest, and which are not told apart from that."""
        found = []
        for (n, k), own in self.places.by_point.items():
            nmse = {name: self.places.nmse(place) for name, place in own.items()}
            leader = min(nmse, key=lambda name: nmse[name].value)
            apart = {name: self.places.difference(own[leader], own[name]) for name in own if name != leader}
            near = [name for name, difference in apart.items() if difference.high is not None and not difference.sign]
            found.append({"n_latents": n, "k": k, "leader": leader, "not_told_apart": near, "nmse": nmse})
        return found

    def document(self) -> dict[str, Any]:
        """Its entry in fits.json."""
        arms = self.arms
        return {
            "of": dict(arms.of),
            "architectures": list(arms.architectures),
            "cells": int(arms.cells.sum()),
            "reference": self.reference,
            "scatter": {"how": self.scatter.how, "sd_of_ln_nmse": dict(self.scatter.sd)},
            "order": {
                "words": self.order.words,
                "architectures": list(self.order.architectures),
                "pairs": [
                    {"first": first, "second": second, "ratio_of_nmse": found.exp.document(), "points": points}
                    for (first, second), (found, points) in self.order.pairs.items()
                ],
            },
            "equal_l0": [
                entry | {"nmse": {name: found.document() | {"l0": _number(own[name].l0)}
                                  for name, found in entry["nmse"].items()}}
                for entry, own in zip(self.leaders(), self.places.by_point.values(), strict=True)
            ],
            "not_compared": list(self.places.left_out),
            "equal_nmse": [
                {
                    "k": ratios.k,
                    "architecture": ratios.architecture,
                    "median": None if ratios.median is None else ratios.median.document(),
                    "reached": ratios.reached,
                    "levels": [
                        {"nmse": r.nmse, "reached": r.reached, "ratio": None if r.ratio is None else r.ratio.document()}
                        for r in ratios.levels
                    ],
                }
                for ratios in self.ratios
            ],
            "dead": [
                {"n_latents": float(arms.n_latents[i]), "k": float(arms.k[i]),
                 "architecture": str(arms.architecture[i]), "fraction": float(arms.dead[i])}
                for i in range(len(arms)) if np.isfinite(arms.dead[i])
            ],
            "unbeaten": [
                {"architecture": u.architecture, "baseline": u.baseline, "n_latents": u.n_latents, "k": u.k,
                 "ratio_of_nmse": u.difference.exp.document()}
                for u in self.unbeaten
            ],
            "hierarchy": _hierarchy(self.gaps),
        }  # fmt: skip


def compare(results: Table, curves: Table | None = None) -> tuple[Comparison, ...]:
    """One comparison for each subject, site, store ... in which at least two architectures were trained; () for others.

    `results` are cells that did not diverge, the best over axes that are not compared. Deterministic.
    """
    found = []
    for arms in find_arms(results):
        scatter = find_scatter(arms)
        draws = scatter.draws(arms)
        places = find_places(arms, draws)
        order = find_order(places)
        ahead = order.architectures[0] if order.architectures else arms.architectures[0]
        reference = REFERENCE if REFERENCE in arms.architectures else ahead
        lines = find_lines(arms, curves)
        envelopes = {float(k): there for k in np.unique(arms.k) if (there := find_envelopes(arms, lines, float(k)))}
        ratios = [r for k, own in envelopes.items() for r in find_ratios(arms, own, reference, k, draws)]
        unbeaten = tuple(find_unbeaten(places))
        found.append(
            Comparison(
                arms, scatter, places, order, reference, envelopes, tuple(ratios), unbeaten, find_gaps(arms, draws)
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class SideBySide:
    """All that compares cells of several kinds: architectures on each source, and laws over depth."""

    comparisons: tuple[Comparison, ...]
    depth: tuple[AtDepth, ...]

    def document(self) -> dict[str, Any]:
        """The keys "comparison" and "depth" of fits.json, each where there is something to compare."""
        parts: dict[str, tuple[Comparison | AtDepth, ...]] = {"comparison": self.comparisons, "depth": self.depth}
        return {name: [entry.document() for entry in entries] for name, entries in parts.items() if entries}


def side_by_side(fitted: LawsOfKinds, curves: Table | None = None) -> SideBySide:
    """What the cells and laws of a table say when its kinds are set beside each other; empty for one kind."""
    return SideBySide(compare(fitted.best, curves), tuple(find_depth(fitted.fits)))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _hierarchy(gaps: Gaps | None) -> dict[str, Any] | None:
    if gaps is None:
        return None
    return {
        "gaps": [{"n_latents": g.n_latents, "k": g.k, "trained_with_k": g.trained, "gap": g.gap.document()}
                 for g in gaps.gaps],
        "law": {"formula": "ln(1 + gap) = ln(1 + gap_at_mid) + slope ln(k / k_mid)", "k_mid": gaps.k_mid,
                "gap_at_mid": None if gaps.at_mid is None else gaps.at_mid.document(),
                "slope": None if gaps.slope is None else gaps.slope.document()},
    }  # fmt: skip
