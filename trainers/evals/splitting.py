"""What becomes of the latents of a cell in the next larger one: kept, split or lost, and what is new there.

The other cell has the next larger N and is alike in all but that and what a law in N sets (learning rate, tokens); of
several, those with the same learning rate, and of these the one with the lowest nmse. A latent of the larger SAE is a
child of that latent of the smaller one whose decoder direction is nearest to its own, where the cosine is above 0.7;
else it is new. Only latents that fire on the held-out rows count, on both sides; intervals are over latents.

| metric | what |
|---|---|
| `split`, `kept`, `lost` | share of the cell's latents with several children, one, and none |
| `new` | share of the larger cell's latents without a parent |
| `parent_cosine` | mean cosine of those with the nearest latent of the cell |
| `children` | share of the cell's latents with as many children as `at` says |
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from saescale.scaling.metrics import Metric
from saescale.storage.source import Source
from saescale.trainers.evals.directions import SAME, Directions, alike, nearest, over_latents
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject

MOST = 8  # children that are told apart

needs: frozenset[Need] = frozenset()
metrics = {"kept": Metric("higher", bounded=True), "lost": Metric("lower", bounded=True)}


def partners(cell: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """The next larger cell of the same kind, or none."""
    own = next(row for row in cells if row["cell_id"] == cell)
    larger = [
        row
        for row in cells
        if (row["n_latents"] or 0) > (own["n_latents"] or 0) and alike(own, row, "n_latents", "lr", "tokens")
    ]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        nmse = np.inf if row["nmse"] is None else row["nmse"]
        return row["n_latents"], row["lr"] != own["lr"], nmse, row["cell_id"]

    return [min(larger, key=place)["cell_id"]] if larger else []


def prepare(source: Source, subject: Subject | None) -> Directions:
    return Directions(source)


def measure(
    trained: Trained, source: Source, subject: Subject | None, directions: Directions, others: list[Trained]
) -> Iterator[Measurement]:
    ours, theirs = directions.of(trained), directions.of(others[0])
    place, cosine = nearest(theirs, ours)
    has_parent = cosine > SAME
    children = np.bincount(place[has_parent], minlength=len(ours))
    yield from over_latents({"split": children > 1, "kept": children == 1, "lost": children == 0})
    yield from over_latents({"new": ~has_parent, "parent_cosine": cosine})
    for number in range(MOST + 1):
        share = float(np.mean(children >= MOST if number == MOST else children == number))
        yield Measurement("children", share, at=f"{number} or more" if number == MOST else str(number), n=len(ours))
