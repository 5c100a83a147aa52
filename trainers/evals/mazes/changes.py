"""Mazes in which an edge is added or removed by a change of the stream, and whether the model then goes another way."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saescale.storage.manifest import Site
from saescale.trainers.evals.intervals import SEED
from saescale.trainers.subjects.drawn import those
from saescale.trainers.subjects.maze.lattice import NOWHERE, Lattice, lattice, shortest_paths
from saescale.trainers.subjects.maze.maze import Maze
from saescale.trainers.subjects.maze.mazes import Mazes
from saescale.trainers.subjects.maze.tokens import FIRST_CELL, PER_CONNECTION, answers, prompts

Kind = Literal["add", "remove"]
Change = Callable[[Tensor], Tensor]  # x where each edit is made [edits, d_model] -> what is added to it


class Edits(NamedTuple):
    """Each of one edge in one maze, int64 [edits]: their numbers, and the place in the list of connections where the
    stream is changed; `wanted` [edits, cells + 1]: the answer of the maze with the edge added."""

    maze: Tensor
    edge: Tensor
    place: Tensor
    wanted: Tensor


def edits_to_add(size: int, mazes: Mazes) -> Edits:
    """Of every edge the mazes without it in which it makes the path shorter (that one is then the only shortest), at
    places drawn at random."""
    maze, edge = (~mazes.present).nonzero().unbind(dim=1)
    changed = mazes.present[maze].scatter(1, edge[:, None], True)
    path = shortest_paths(lattice(size), changed, mazes.origin[maze], mazes.target[maze])
    shorter = (path >= 0).sum(dim=1) < (mazes.path[maze] >= 0).sum(dim=1)
    draw = torch.Generator().manual_seed(SEED)
    place = torch.randint(mazes.listed.shape[1], (len(maze),), generator=draw)
    return those(Edits(maze, edge, place, answers(those(mazes, maze)._replace(path=path))), shorter)


def edits_to_remove(size: int, mazes: Mazes) -> Edits:
    """Of every edge the mazes whose path crosses it, at the place where it is listed."""
    grid = lattice(size)
    listed = grid.edge[mazes.listed[..., 0], mazes.listed[..., 1]]
    crossed = _edges_of_ways(grid, mazes.path)
    maze, place = (listed[:, :, None] == crossed[:, None, :]).any(dim=2).nonzero().unbind(dim=1)
    return Edits(maze, listed[maze, place], place, answers(mazes)[maze])


def few_of_each_edge(edits: Edits, number: int) -> Edits:
    """The first ones of each edge."""
    order = torch.argsort(edits.edge, stable=True)
    edge = edits.edge[order]
    return those(edits, order[torch.arange(len(edge)) - torch.searchsorted(edge, edge) < number])


def succeeded(
    maze: Maze, mazes: Mazes, site: Site, kind: Kind, edits: Edits, change: Change, semicolon: bool = True
) -> Tensor:
    """Whether the model, which goes on greedily from the stream that is changed at the `;` or the second cell of each
    edit's connection, does what it asks for, bool [edits]: goes the wanted way, or never crosses the removed edge."""
    positions = PER_CONNECTION * (edits.place + 1) - (0 if semicolon else 1)

    def patch(stream: Tensor) -> Tensor:
        there = torch.arange(len(stream), device=stream.device), positions.to(stream.device)
        return stream.index_put(there, stream[there] + change(stream[there]).to(stream))

    said = maze.rollout(prompts(those(mazes, edits.maze)), {site: patch})
    if kind == "add":
        return (said == edits.wanted).all(dim=1)
    cells = torch.where(said >= FIRST_CELL, said - FIRST_CELL, NOWHERE)
    return ~(_edges_of_ways(lattice(maze.size), cells) == edits.edge[:, None]).any(dim=1)


def told_as_tokens(maze: Maze, mazes: Mazes, edits: Edits) -> Tensor:
    """Whether the model goes the wanted way where the edge is one more connection of the list, behind that at the place
    of each edit, bool [edits]; never where it cannot read so long a list."""
    with_it = those(mazes, edits.maze)
    number, connections = with_it.listed.shape[:2]
    order = torch.cat([2 * torch.arange(connections)[None].expand(number, -1), 2 * edits.place[:, None] + 1], dim=1)
    ends = lattice(maze.size).ends[edits.edge]
    listed = torch.cat([with_it.listed, ends[:, None]], dim=1)
    place = order.argsort(dim=1)
    prompt = prompts(with_it._replace(listed=listed.gather(1, place[..., None].expand(-1, -1, 2))))
    if maze.max_positions is not None and prompt.shape[1] > maze.max_positions:
        return torch.zeros(number, dtype=torch.bool)
    return (maze.rollout(prompt) == edits.wanted).all(dim=1)


def _edges_of_ways(grid: Lattice, cells: Tensor) -> Tensor:
    """The edge of each step of ways [ways, cells], NOWHERE at the end; between cells that are no neighbours, the number
    of edges. int64 [ways, cells - 1]."""
    step = (cells[:, :-1] >= 0) & (cells[:, 1:] >= 0)
    return torch.where(step, grid.edge[cells[:, :-1].clamp_min(0), cells[:, 1:].clamp_min(0)], NOWHERE)
