"""How laws move with depth: exponents and floors of each site's laws over layers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.order import in_order

Quantity = Literal["exponent", "floor"]
_OF = ("architecture", "subject", "site")


@dataclass(frozen=True)
class AtDepth:
    """The exponent of n, or the floor of nmse, at one k in the law of one site. `law` is n_k, or n at that k alone."""

    quantity: Quantity
    subject: str
    architecture: str
    layer: float
    k: float
    law: str
    value: Interval

    def document(self) -> dict[str, Any]:
        names = ("quantity", "subject", "architecture", "layer", "k", "law")
        return {name: getattr(self, name) for name in names} | self.value.document()


def layer_of(site: str) -> float | None:
    """11 of "resid_post.11"; None where a site ends in no number."""
    number = site.rpartition(".")[2]
    return float(number) if number.isdigit() else None


def find_depth(fits: Iterable[Fit]) -> list[AtDepth]:
    """From the fits of all kinds, whose `of` says the site where sites differ. [] for laws of fewer than two layers.

    One law for all that is compared: L(N, k) where a kind has it, else L(N) with a floor at each k. Exponents are those
    of the reducible part, which trade off against the floor; both are given so that a reader sees them move together.
    """
    found: list[AtDepth] = []
    kinds: dict[tuple[str, str, float], list[Fit]] = {}
    for fit in fits:
        architecture, subject, site = (str(fit.of.get(name, "")) for name in _OF)
        if (layer := layer_of(site)) is not None:
            kinds.setdefault((subject, architecture, layer), []).append(fit)
    names = in_order(architecture for _, architecture, _ in kinds)
    for subject, architecture, layer in sorted(kinds, key=lambda kind: (kind[0], names.index(kind[1]), kind[2])):
        own = kinds[subject, architecture, layer]
        joint = [fit for fit in own if fit.law.name == "n_k"]
        for fit in joint or [fit for fit in own if fit.law.name == "n" and fit.law.has_floor and "k" in fit.at]:
            ks = np.unique(fit.columns["k"]).tolist() if "k" in fit.law.columns else [fit.at["k"]]
            for k in ks:
                exponent = fit.exponent("n_latents", {"k": k})
                assert exponent["value"] is not None
                value = Interval(exponent["value"], exponent["low"], exponent["high"])
                place = (subject, architecture, layer, float(k), fit.law.name)
                found.append(AtDepth("exponent", *place, value))
                found.append(AtDepth("floor", *place, _floor(fit, float(k))))
    return found if len({entry.layer for entry in found}) > 1 else []


def _floor(fit: Fit, k: float) -> Interval:
    """The last term of a law at k, in which there is no n."""
    last = fit.law.term_of == fit.law.term_of[-1]
    logs = {column: np.log(np.array([k if column == "k" else 1.0])) for column in fit.law.columns}
    design = fit.law.design(logs)[0, last]
    value, draws = fit.raw[last] @ design, fit.draws[:, last] @ design
    low, high = fit.spread(value, draws)
    ends = [None if np.isnan(end) else float(np.exp(min(float(end), 700.0))) for end in (low, high)]
    return Interval(float(np.exp(value)), ends[0], ends[1])
