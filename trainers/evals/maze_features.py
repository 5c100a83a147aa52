"""Whether an SAE has features of the connections of a maze (Spies et al. 2024), beside what needs no SAE.

At the `;` that ends a connection, does some latent tell which one it is, or a decision tree of depth two on several?
Both are chosen on half of the held-out mazes ([trees.py](trees.py): the largest F1) and measured on the other half.

| metric | what |
|---|---|
| `edges_found` | share of the edges of the lattice whose tree has an F1 of 0.9 or more: what is found |
| `edges_single` | share of those that a single latent tells so |
| `tree`, `single` | mean over edges of the F1 of the best tree and of the best latent; `at`: an edge |
| `..._channels` | the same of the coordinates of x, the residual stream |
| `..._untrained` | of the coordinates of x of the same subject with random weights |
| `..._always` | of one column that is always large: what single is read beside |
| `signs` | mean number of latents that are large where a tree says yes: two where cells have latents of their own |
"""

from collections.abc import Iterator

import numpy as np

from saescale.scaling.metrics import Metric
from saescale.storage.source import Source
from saescale.trainers.evals.boards import streams_of_rows
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Sums, by_document
from saescale.trainers.evals.mazes import Found, Told, find_connections, heldout_connections, latents_of, maze_of
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})
metrics = {
    "edges_found": Metric("higher", bounded=True),
    "edges_single": Metric("higher", bounded=True),
    "tree": Metric("higher", bounded=True),
    "single": Metric("higher", bounded=True),
}

F1 = 0.9  # from which a connection is found


class Prepared:
    """Labels, and what the coordinates of the stream tell."""

    def __init__(self, source: Source, subject: Subject | None) -> None:
        maze = maze_of(subject)
        self.told = heldout_connections(source, maze)
        untrained = streams_of_rows(source, maze.untrained(), maze, len(self.told.act))
        self.shared: list[Measurement] = []
        for name, act in (("channels", self.told.act), ("untrained", untrained)):
            columns = normalise(act).numpy()
            self.shared += [
                each._replace(metric=f"{each.metric}_{name}")
                for each in measured(self.told, columns, find_connections(self.told, columns))
                if not each.at
            ]
        share = self.told.closed.mean(axis=0)
        self.shared.append(Measurement("single_always", float(np.mean(2 * share / (1 + share))), n=len(share)))


def prepare(source: Source, subject: Subject | None) -> Prepared:
    return Prepared(source, subject)


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    told = prepared.told
    latents = latents_of(trained, told.act)
    found = find_connections(told, latents)
    yield from measured(told, latents, found)
    signs = [len(tree.signs()) for tree in found.trees]
    yield Measurement("signs", float(np.mean(signs)), n=len(signs))
    yield from prepared.shared


def measured(told: Told, columns: np.ndarray, found: Found) -> Iterator[Measurement]:
    """What was found by `columns` [rows, any], on the second half."""
    columns, truth = columns[~told.first], told.closed[~told.first]
    ways = {
        "single": np.stack([split.of(columns) for split in found.single.split], axis=1),
        "tree": np.stack([tree.of(columns) for tree in found.trees], axis=1),
    }
    doc, edges = told.doc[~told.first], range(told.grid.n_edges)
    for way, said in ways.items():
        sums: dict[str, np.ndarray] = {}
        for edge in edges:
            sums[f"both {edge}"] = said[:, edge] & truth[:, edge]
            sums[f"all {edge}"] = said[:, edge].astype(int) + truth[:, edge]

        def f1(of: Sums, edge: int) -> np.ndarray:
            return 2 * of[f"both {edge}"] / np.maximum(of[f"all {edge}"], 1)

        def mean(of: Sums) -> np.ndarray:
            return np.mean([f1(of, edge) for edge in edges], axis=0)

        def share(of: Sums) -> np.ndarray:
            return np.mean([f1(of, edge) >= F1 for edge in edges], axis=0)

        statistics = {"": mean, "found": share} | {
            told.grid.name(edge): lambda of, edge=edge: f1(of, edge)
            for edge in edges  # type: ignore[misc]
        }
        for at, estimate in by_document(doc, sums, statistics).items():
            metric = ("edges_found" if way == "tree" else "edges_single") if at == "found" else way
            yield Measurement(metric, *estimate, at="" if at == "found" else at, n=len(doc), seed=SEED)
