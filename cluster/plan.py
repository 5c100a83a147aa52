"""Which cells are trained together: packs that fit a worker's memory, take about equally long, longest first."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from storage.errors import SaescaleError
from trainers.cell import Cell

PACKS_PER_WORKER = 2  # enough to even out workers of different speed; each pack reads the stream once


Needs = Callable[[Sequence[Cell]], float]


def plan_packs(
    cells: Sequence[Cell], steps: Mapping[str, int], workers: int, memory: float, needs: Needs
) -> list[list[Cell]]:
    """Cells in packs, the costliest pack first.

    steps: the step of each cell's newest checkpoint (0 or absent: none); only cells that stand at the same step
    can go on together. memory: bytes that one worker has; needs: bytes that a pack takes (trainers.memory).
    Raises SaescaleError where one cell alone needs more memory.
    """
    alike: dict[tuple[int, int, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        alike[cell.batch_tokens, cell.stream_seed, steps.get(cell.cell_id, 0)].append(cell)
    total = sum(cost(cell) for cell in cells)
    packs: list[list[Cell]] = []
    for group in alike.values():
        share = sum(cost(cell) for cell in group) / total
        packs += _split(group, max(1, round(share * workers * PACKS_PER_WORKER)), memory, needs)
    return sorted(packs, key=lambda pack: -sum(cost(cell) for cell in pack))


def _split(cells: Sequence[Cell], count: int, memory: float, needs: Needs) -> list[list[Cell]]:
    """At least `count` packs (where there are so many cells) of about equal cost that each fit into `memory`."""
    for packs_wanted in range(min(count, len(cells)), len(cells) + 1):
        packs: list[list[Cell]] = [[] for _ in range(packs_wanted)]
        for cell in sorted(cells, key=lambda cell: -cost(cell)):
            min(packs, key=lambda pack: sum(cost(c) for c in pack)).append(cell)
        if all(needs(pack) <= memory for pack in packs):
            return packs
    largest = max(cells, key=lambda cell: needs([cell]))
    raise SaescaleError(
        f"cell {largest.cell_id} needs {needs([largest]) / 2**30:.1f} GiB and a worker has {memory / 2**30:.1f} GiB; "
        "use fewer workers, a smaller batch_tokens or a larger machine"
    )


def cost(cell: Cell) -> float:
    """Sparse training FLOPs of the whole cell."""
    return float(cell.flops(cell.tokens).sparse)
