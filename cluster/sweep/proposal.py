"""What is asked of `saescale plan`, and what it proposes, as JSON and as a sweep file."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from saescale.cluster.sweep.spec import SweepSpec
from saescale.scaling.laws.forms.n_k import N_K
from saescale.scaling.planning.design import Design, Wanted
from saescale.scaling.planning.devices import Device
from saescale.storage.documents import yaml_text


@dataclass(frozen=True)
class Request:
    """What is asked: `hours` on one `device`; `at` is the point of a prediction or the k of an exponent or floor."""

    hours: float
    device: Device
    target: str = "exponent"
    at: Mapping[str, float] = field(default_factory=dict)
    source: str | None = None
    store: str | None = None
    d_model: int = 768
    tokens: float = 1e9  # of n = 32768; they grow with n^0.6
    n_range: tuple[int | None, int | None] = (None, None)
    ks: tuple[int, ...] = ()
    noise: float | None = None
    seeds: int = 3


class Prior(NamedTuple):
    """What is known before: coefficients [draws, coefficients], scatter of ln nmse and the share of its variance that
    seeds have in common, finished cells, in words, the seeds of each n and k that other cells have, finished or not,
    and the device at its speed."""

    raw: np.ndarray
    noise: float
    shared: float
    cells: Mapping[str, np.ndarray]
    words: str
    seeds: Mapping[tuple[int, int], Set[int]]
    device: Device
    cell: Mapping[str, Any] = {}  # what each cell of the plan says besides: architecture, train


class ProposedCell(NamedTuple):
    """A row of the plan; `hours` of all its seeds together, over all stores of the sweep."""

    n_latents: int
    k: int
    seeds: tuple[int, ...]
    tokens: int
    flops: float
    hours: float


@dataclass(frozen=True)
class Proposal:
    """The proposal. `packs` are [n_latents, k, seed] of cells that train side by side on one device, of each store."""

    request: Request
    prior: Prior
    spec: SweepSpec
    cells: tuple[ProposedCell, ...]
    goal: Wanted
    design: Design
    before: Design | None
    rectangle: Design | None
    packs: tuple[tuple[tuple[int, int, int], ...], ...]

    @property
    def flops_per_s(self) -> float:
        """What the device sustains on these cells, in sparse training FLOP/s."""
        flops = sum(len(self.spec.stores) * len(cell.seeds) * cell.flops for cell in self.cells)
        return flops / (3600 * sum(cell.hours for cell in self.cells))

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "target": self.request.target,
            "at": dict(self.request.at),
            "budget_hours": self.request.hours,
            "hours": self.design.hours,
            "device": self.prior.device.document(self.flops_per_s),
            "prior": {
                "from": self.prior.words,
                "noise": self.prior.noise,
                "shared_by_seeds": self.prior.shared,
                "cells": len(self.prior.cells["k"]),
            },
            "stores": len(self.spec.stores),
            "cells": [cell._asdict() for cell in self.cells],
            "expected": self._expected(self.design),
            "before": self._expected(self.before),
            "rectangle": self.rectangle
            and {
                "cells": int(self.rectangle.counts.sum()) * len(self.spec.stores),
                "hours": self.rectangle.hours,
                "expected": self._expected(self.rectangle),
            },
            "packs": [list(map(list, pack)) for pack in self.packs],
        }

    def _expected(self, design: Design | None) -> list[dict[str, Any]] | None:
        names = self.goal.names or N_K.names
        return design and [
            {"quantity": name, "value": float(value), "low": float(value - half), "high": float(value + half)}
            for name, value, half in zip(names, design.value, design.half_width, strict=True)
        ]

    def yaml(self) -> str:
        """The sweep file."""
        document = self.spec.model_dump(mode="json", exclude={"grid"})
        cells = sum(len(cell.seeds) for cell in self.cells) * len(self.spec.stores)
        more = "".join(f", {key}: {json.dumps(value)}" for key, value in self.prior.cell.items())
        lines = [
            f"# {cells} cells that narrow the {self.request.target} the most within {self.request.hours:g} h on one "
            f"{self.request.device.name}.",
            f"# Prior: {self.prior.words}.",
            f"# Speed: {self.flops_per_s:.3g} sparse training FLOP/s, {self.prior.device.speed_from}.",
            "# To add them to a sweep that is there: saescale sweep ITS.yaml --extend THIS.yaml",
            yaml_text(document).rstrip(),
            "grid:",
            "  cells:",
            *(f"  - {{n_latents: {c.n_latents}, k: {c.k}, seed: {list(c.seeds)}{more}}}" for c in self.cells),
        ]
        return "\n".join(lines) + "\n"
