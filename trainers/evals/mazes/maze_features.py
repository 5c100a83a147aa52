"""Whether an SAE has features of the connections of a maze (Spies et al. 2024), beside what needs no SAE.

A connection is known at its second cell and at the `;` behind it. Does some latent tell there which one it is, or a
decision tree of depth two on several? Both are chosen on half of the held-out mazes (trees.py: the largest F1) and
measured on the other half, at either place (`at`: "second", "semicolon"; after a colon: an edge). Without `at` it is
the place where the trees of the first half are better: where a model puts what it knows is its own affair.

| metric | what |
|---|---|
| `edges_found` | share of the edges of the lattice whose tree has an F1 of 0.9 or more |
| `edges_single` | share of those whose best latent has |
| `tree`, `single` | mean over edges of the F1 of the tree and of the best latent |
| `..._channels` | the same of the coordinates of x, the residual stream |
| `..._probe` | of the outputs of linear probes on x, one for each edge, which were told the edges (ridge regression) |
| `..._untrained`, `..._probe_untrained` | both of the same subject with random weights |
| `single_always` | of one column that is always large: what `single` is read beside |
| `signs` | mean number of latents that are large where a tree says yes: two where cells have latents of their own |
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from saescale.scaling.metrics import shares
from saescale.storage.source import Source
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Sums, by_document
from saescale.trainers.evals.mazes.connections import (
    PLACES,
    Found,
    Told,
    better_place,
    find_connections,
    heldout_connections,
    latents_of,
    maze_of,
)
from saescale.trainers.evals.streams import streams_of_rows
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})
BESIDE = ("channels", "probe", "untrained", "probe_untrained")
metrics = shares(
    {"edges_found": (), "edges_single": (), "tree": (), "single": ("always",)}, BESIDE,
    leads=("edges_found", "edges_single", "tree"),
)  # fmt: skip

F1 = 0.9  # from which a connection is found
RIDGE = 1e-3  # of the mean variance of the columns


class Prepared(NamedTuple):
    told: dict[str, Told]
    shared: list[Measurement]  # the same for all cells


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Labels, and what the coordinates of the stream tell."""
    maze = maze_of(subject)
    told = heldout_connections(source, maze)
    number = 1 + max(int(each.rows.max()) for each in told.values())
    untrained = normalise(streams_of_rows(source, maze.untrained(), maze, number)).numpy()
    x = {place: normalise(each.act).numpy() for place, each in told.items()}
    x_untrained = {place: untrained[each.rows] for place, each in told.items()}
    shared = []
    columns = (
        x,
        {place: probed(told[place], rows) for place, rows in x.items()},
        x_untrained,
        {place: probed(told[place], rows) for place, rows in x_untrained.items()},
    )
    for name, streams in zip(BESIDE, columns, strict=True):
        rows = [row for row in at_places(told, streams) if ":" not in row.at and row.metric != "signs"]
        shared += [row._replace(metric=f"{row.metric}_{name}") for row in rows]
    share = told[PLACES[0]].edge.mean(axis=0)
    shared.append(Measurement("single_always", float(np.mean(2 * share / (1 + share))), n=len(share)))
    return Prepared(told, shared)


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    latents = {place: latents_of(trained, each.act) for place, each in prepared.told.items()}
    yield from at_places(prepared.told, latents)
    yield from prepared.shared


def probed(told: Told, columns: np.ndarray) -> np.ndarray:
    """What ridge regressions onto the edges, fitted on the first half, say of every row, float32 [rows, edges]."""
    x = columns.astype(np.float64) - columns[told.first].mean(axis=0)
    fitted, truth = x[told.first], told.edge[told.first].astype(np.float64)
    gram = fitted.T @ fitted + RIDGE * np.trace(fitted.T @ fitted) / x.shape[1] * np.eye(x.shape[1])
    found: np.ndarray = x @ np.linalg.solve(gram, fitted.T @ (truth - truth.mean(axis=0)))
    return found.astype(np.float32)


def at_places(told: dict[str, Told], columns: dict[str, np.ndarray]) -> Iterator[Measurement]:
    """What columns [rows, any] tell at each place, and at the better one."""
    found = {place: find_connections(told[place], columns[place]) for place in PLACES}
    for place in PLACES:
        rows = list(measured(told[place], columns[place], found[place]))
        yield from (row._replace(at=f"{place}:{row.at}" if row.at else place) for row in rows)
        if place == better_place(found):
            yield from (row for row in rows if not row.at)


def measured(told: Told, columns: np.ndarray, found: Found) -> Iterator[Measurement]:
    """What was found by `columns` [rows, any], on the second half."""
    columns, truth = columns[~told.first], told.edge[~told.first]
    ways = {
        "single": np.stack([split.of(columns) for split in found.single.split], axis=1),
        "tree": np.stack([tree.of(columns) for tree in found.trees], axis=1),
    }
    doc, edges = told.doc[~told.first], range(told.grid.n_edges)
    signs = [len(tree.signs()) for tree in found.trees]
    yield Measurement("signs", float(np.mean(signs)), n=len(signs))
    for way, said in ways.items():
        sums: dict[str, np.ndarray] = {}
        for edge in edges:
            sums[f"both {edge}"] = said[:, edge] & truth[:, edge]
            sums[f"all {edge}"] = said[:, edge].astype(int) + truth[:, edge]

        statistics: dict[str, Callable[[Sums], np.ndarray]] = {
            "": lambda of: np.asarray(np.mean([_f1(of, edge) for edge in edges], axis=0)),
            "found": lambda of: np.asarray(np.mean([_f1(of, edge) >= F1 for edge in edges], axis=0)),
        }
        statistics |= {told.grid.name(edge): partial(_f1, edge=edge) for edge in edges}
        for at, estimate in by_document(doc, sums, statistics).items():
            metric = ("edges_found" if way == "tree" else "edges_single") if at == "found" else way
            yield Measurement(metric, *estimate, at="" if at == "found" else at, n=len(doc), seed=SEED)


def _f1(of: Sums, edge: int) -> np.ndarray:
    return np.asarray(2 * of[f"both {edge}"] / np.maximum(of[f"all {edge}"], 1))
