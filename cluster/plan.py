"""Which cells are trained together: packs that fit a worker's memory, take about equally long, longest first."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from storage.errors import SaescaleError
from trainers.cell import Cell
from trainers.evaluate import BATCH_ROWS, CHUNK_ROWS

PACKS_PER_WORKER = 2  # enough to even out workers of different speed; each pack reads the stream once


def plan_packs(
    cells: Sequence[Cell], steps: Mapping[str, int], workers: int, memory: float, dense: bool = False
) -> list[list[Cell]]:
    """Cells in packs, the costliest pack first.

    steps: the step of each cell's newest checkpoint (0 or absent: none); only cells that stand at the same step
    can go on together. memory: bytes that one worker has. dense: the workers train by the dense reference (see
    `pack_bytes`). Raises SaescaleError where one cell alone needs more memory.
    """
    alike: dict[tuple[int, int, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        alike[cell.batch_tokens, cell.stream_seed, steps.get(cell.cell_id, 0)].append(cell)
    total = sum(cost(cell) for cell in cells)
    packs: list[list[Cell]] = []
    for group in alike.values():
        share = sum(cost(cell) for cell in group) / total
        packs += _split(group, max(1, round(share * workers * PACKS_PER_WORKER)), memory, dense)
    return sorted(packs, key=lambda pack: -sum(cost(cell) for cell in pack))


def _split(cells: Sequence[Cell], count: int, memory: float, dense: bool) -> list[list[Cell]]:
    """At least `count` packs (where there are so many cells) of about equal cost that each fit into `memory`."""
    for packs_wanted in range(min(count, len(cells)), len(cells) + 1):
        packs: list[list[Cell]] = [[] for _ in range(packs_wanted)]
        for cell in sorted(cells, key=lambda cell: -cost(cell)):
            min(packs, key=lambda pack: sum(cost(c) for c in pack)).append(cell)
        if all(pack_bytes(pack, dense) <= memory for pack in packs):
            return packs
    largest = max(cells, key=lambda cell: pack_bytes([cell], dense))
    raise SaescaleError(
        f"cell {largest.cell_id} needs {pack_bytes([largest], dense) / 2**30:.1f} GiB and a worker has "
        f"{memory / 2**30:.1f} GiB; use fewer workers, a smaller batch_tokens or a larger machine"
    )


def cost(cell: Cell) -> float:
    """Sparse training FLOPs of the whole cell."""
    return float(cell.flops(cell.tokens).sparse)


def pack_bytes(cells: Sequence[Cell], dense: bool = False) -> float:
    """Memory that training a pack takes beside the process itself: held for every cell, and by the largest at work.

    The sparse path holds one [batch, n_latents] matrix of pre-activations; the dense reference, which trains where
    there is no sparse path (trainers/sparse.py), holds about eight for autograd.
    """
    held = sum(5 * _weights(cell) for cell in cells)  # parameters, gradients, two moments, EMA
    # At work: pre-activations of a training or an evaluation batch, and the averaged copy that is evaluated.
    matrices = 8 if dense else 1
    at_work = max(4 * matrices * max(cell.batch_tokens, BATCH_ROWS) * cell.n_latents + _weights(cell) for cell in cells)
    shared = 4 * 4 * CHUNK_ROWS * cells[0].d_model  # held-out rows and stream windows
    return held + at_work + shared


def _weights(cell: Cell) -> float:
    return 4 * (2 * cell.n_latents * cell.d_model + cell.n_latents + cell.d_model)
