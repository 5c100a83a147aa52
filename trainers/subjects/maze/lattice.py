"""Mazes on a square lattice: cells, the edges between neighbours, ways through them; many mazes at once.

Cells are numbered row by row. An edge is a pair of neighbours (a < b), numbered in the order of a, the one to the right
before the one below. A maze is which of the edges are connections, bool [mazes, edges].
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NOWHERE = -1


class Lattice(NamedTuple):
    """`ends` int64 [edges, 2]: the cells of each edge. `near` and `by`, int64 [cells, 4]: the neighbours of each cell
    (right, below, left, above) and the edges to them; where there is none, the number of cells or edges, one more than
    the last. `edge` int64 [cells, cells]: the edge between two cells, or the number of edges."""

    size: int
    ends: Tensor
    near: Tensor
    by: Tensor
    edge: Tensor

    @property
    def n_cells(self) -> int:
        return len(self.near)

    @property
    def n_edges(self) -> int:
        return len(self.ends)

    def to(self, device: torch.device | str) -> "Lattice":
        return Lattice(self.size, *(table.to(device) for table in self[1:]))

    def name(self, edge: int) -> str:
        """Such as `(0,0)-(0,1)`."""
        return "-".join("({},{})".format(*divmod(int(cell), self.size)) for cell in self.ends[edge])


@cache
def lattice(size: int) -> Lattice:
    """Of `size` x `size` cells."""
    cells = size * size
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    around = [
        [r * size + c if 0 <= r < size and 0 <= c < size else cells for down, right in steps
         for r, c in [(cell // size + down, cell % size + right)]]
        for cell in range(cells)
    ]  # fmt: skip
    ends = [(cell, other) for cell in range(cells) for other in around[cell][:2] if other < cells]
    edge = torch.full((cells + 1, cells + 1), len(ends))
    for number, (a, b) in enumerate(ends):
        edge[a, b] = edge[b, a] = number
    near = torch.tensor(around)
    return Lattice(size, torch.tensor(ends), near, edge[torch.arange(cells)[:, None], near], edge[:cells, :cells])


def distances(grid: Lattice, present: Tensor, target: Tensor) -> Tensor:
    """Steps from every cell to `target` [mazes], int64 [mazes, cells + 1]; the number of cells where there is no way,
    and in the last column, which is no cell."""
    far, mazes = grid.n_cells, len(present)
    # Mazes lie side by side in a row of each cell, which is then read as a whole.
    closed = (~_open(grid, present)).permute(2, 1, 0).to(torch.int16) * far  # [4, cells, mazes]
    steps = torch.full((far + 1, mazes), far, dtype=torch.int16, device=present.device)
    steps.scatter_(0, target[None], 0)
    while True:
        new = steps[:far]
        for direction in range(4):
            new = torch.minimum(new, steps[grid.near[:, direction]] + closed[direction] + 1)
        if torch.equal(new, steps[:far]):
            return steps.T.long()
        steps[:far] = new


def shortest_paths(grid: Lattice, present: Tensor, origin: Tensor, target: Tensor) -> Tensor:
    """The cells from `origin` to `target`, both among them, int64 [mazes, cells], NOWHERE behind the last; where there
    is no way, NOWHERE alone. Of several shortest ones that which first goes right, then below, then left."""
    steps = distances(grid, present, target)
    open_ = _open(grid, present)
    path = torch.full((len(present), grid.n_cells), NOWHERE, device=present.device)
    here, left = origin.clone(), steps.gather(1, origin[:, None])[:, 0]
    going = left < grid.n_cells
    mazes = torch.arange(len(present), device=present.device)
    for place in range(grid.n_cells):
        path[:, place] = torch.where(going, here, NOWHERE)
        going = going & (left > 0)
        if not going.any():
            break
        around = grid.near[here]
        closer = open_[mazes, here] & (steps.gather(1, around) == left[:, None] - 1)
        onward = around.gather(1, closer.byte().argmax(dim=1, keepdim=True))[:, 0]
        here, left = torch.where(going, onward, here), left - 1
    return path


def _open(grid: Lattice, present: Tensor) -> Tensor:
    """Whether one can go from each cell to each of its neighbours, bool [mazes, cells, 4]."""
    return torch.nn.functional.pad(present, (0, 1))[:, grid.by]
