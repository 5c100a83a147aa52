"""Random mazes without end: spanning trees of the lattice by a random depth-first search, an origin and a target.

Everything is drawn by a hash of seed, number of the maze and step: a maze is the same whoever draws it, with how many
others at once, on a CPU or a GPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saescale.storage.manifest import Split
from saescale.trainers.subjects.drawn import Drawn, draw_split
from saescale.trainers.subjects.hashed import hashed, positive
from saescale.trainers.subjects.maze.lattice import Lattice, lattice, shortest_paths

AT_A_TIME = {"cpu": 1_024, "cuda": 32_768}  # on a GPU calls weigh more than mazes
# Where in a maze's row of hashes each kind of draw begins; a search takes fewer steps than lie between.
_SEARCH, _ORDER, _TURN, _ENDS = 0, 10_000, 20_000, 30_000


class Mazes(NamedTuple):
    """Mazes of one size and one number of connections: `present` bool [mazes, edges]; `listed` int64 [mazes,
    connections, 2], their cells as the model is told them; `origin` and `target` int64 [mazes]; `path` int64 [mazes,
    cells], from origin to target, NOWHERE behind it."""

    present: Tensor
    listed: Tensor
    origin: Tensor
    target: Tensor
    path: Tensor


def random_mazes(size: int, seed: int, numbers: Tensor) -> Mazes:
    """The mazes of these `numbers`, int64 [mazes]: trees, so there is one path. The list of connections is shuffled and
    each of them turned at random; origin and target are any two cells."""
    grid = lattice(size).to(numbers.device)
    key = hashed(torch.full_like(numbers, seed), numbers)
    present = random_trees(grid, key)
    edges = torch.arange(grid.n_edges, device=numbers.device)
    order = _bits(key[:, None], _ORDER + edges).masked_fill(~present, -1).argsort(dim=1, descending=True, stable=True)
    order = order[:, : grid.n_cells - 1]
    turned = (_bits(key[:, None], _TURN + edges) & 1).bool().gather(1, order)
    listed = grid.ends[order]
    listed = torch.where(turned[..., None], listed.flip(2), listed)
    return Mazes(present, listed, *_ends(grid, present, key, 0))


def other_ends(size: int, seed: int, numbers: Tensor, mazes: Mazes, which: int) -> Mazes:
    """The same mazes between two other cells: the draw of that number, where 0 is that of `random_mazes`."""
    grid = lattice(size).to(numbers.device)
    key = hashed(torch.full_like(numbers, seed), numbers)
    return Mazes(mazes.present, mazes.listed, *_ends(grid, mazes.present, key, which))


def _ends(grid: Lattice, present: Tensor, key: Tensor, which: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origin, target and path of each maze."""
    origin = _bits(key, _ENDS + 2 * which) % grid.n_cells
    target = (origin + 1 + _bits(key, _ENDS + 2 * which + 1) % (grid.n_cells - 1)) % grid.n_cells
    return origin, target, shortest_paths(grid, present, origin, target)


def random_trees(grid: Lattice, key: Tensor) -> Tensor:
    """A spanning tree for each key, bool [keys, edges]: from a random cell on to a random neighbour that was not seen
    before, and back where there is none (depth-first search)."""
    mazes, cells = len(key), grid.n_cells
    seen = torch.zeros(mazes, cells + 1, dtype=torch.bool, device=key.device)
    seen[:, cells] = True  # what is no cell
    present = torch.zeros(mazes, grid.n_edges + 1, dtype=torch.bool, device=key.device)
    came_from = torch.zeros(mazes, cells + 1, dtype=torch.int64, device=key.device)
    here = _bits(key, _SEARCH) % cells
    seen.scatter_(1, here[:, None], True)
    step = _SEARCH
    while not seen.all():
        step += 1
        around = grid.near[here]
        new = ~seen.gather(1, around)
        choices = new.sum(dim=1)
        draw = _bits(key, step) % choices.clamp_min(1)
        direction = (new & (new.cumsum(dim=1) == draw[:, None] + 1)).byte().argmax(dim=1, keepdim=True)
        stuck = choices == 0
        onward = around.gather(1, direction)[:, 0].masked_fill(stuck, cells)
        by = grid.by[here].gather(1, direction)[:, 0].masked_fill(stuck, grid.n_edges)
        seen.scatter_(1, onward[:, None], True)
        present.scatter_(1, by[:, None], True)
        came_from.scatter_(1, onward[:, None], here[:, None])
        here = torch.where(stuck, came_from.gather(1, here[:, None])[:, 0], onward)
    return present[:, :-1]


def mazes_of_split(
    size: int, split: Split, seed: int, first: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Drawn[Mazes]]:
    """The mazes of a split from number `first` on, without end, a thousand or more at a time. What is connected
    decides, whatever order, origin and target."""
    draw = partial(random_mazes, size, seed)
    return draw_split(draw, lambda mazes: mazes.present, split, first, device, AT_A_TIME)


def _bits(key: Tensor, number: Tensor | int) -> Tensor:
    """31 random bits, as an int64 that is not negative."""
    return positive(hashed(key, torch.as_tensor(number, device=key.device)))
