"""Which latents another seed finds too.

Two latents of different cells are the same where the cosine of their decoder directions is above 0.7. A cell is held
against each cell that differs from it in the seed alone; only latents that fire on the held-out rows count, on both
sides. Means are over latents and, for each latent, over the other seeds; intervals are over latents.

| metric | what |
|---|---|
| `matched` | share of latents with a partner of their own there |
| `found` | share of latents with any latent above 0.7 there, which several may share |
| `max_cosine` | mean cosine of the nearest latent there |

Partners are those of the matching of one to one with the largest sum of cosines above 0.7 (Hungarian method); `matched`
is given of each other cell as well (`at`). Latents that no pair above 0.7 connects do not compete for partners, so the
matching is made in each connected part by itself, and memory holds some of the cosines at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.evals.directions import SAME, Directions, alike, cosines, nearest, over_latents
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject

MOST_ENTRIES = 2**28  # of a connected part: 2 GiB of cosines, minutes of matching

needs: frozenset[Need] = frozenset()
metrics = {
    "matched": Metric("higher", bounded=True),
    "found": Metric("higher", bounded=True),
    "max_cosine": Metric("higher", limit=1.0),
}


def partners(cell: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """The cells that differ from it in the seed alone."""
    own = next(row for row in cells if row["cell_id"] == cell)
    return [row["cell_id"] for row in cells if row["seed"] != own["seed"] and alike(own, row, "seed")]


def prepare(source: Source, subject: Subject | None) -> Directions:
    return Directions(source)


def measure(
    trained: Trained, source: Source, subject: Subject | None, directions: Directions, others: list[Trained]
) -> Iterator[Measurement]:
    ours = directions.of(trained)
    of_each = np.zeros((3, len(ours)))
    for other in others:
        theirs = directions.of(other)
        cosine = nearest(ours, theirs).cosine
        has_own = matched(ours, theirs)
        of_each += [has_own, cosine > SAME, cosine]
        yield from over_latents({"matched": has_own}, other.cell.cell_id)
    yield from over_latents({name: of / len(others) for name, of in zip(metrics, of_each, strict=True)})


def matched(ours: Tensor, theirs: Tensor) -> np.ndarray:
    """Which of `ours` [latents, d_model] have a partner above `SAME` in the best matching with `theirs`: bool.

    Raises SaescaleError where so many latents are alike that they cannot be matched.
    """
    rows, columns, values = [], [], []
    for start, some in cosines(ours, theirs):
        at, to = (some > SAME).nonzero(as_tuple=True)
        rows.append(at.cpu().numpy() + start)
        columns.append(to.cpu().numpy())
        values.append(some[at, to].double().cpu().numpy())
    value, pairs = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    near = coo_array((value, pairs), (len(ours), len(theirs))).tocsr()
    both = len(ours) + len(theirs)
    graph = coo_array((value, (pairs[0], len(ours) + pairs[1])), (both, both))
    parts = connected_components(graph, directed=False)[1]
    here, there = _members(parts[: len(ours)]), _members(parts[len(ours) :])
    has_own = np.zeros(len(ours), dtype=bool)
    for part, row in here.items():
        column = there.get(part, row[:0])
        if len(row) * len(column) > MOST_ENTRIES:
            raise SaescaleError(f"{len(row):,} latents here and {len(column):,} there hang together, too many to match")
        if len(row) == 1:
            has_own[row] = len(column) > 0
        elif len(column):
            weights = near[row][:, column].toarray()
            chosen, partner = linear_sum_assignment(weights, maximize=True)
            has_own[row[chosen[weights[chosen, partner] > 0]]] = True
    return has_own


def _members(parts: np.ndarray) -> dict[int, np.ndarray]:
    """The places of each part."""
    order = np.argsort(parts, kind="stable")
    names, starts = np.unique(parts[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
