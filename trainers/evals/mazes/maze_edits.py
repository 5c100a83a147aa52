"""Whether a model solves mazes by the features of connections: edges added and removed through latents.

For each edge some held-out mazes that the model solves; in each the stream is changed at one connection, and the model
goes on greedily (Spies et al. 2024). To add edge e, which would shorten the path, each latent f of e becomes what it is
on average where e is told, x + sum_f (mean_f - z_f) W_dec[f], at a connection drawn at random: a success is the path of
the maze with e. To remove e, which the path crosses, z_f becomes 0 where e is told: a success is a way that never
crosses e. The latents of an edge are those that are large where its tree says yes (trees.py), chosen on held-out rows.
Changes are at the `;` of a connection or at its second cell, wherever the trees are better (connections.py).

| metric | what |
|---|---|
| `add`, `remove` | share of successes; `at`: an edge |
| `add_random`, `remove_random` | by as many other latents that are alive, the change of the same norm |
| `add_gain`, `remove_gain` | the first less the second |
| `add_means`, `remove_means` | without an SAE: the mean of x where e is told, less the mean of x, added or taken away |
| `add_tokens` | the connection as one more in the list that the model reads |
| `asymmetry` | `add` - `remove` |
| `solved`, `solved_x_hat` | share of mazes that the model solves, and that it solves with x_hat at every row |

Where x_hat leads elsewhere, a maze is left out of all but the last row. Intervals are over mazes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Sums, by_document, mean_of, ratio
from saescale.trainers.evals.mazes.changes import (
    Change,
    Edits,
    Kind,
    edits_to_add,
    edits_to_remove,
    few_of_each_edge,
    succeeded,
    told_as_tokens,
)
from saescale.trainers.evals.mazes.connections import (
    Told,
    better_place,
    find_connections,
    heldout_connections,
    latents_of,
    maze_of,
)
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.drawn import those
from saescale.trainers.subjects.maze.lattice import lattice
from saescale.trainers.subjects.maze.maze import Maze
from saescale.trainers.subjects.maze.mazes import Mazes
from saescale.trainers.subjects.maze.tokens import SEMICOLON, answers, prompts
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})
metrics = {
    "add": Metric("higher", bounded=True, beside=("add_random", "add_means", "add_tokens"), leads=True),
    "remove": Metric("higher", bounded=True, beside=("remove_random", "remove_means"), leads=True),
    "add_gain": Metric("higher"),
    "remove_gain": Metric("higher"),
    "solved_x_hat": Metric("higher", bounded=True, beside=("solved",)),
}

MAZES, MAZES_SEED = 512, 1  # among which edges are sought that can be added or removed
OF_EDGE = 6  # mazes for each edge, of each kind
KINDS: tuple[Kind, ...] = ("add", "remove")


class Prepared(NamedTuple):
    told: dict[str, Told]
    means: dict[str, Tensor]  # float32 [edges, d_model]: the mean of x where an edge is told, less that of all rows
    mazes: Mazes
    solved: Tensor  # bool [mazes]
    edits: dict[Kind, Edits]


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Mazes, what can be changed in them, and which of them the model solves."""
    maze = maze_of(subject)
    told = heldout_connections(source, maze)
    means = {}
    for place, each in told.items():
        act, edge = each.act.float(), torch.from_numpy(each.edge).float()
        means[place] = edge.T @ act / edge.sum(dim=0)[:, None] - act.mean(dim=0)
    mazes = maze.heldout_mazes(MAZES, MAZES_SEED)
    solved = (maze.rollout(prompts(mazes)) == answers(mazes)).all(dim=1)
    if not solved.any():
        raise SaescaleError(f"{maze.name} solves none of {len(solved)} mazes, so there is no way that could change")
    return Prepared(
        told, means, mazes, solved,
        {"add": edits_to_add(maze.size, mazes), "remove": edits_to_remove(maze.size, mazes)},
    )  # fmt: skip


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    maze, mazes = maze_of(subject), prepared.mazes
    site = Site(layer=source.site.layer, positions=source.site.positions)
    through = _solved_through(trained, maze, mazes, site)
    for name, each in (("solved", prepared.solved), ("solved_x_hat", through)):
        yield Measurement(name, *mean_of(each.double().numpy()), n=len(each), seed=SEED)
    kept = prepared.solved & through
    if not kept.any():
        raise SaescaleError("no maze is solved with x_hat in place of x, so there is no way that latents could change")
    latents = EdgeLatents(trained, prepared.told)
    edits = {kind: few_of_each_edge(those(each, kept[each.maze]), OF_EDGE) for kind, each in prepared.edits.items()}
    done: dict[str, np.ndarray] = {}
    grid = lattice(maze.size)
    for kind in KINDS:
        there = edits[kind]
        changes = {
            kind: latents.change(kind, there),
            f"{kind}_random": latents.random_change(kind, there),
            f"{kind}_means": _constant(prepared.means[latents.place][there.edge] * (1 if kind == "add" else -1)),
        }
        for name, change in changes.items():
            done[name] = succeeded(maze, mazes, site, kind, there, change, latents.place == "semicolon").numpy()
        for edge in np.unique(there.edge):
            of_edge = done[kind][there.edge.numpy() == edge].astype(np.float64)
            yield Measurement(kind, *mean_of(of_edge), at=grid.name(edge), n=len(of_edge), seed=SEED)
    done["add_tokens"] = told_as_tokens(maze, mazes, edits["add"]).numpy()
    yield from _shares(done, edits)


def _solved_through(trained: Trained, maze: Maze, mazes: Mazes, site: Site) -> Tensor:
    """Which mazes are solved with x_hat at every row, bool [mazes]."""
    ids = prompts(mazes)
    row = ids == SEMICOLON
    row |= row.roll(-1, dims=1)

    def patch(stream: Tensor) -> Tensor:
        there = row.to(stream.device)
        return stream.index_put((there,), trained.reconstruct(stream[there]).to(stream))

    return (maze.rollout(ids, {site: patch}) == answers(mazes)).all(dim=1)


def _constant(change: Tensor) -> Change:
    return lambda x: change.to(x)


class EdgeLatents:
    """The latents of each edge, and the changes of x that they make. x is changed in the space of raw activations: rows
    as the SAE sees them are scaled back to their norms."""

    def __init__(self, trained: Trained, told: dict[str, Told]) -> None:
        self._trained, self._W = trained, directions_of(trained, next(iter(told.values())).act)
        latents = {place: latents_of(trained, each.act) for place, each in told.items()}
        found = {place: find_connections(told[place], latents[place]) for place in told}
        self.place = better_place(found)
        there = latents[self.place]
        self._means = torch.from_numpy(np.stack([there[edge].mean(axis=0) for edge in told[self.place].edge.T]))
        self._own = torch.zeros(self._means.shape)  # [edges, n_latents], 1 where a latent is one of an edge
        for edge, tree in enumerate(found[self.place].trees):
            self._own[edge, list(tree.signs())] = 1
        self._alive = torch.from_numpy((there != 0).any(axis=0))

    def change(self, kind: Kind, edits: Edits) -> Change:
        """Latents of the edge set to their mean where it is told, or to 0."""
        own, wanted = self._own[edits.edge], self._means[edits.edge] * (kind == "add")

        def by(x: Tensor) -> Tensor:
            z = self._trained.encode(x)
            centred = x.float() - x.float().mean(dim=1, keepdim=True)
            return centred.norm(dim=1, keepdim=True) * (((wanted.to(z) - z) * own.to(z)) @ self._W)

        return by

    def random_change(self, kind: Kind, edits: Edits) -> Change:
        """Along the directions of as many other latents that are alive, drawn for each edit; as far as `change`."""
        own = self._own[edits.edge]
        draw = torch.rand(own.shape, generator=torch.Generator().manual_seed(SEED))
        draw = draw.masked_fill(~self._alive[None] | (own > 0), -1)
        rank = draw.argsort(dim=1, descending=True).argsort(dim=1)
        others = ((rank < own.sum(dim=1, keepdim=True)) & (draw >= 0)).float()
        like = self.change(kind, edits)

        def by(x: Tensor) -> Tensor:
            direction = torch.nn.functional.normalize(others.to(self._W) @ self._W, dim=1)
            return like(x).norm(dim=1, keepdim=True) * direction * (1 if kind == "add" else -1)

        return by


def _shares(done: dict[str, np.ndarray], edits: dict[Kind, Edits]) -> Iterator[Measurement]:
    """The share of successes of each way, and differences of two; mazes are drawn again for their intervals."""
    number = {kind: len(edits[kind].maze) for kind in KINDS}
    columns = {f"{kind} tried": np.repeat([kind == each for each in KINDS], [*number.values()]) for kind in KINDS}
    kinds: dict[str, Kind] = {name: "add" if name.startswith("add") else "remove" for name in done}
    for name, success in done.items():
        columns[name] = np.zeros(sum(number.values()))
        columns[name][columns[f"{kinds[name]} tried"]] = success
    shares = {name: ratio(name, f"{kind} tried") for name, kind in kinds.items()}

    def less(name: str, other: str) -> Callable[[Sums], np.ndarray]:
        return lambda sums: shares[name](sums) - shares[other](sums)

    statistics = shares | {f"{kind}_gain": less(kind, f"{kind}_random") for kind in KINDS}
    statistics["asymmetry"] = less("add", "remove")
    n = {name: number[kind] for name, kind in kinds.items()}
    for name, found in by_document(
        torch.cat([edits[kind].maze for kind in KINDS]).numpy(), columns, statistics
    ).items():
        yield Measurement(name, *found, n=n.get(name, sum(number.values())), seed=SEED)
