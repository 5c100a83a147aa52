"""Which way of training was the best in a sweep that has axes: what a plan goes on with."""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from saescale.cluster.sweep.planned import Planned
from saescale.cluster.sweep.settings import told_apart
from saescale.cluster.sweep.spec import parse_recorded
from saescale.cluster.sweep.train import Way
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError
from saescale.trainers.precision import Precision


class _Store(NamedTuple):
    fingerprint: str
    d_model: int


class Best(NamedTuple):
    """One of `ways` of training: `own` is what `train` of a cell says for it, `rows` [rows] those that it trained."""

    own: dict[str, Any]
    rows: np.ndarray
    ways: int

    @property
    def words(self) -> str:
        return f"trained with {json.dumps(self.own)}, on average the best of {self.ways} ways"


def best_way(document: Mapping[str, Any], where: str, results: Table) -> Best | None:
    """That whose cells end nearest to the lowest nmse of their n, k and seed, in the mean of ln nmse; of those that
    most n and k were trained in. None where a sweep has no axes.

    `results`: finished cells of one kind.
    """
    spec = parse_recorded(document, where)
    if not spec.has_axes:
        return None
    architecture, store = str(results["architecture"][0]), _Store(str(results["store"][0]), int(results["d_model"][0]))
    precision: Precision = document["resolved"]["precision"]
    try:
        ways = spec.train.ways(architecture, spec.grid.architectures)
    except ValueError as error:
        raise SaescaleError(f"{where}: {error}") from error
    asked = [each for each in spec.grid.combinations() if each.architecture == architecture]
    trained = {
        spec.cell(Planned.of(each, way), store, precision).cell_id: (each, number)
        for each in asked
        for number, way in enumerate(ways)
    }
    found = [trained.get(str(cell_id)) for cell_id in results["cell_id"]]
    of_each: dict[Any, dict[int, float]] = defaultdict(dict)
    for known, nmse in zip(found, results["nmse"], strict=True):
        if known is not None:
            of_each[known[0]][known[1]] = float(np.log(nmse))
    excess: dict[int, list[float]] = defaultdict(list)
    for reached in of_each.values():
        for number, value in reached.items():
            excess[number].append(value - min(reached.values()))
    if len(ways) < 2:
        return None
    if not excess:  # nothing is known of them
        return Best(_own(ways[0], ways, architecture), np.ones(len(results), bool), len(ways))
    best = min(excess, key=lambda number: (-len(excess[number]), float(np.mean(excess[number]))))
    rows = np.array([known is not None and known[1] == best for known in found])
    return Best(_own(ways[best], ways, architecture), rows, len(ways))


def _own(way: Way, ways: list[Way], architecture: str) -> dict[str, Any]:
    """What `train` says of that way which it does not of all."""
    numbers = [name for name in Way._fields if name != "settings"]
    unlike = [name for name in numbers if any(getattr(each, name) != getattr(way, name) for each in ways)]
    told = {name: getattr(way, name) for name in unlike}
    told = {name: one.model_dump(mode="json") if isinstance(one, BaseModel) else one for name, one in told.items()}
    if "dead_after_tokens" in told:
        told["auxk"] = {"dead_after_tokens": told.pop("dead_after_tokens")}
    settings = told_apart(way.settings, [each.settings for each in ways], architecture)
    return told | ({"settings": {architecture: settings}} if settings else {})
