"""How much memory a pack takes, said before it starts: what the planner fits into a worker.

    pack_memory(cells, eval_tokens=32_768, stream=StreamSize(8192, 262_144), kernels="cpu").total

Everything of a size worth counting is listed here, by where it is allocated. It comes on top of the process itself
(PROCESS_BYTES). Held to measured peaks by tests/trainers/test_memory.py. Of a worker with a GPU it is the GPU's memory
that is predicted; held-out rows and the stream's windows lie in the host's.
"""

from collections.abc import Sequence
from typing import NamedTuple

from saescale.trainers.architectures.reference import MULTI_TOPK_FACTOR
from saescale.trainers.architectures.topk_sparse import AUXK_ENTRIES, FEW_DEAD
from saescale.trainers.cell import Cell
from saescale.trainers.evals.nmse import CHUNK_ROWS
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.eager import ENTRIES as EAGER_ENTRIES
from saescale.trainers.kernels.interface import group_size, product_rows
from saescale.trainers.preprocess import SAMPLE_TOKENS

PROCESS_BYTES = 800 * 2**20  # imports and compiled kernels of a worker, in the host's memory; measured
_FLOAT = 4
_ALLOCATOR = 1.1  # freed memory that the allocator keeps, measured


class StreamSize(NamedTuple):
    """Of the training split of a store."""

    row_group_rows: int
    rows: int


class PackMemory(NamedTuple):
    """In bytes: the phases of a pack do not overlap, so its peak is the largest of them beside what is held."""

    held: float  # parameters, moments and average of all cells, their rounded encoders, their dead counters
    stream: float  # windows of the stream and held-out rows, in the host's memory
    training: float  # one cell's step: pre-activations, errors, selections, sorted pairs, AuxK
    evaluation: float  # one cell's averaged weights and its errors on a chunk of held-out rows
    checkpoint: float  # one cell's state on its way into an object store; a local file is written tensor by tensor
    start: float  # the sample that the geometric median is measured on, before there are cells

    @property
    def total(self) -> float:
        work = self.held + max(self.training, self.evaluation, self.checkpoint)
        return _ALLOCATOR * (self.stream + max(work, self.start))


def pack_memory(
    cells: Sequence[Cell],
    eval_tokens: int,
    stream: StreamSize,
    kernels: KernelKind = "cpu",
    remote_run: bool = False,
) -> PackMemory:
    """What training `cells` together takes. On a GPU `total` is of its memory, where the stream has no part.

    remote_run: the run directory is an object store, where a file is put in one piece.
    """
    d_model, batch = cells[0].d_model, cells[0].batch_tokens
    host = kernels == "cpu"
    windows = 3 * min(8 * stream.row_group_rows, stream.rows) * d_model * 2
    return PackMemory(
        held=sum(_held(cell) for cell in cells),
        stream=windows + eval_tokens * d_model * 2 if host else 0,
        training=max(_step(cell, kernels) for cell in cells) + _preprocessed(batch, d_model),
        evaluation=max(_evaluation(cell, kernels) for cell in cells) + _preprocessed(CHUNK_ROWS, d_model),
        checkpoint=max(4 * _weights(cell) for cell in cells) if host and remote_run else 0,
        start=3 * _FLOAT * min(SAMPLE_TOKENS, stream.rows) * d_model if host else 0,
    )


def _weights(cell: Cell) -> float:
    return _FLOAT * (2 * cell.n_latents * cell.d_model + cell.n_latents + cell.d_model)


def _rounded(cell: Cell) -> float:
    return 2 * cell.n_latents * cell.d_model if cell.precision == "bf16" else 0


def _held(cell: Cell) -> float:
    # The gradient of the weights is not among them: it is never whole (sparse.update_rows).
    return 4 * _weights(cell) + _rounded(cell) + 8 * cell.n_latents


def _preprocessed(rows: int, d_model: int) -> float:
    """Raw rows, x in float32 and rounded, and one more copy while it is made."""
    return rows * d_model * (2 + _FLOAT + 2 + _FLOAT)


def _pre_activations(cell: Cell, rows: int, kernels: KernelKind) -> float:
    if kernels == "eager":
        # Keys to select by, or latents and their gradient.
        return 4 * _FLOAT * min(rows * cell.n_latents, EAGER_ENTRIES)
    width = 2 if cell.precision == "bf16" else _FLOAT
    widest = min(MULTI_TOPK_FACTOR * cell.k, cell.n_latents) if cell.multi_topk else cell.k
    maxima = _FLOAT / group_size(cell.n_latents, widest) if kernels == "cuda" else 0
    return product_rows(rows, cell.n_latents, kernels) * cell.n_latents * (width + maxima)


def _step(cell: Cell, kernels: KernelKind) -> float:
    batch = cell.batch_tokens
    multi = min(MULTI_TOPK_FACTOR * cell.k, cell.n_latents) if cell.multi_topk else 0
    terms = 1 + bool(multi) + bool(cell.k_aux)
    selected = cell.k + multi + cell.k_aux
    errors = terms * batch * cell.d_model * _FLOAT
    # Index, z and dz of each, then their pairs sorted: row and two weights. A few index tensors are int64 on the way;
    # on a GPU the sort has keys and an order besides.
    pairs = batch * selected * (3 * _FLOAT + 3 * _FLOAT + (8 if kernels == "cpu" else 24))
    few = min(FEW_DEAD * cell.k_aux, cell.n_latents)
    dense_auxk = 4 * few * cell.d_model * _FLOAT + 4 * min(AUXK_ENTRIES, batch * few) * _FLOAT
    sparse_auxk = cell.n_latents * cell.d_model * (2 if cell.precision == "bf16" else _FLOAT) if cell.k_aux else 0
    gradients = 2 * _weights(cell) if kernels == "eager" else 0
    return _pre_activations(cell, batch, kernels) + errors + pairs + max(dense_auxk, sparse_auxk) + gradients


def _evaluation(cell: Cell, kernels: KernelKind) -> float:
    errors = CHUNK_ROWS * cell.d_model * _FLOAT + CHUNK_ROWS * cell.k * 3 * _FLOAT
    working = _weights(cell) + _rounded(cell) + _pre_activations(cell, CHUNK_ROWS, kernels) + errors
    # A finished cell's averaged weights stand beside the bytes of its file.
    return max(working, 2 * _weights(cell))
