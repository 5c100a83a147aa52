"""How much memory a pack takes, said before it starts: what the planner fits into a worker.

    pack_memory(cells, eval_tokens=32_768, stream=StreamSize(8192, 262_144), kernels="cpu").total

Everything of a size worth counting is listed here, by where it is allocated. It comes on top of the process itself
(PROCESS_BYTES). Held to measured peaks by tests/trainers/test_memory.py. Of a worker with a GPU it is the GPU's memory
that is predicted; held-out rows and the stream's windows lie in the host's.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from saescale.trainers.architectures import auxk
from saescale.trainers.architectures.architecture import Settings, Shape, find_architecture
from saescale.trainers.architectures.sae import step_of
from saescale.trainers.cell import Cell
from saescale.trainers.evals.nmse import CHUNK_ROWS, rows_at_a_time
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Held, held
from saescale.trainers.preprocess import SAMPLE_TOKENS, Centre

PROCESS_BYTES = 800 * 2**20  # imports and compiled kernels of a worker, in the host's memory; measured
_FLOAT = 4
_ONE = Layout()
# What a process of a mesh has beyond all that is counted: up to 67 MiB measured, with batches of 2,048 rows of 512, and
# less with smaller ones. Likely freed blocks that glibc keeps for the threads that speak to others; not looked into.
_SPEAKING = 64 * 2**20
_ALLOCATOR = 1.15  # freed memory that the allocator keeps: up to 1.10 measured, which differs from run to run


class StreamSize(NamedTuple):
    """Of the training split of a store."""

    row_group_rows: int
    rows: int
    mixed: int | None = None  # rows of a window, where they are not those of eight row groups


class PackMemory(NamedTuple):
    """In bytes: the phases of a pack do not overlap, so its peak is the largest of them beside what is held."""

    held: float  # parameters, moments and average of all cells, their rounded encoders, their dead counters
    stream: float  # windows of the stream and held-out rows, in the host's memory
    training: float  # one cell's step: pre-activations, errors, selections, sorted pairs, AuxK
    evaluation: float  # one cell's averaged weights, its errors on a chunk of held-out rows, and preprocessed rows
    checkpoint: float  # one cell's state on its way into an object store; a local file is written tensor by tensor
    start: float  # the sample that the geometric median is measured on, before there are cells
    speaking: float = 0.0  # of the threads that speak to the other processes of a mesh, in the host's memory

    @property
    def total(self) -> float:
        work = self.held + max(self.training, self.evaluation, self.checkpoint)
        return _ALLOCATOR * (self.stream + max(work, self.start)) + self.speaking


def pack_memory(
    cells: Sequence[Cell],
    eval_tokens: int,
    stream: StreamSize,
    kernels: KernelKind = "cpu",
    remote_run: bool = False,
    layout: Layout = _ONE,
) -> PackMemory:
    """What training `cells` together takes. On a GPU `total` is of its memory, where the stream has no part.

    remote_run: the run directory is an object store, where a file is put in one piece. `layout`: of the processes that
    share the cells, of which each takes as much.
    """
    d_model, batch = cells[0].d_model, cells[0].batch_tokens
    host, bf16 = kernels == "cpu", any(cell.precision == "bf16" for cell in cells)
    windows = 3 * min(stream.mixed or 8 * stream.row_group_rows, stream.rows) * d_model * 2
    own = [_share(cell, layout) for cell in cells]
    looked_at = _preprocessed(rows_at_a_time(eval_tokens, d_model), d_model, bf16)
    making = _made(min(eval_tokens, CHUNK_ROWS), d_model)
    return PackMemory(
        held=sum(_held(cell) for cell in own),
        stream=windows + eval_tokens * d_model * 2 if host else 0,
        # Each has every batch whole, and the errors and pairs of all of it.
        training=max(_step(cell, layout, kernels) for cell in cells)
        + _preprocessed(batch, d_model, bf16)
        + _made(batch, d_model),
        evaluation=looked_at + max(_evaluation(cell, layout, kernels, making) for cell in cells),
        checkpoint=max(4 * weights_bytes(cell) for cell in own) if host and remote_run else 0,
        start=3 * _FLOAT * min(SAMPLE_TOKENS, stream.rows) * d_model if host else 0,
        speaking=_SPEAKING if host and layout.ranks > 1 else 0,
    )


def _share(cell: Cell, layout: Layout) -> Cell:
    """As large as what a process of that layout holds of a cell."""
    n_latents = layout.share(cell.n_latents, 0).size
    return cell.model_copy(update={"n_latents": max(n_latents, cell.k, _k_aux(cell))})


def _k_aux(cell: Cell) -> int:
    """0 where the architecture has none."""
    return getattr(cell.whole_settings, "k_aux", 0)


def _of_others(cell: Cell, layout: Layout, rows: int) -> Held:
    """What processes have from each other of so many rows: in that selection which takes most."""
    k = max(cell.whole_settings.pairs_per_token(cell.n_latents), _k_aux(cell))
    return held(layout, cell.d_model, cell.n_latents, k, rows)


def weights_bytes(cell: Cell) -> float:
    """Of its parameters."""
    return _FLOAT * _numbers(cell.architecture, cell.d_model, cell.n_latents, cell.whole_settings)


def _numbers(architecture: str, d_model: int, n_latents: int, settings: Settings) -> int:
    """How many numbers the parameters hold: as in two small SAEs, a fixed number and one for each latent."""
    small = min(n_latents, max(16, settings.k))
    while small < n_latents and not _fits(settings, small):
        small *= 2
    few, each = _counts(architecture, d_model, min(small, n_latents), settings)
    return few + each * (n_latents - min(small, n_latents))


@lru_cache(maxsize=4096)
def _counts(architecture: str, d_model: int, small: int, settings: Settings) -> tuple[int, int]:
    """Numbers of an SAE of `small` latents, and of each latent more."""

    def count(n: int) -> int:
        centre = Centre(torch.zeros(d_model), 1.0)
        made = find_architecture(architecture).parameters(Shape(d_model, n), settings, centre, 0)
        return sum(parameter.data.numel() for parameter in made.values())

    return count(small), (count(2 * small) - count(small)) // small


def _fits(settings: Settings, n_latents: int) -> bool:
    try:
        settings.check(n_latents)
    except ValueError:
        return False
    return True


def _rounded(cell: Cell) -> float:
    names = step_of(cell.architecture, cell.n_latents).rounded
    return 2 * cell.n_latents * cell.d_model * len(names) if cell.precision == "bf16" else 0


def _held(cell: Cell) -> float:
    # Parameters, two moments and the average. A gradient of the weights is part of the step, where one is made.
    return 4 * weights_bytes(cell) + _rounded(cell) + 8 * cell.n_latents


def _preprocessed(rows: int, d_model: int, bf16: bool) -> float:
    """x in float32, and rounded where some cell needs that."""
    return d_model * rows * (_FLOAT + 2 * bf16)


def _made(rows: int, d_model: int) -> float:
    """While rows are preprocessed: the raw ones and one more copy."""
    return d_model * rows * (2 + _FLOAT)


def _step(cell: Cell, layout: Layout, kernels: KernelKind) -> float:
    own = _share(cell, layout)
    step, shape = step_of(cell.architecture, own.n_latents), Shape(own.d_model, own.n_latents)
    asked = shape, cell.whole_settings, cell.batch_tokens
    if layout.ranks > 1 and hasattr(step, "bytes_on_mesh"):
        taken = step.bytes_on_mesh(*asked, layout, cell.precision, kernels)
        return taken + max(_of_others(cell, layout, cell.batch_tokens))
    taken = step.training_bytes(*asked, cell.precision, kernels)
    if layout.ranks > 1 and (k_aux := _k_aux(cell)):  # which goes another way there
        taken -= auxk.held_bytes(shape, k_aux, cell.batch_tokens, cell.precision, kernels)
        taken += auxk.held_on_mesh(shape, cell.batch_tokens // layout.replicas, cell.precision, kernels)
    return taken + max(_of_others(cell, layout, cell.batch_tokens))


def _evaluation(cell: Cell, layout: Layout, kernels: KernelKind, making: float) -> float:
    own = _share(cell, layout)
    step, shape = step_of(cell.architecture, own.n_latents), Shape(own.d_model, own.n_latents)
    made = step.evaluation_bytes(shape, cell.whole_settings, CHUNK_ROWS, cell.precision, kernels)
    selecting, summing = _of_others(cell, layout, CHUNK_ROWS)
    # A finished cell's averaged weights stand beside the bytes of all its tensors and of its file, which safetensors
    # makes in the host's memory; shards write theirs one tensor after another.
    written = weights_bytes(own) * (2 if kernels == "cpu" else 1) if layout.shards == 1 else 0
    return weights_bytes(own) + max(_rounded(own) + max(making, made + selecting, summing), written)
