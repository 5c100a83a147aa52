"""Which cells are trained together: packs that fit a worker's memory, take about equally long, longest first.

A pack is also bounded in what is done between two looks whether it is to stop: reading the stream once for more cells
saves nothing then, and an end would wait for them all.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from heapq import heappop, heappush

from saescale.cluster.crew.claims import Needs
from saescale.storage.checkpoint import KEPT
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell

PACKS_PER_WORKER = 2  # enough to even out several workers of different speed; each pack reads the stream once
MAX_CELLS = 64  # beside so many, what a pack costs by itself (two seconds, measured) does not count
BATCH_FLOPS = {"cpu": 2e11, "cuda": 2e13}  # of all cells of a pack: some seconds


def pack_cells(
    cells: Sequence[Cell],
    steps: Mapping[str, Sequence[int]],
    workers: int,
    memory: float,
    needs: Needs,
    batch_flops: float = math.inf,
    live: Set[str] = frozenset(),
) -> list[list[Cell]]:
    """Cells in packs, the costliest pack first; of the stores in `live`, whose rows are made anew for those that come
    later, no more packs than can go on at a time.

    steps: the steps of each cell's checkpoints (absent: none); only cells with one in common go on together. memory:
    bytes that one worker has; needs: bytes that a pack takes, all of whose cells are of one store
    (trainers/training/memory.py); batch_flops: the most that
    several cells do on one batch. Raises SaescaleError where one cell alone needs more memory.
    """
    # What one pass over a stream can serve.
    alike: dict[tuple[str, int, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        alike[cell.store, cell.batch_tokens, cell.stream_seed].append(cell)
    total = sum(cost(cell) for cell in cells)
    wanted = workers * PACKS_PER_WORKER if workers > 1 else 1
    packs: list[list[Cell]] = []
    for company in alike.values():
        for group in _groups(company, steps):
            share = sum(cost(cell) for cell in group) / total
            each = workers if group[0].store in live else wanted
            packs += split(group, max(1, round(share * each)), memory, needs, batch_flops)
    return sorted(packs, key=lambda pack: -sum(cost(cell) for cell in pack))


def _groups(cells: Sequence[Cell], steps: Mapping[str, Sequence[int]]) -> list[list[Cell]]:
    """Cells that can go on together from a step that they all have, in as few groups as can easily be found.

    By the newest step alone, a kill while a pack was being saved would part its cells for good.
    """
    stands = {cell.cell_id: set(steps.get(cell.cell_id, ())) for cell in cells}
    for found in stands.values():
        if len(found) < KEPT:  # the start is as near as the checkpoint that is still missing
            found.add(0)
    groups, left = [], list(cells)
    while left:
        counts = Counter(step for cell in left for step in stands[cell.cell_id])
        together = max(counts, key=lambda step: (counts[step], step))
        groups.append([cell for cell in left if together in stands[cell.cell_id]])
        left = [cell for cell in left if together not in stands[cell.cell_id]]
    return groups


def split(
    cells: Sequence[Cell], count: int, memory: float, needs: Needs, batch_flops: float = math.inf
) -> list[list[Cell]]:
    """At least `count` packs (where there are so many cells) of about equal cost that each fit into `memory` bytes,
    have at most MAX_CELLS and, where they are several, do at most `batch_flops` on a batch.

    Raises SaescaleError where one cell alone needs more memory.
    """
    costs = {cell.cell_id: cost(cell) for cell in cells}
    per_batch = {cell.cell_id: costs[cell.cell_id] / cell.steps for cell in cells}

    def fits(pack: list[Cell]) -> bool:
        quick = len(pack) == 1 or sum(per_batch[cell.cell_id] for cell in pack) <= batch_flops
        return len(pack) <= MAX_CELLS and quick and needs(pack) <= memory

    least = max(count, math.ceil(len(cells) / MAX_CELLS), math.ceil(sum(per_batch.values()) / batch_flops))
    wanted = min(least, len(cells))
    costly_first = sorted(((costs[cell.cell_id], cell) for cell in cells), key=lambda pair: -pair[0])
    while True:
        packs: list[list[Cell]] = [[] for _ in range(wanted)]
        loads = [(0.0, number) for number in range(wanted)]
        for spent, cell in costly_first:
            load, number = heappop(loads)
            packs[number].append(cell)
            heappush(loads, (load + spent, number))
        if all(map(fits, packs)):
            return packs
        if wanted == len(cells):
            break
        wanted = min(len(cells), max(wanted + 1, int(1.1 * wanted)))
    largest = max(cells, key=lambda cell: needs([cell]))
    raise SaescaleError(
        f"cell {largest.cell_id} needs {needs([largest]) / 2**30:.1f} GiB and a worker has {memory / 2**30:.1f} GiB; "
        "use fewer workers, a smaller batch_tokens or a larger machine"
    )


def cost(cell: Cell) -> float:
    """Sparse training FLOPs of the whole cell."""
    return float(cell.flops(cell.tokens).sparse)
