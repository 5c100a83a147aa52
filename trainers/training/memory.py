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
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.architectures.sae import step_of
from saescale.trainers.cell import Cell
from saescale.trainers.evals.nmse import CHUNK_ROWS, rows_at_a_time
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import product_rows
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Held, held
from saescale.trainers.preprocess import SAMPLE_CHUNK, SAMPLE_TOKENS, Centre

PROCESS_BYTES = 800 * 2**20  # imports and compiled kernels of a worker, in the host's memory; measured
_FLOAT = 4
_ONE = Layout()
# What allocators keep of freed memory, which differs from run to run: of a host's up to 1.17 measured; in a mesh, of
# blocks below 4 MiB alone (device.keep_no_large_blocks), where peaks were up to 1.01; of a GPU's up to 1.10.
_OF_HOST, _OF_MESH, _OF_GPU = 1.18, 1.08, 1.15


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
    allocator: float  # no bytes: how many times all that, with what is kept of freed memory

    @property
    def total(self) -> float:
        work = self.held + max(self.training, self.evaluation, self.checkpoint)
        return self.allocator * (self.stream + max(work, self.start))


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
    return PackMemory(
        held=sum(_held(cell) for cell in own),
        stream=windows + eval_tokens * d_model * 2 if host else 0,
        # Each has every batch whole, and the errors and pairs of all of it.
        training=max(_step(cell, layout, kernels, eval_tokens) for cell in cells)
        + _preprocessed(batch, d_model, bf16)
        + _made(batch, d_model),
        evaluation=max(_evaluation(cell, layout, kernels, eval_tokens, bf16) for cell in cells),
        checkpoint=max(4 * weights_bytes(cell) for cell in own) if host and remote_run else 0,
        start=_start(min(SAMPLE_TOKENS, stream.rows), d_model) if host else 0,
        allocator=(_OF_HOST if layout.ranks == 1 else _OF_MESH) if host else _OF_GPU,
    )


def _share(cell: Cell, layout: Layout) -> Cell:
    """As large as what a process of that layout holds of a cell."""
    n_latents = layout.share(cell.n_latents, 0).size
    return cell.model_copy(update={"n_latents": max(n_latents, cell.k, _k_aux(cell))})


def _k_aux(cell: Cell) -> int:
    """0 where the architecture has none."""
    return getattr(cell.whole_settings, "k_aux", 0)


def _of_others(cell: Cell, layout: Layout, rows: int, k: int) -> Held:
    """What processes have from each other of so many rows, where `k` latents of each are selected."""
    said = getattr(step_of(cell.architecture, cell.n_latents), "said", None)
    together = said(cell.whole_settings, cell.n_latents).sums if said and layout.replicas > 1 else 1
    return held(layout, cell.d_model, cell.n_latents, k, rows, together)


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


def _start(rows: int, d_model: int) -> float:
    """The sample beside its distances from a point, or a chunk of it in float64 and what is made of that."""
    return d_model * (_FLOAT * rows + max(_FLOAT * rows, 2 * 8 * min(SAMPLE_CHUNK, rows)))


def _preprocessed(rows: int, d_model: int, bf16: bool) -> float:
    """x in float32, and rounded where some cell needs that."""
    return d_model * rows * (_FLOAT + 2 * bf16)


def _made(rows: int, d_model: int) -> float:
    """While rows are preprocessed: the raw ones and one more copy."""
    return d_model * rows * (2 + _FLOAT)


def _step(cell: Cell, layout: Layout, kernels: KernelKind, eval_tokens: int) -> float:
    own, batch = _share(cell, layout), cell.batch_tokens
    step, shape = step_of(cell.architecture, own.n_latents), Shape(own.d_model, own.n_latents)
    k_aux, dead = _k_aux(cell), 0.0
    of_others = _of_others(cell, layout, batch, max(cell.whole_settings.pairs_per_token(cell.n_latents), k_aux))
    said = max(of_others.selecting, of_others.gathering + of_others.summing)
    if layout.ranks > 1 and hasattr(step, "bytes_on_mesh"):
        return step.bytes_on_mesh(shape, cell.whole_settings, batch, layout, cell.precision, kernels) + said
    taken = step.training_bytes(shape, cell.whole_settings, batch, cell.precision, kernels)
    # Where an evaluation has taken more for the product of its rows.
    taken += max(
        0.0, _product(own, layout, kernels, min(eval_tokens, CHUNK_ROWS)) - _product(own, _ONE, kernels, batch)
    )
    if layout.ranks == 1:
        return taken
    if k_aux:  # which goes another way there
        taken -= auxk.held_bytes(shape, k_aux, batch, cell.precision, kernels)
        taken += auxk.held_on_mesh(shape, batch // layout.replicas, cell.precision, kernels)
        dead = _FLOAT * own.n_latents * own.d_model  # rows of W_enc, gone before there is anything of others
    return taken + max(dead, said)


def _product(own: Cell, layout: Layout, kernels: KernelKind, rows: int) -> float:
    """Pre-activations of a sparse path on a CPU: that memory stays, as large as it ever was (cpu.py)."""
    if kernels != "cpu" or isinstance(step_of(own.architecture, own.n_latents), DenseStep):
        return 0.0
    width = 2 if own.precision == "bf16" else _FLOAT
    return product_rows(-(-rows // layout.replicas), own.n_latents, "cpu") * own.n_latents * width


def _evaluation(cell: Cell, layout: Layout, kernels: KernelKind, eval_tokens: int, bf16: bool) -> float:
    own, rows = _share(cell, layout), min(eval_tokens, CHUNK_ROWS)
    step, shape = step_of(cell.architecture, own.n_latents), Shape(own.d_model, own.n_latents)
    looked_at = _preprocessed(rows_at_a_time(eval_tokens, cell.d_model), cell.d_model, bf16)
    mine = -(-rows // layout.replicas)
    made = step.evaluation_bytes(shape, cell.whole_settings, mine, cell.precision, kernels)
    of_others = _of_others(cell, layout, rows, cell.whole_settings.pairs_per_token(cell.n_latents))
    measuring = looked_at + max(_made(rows, cell.d_model), made + max(of_others.selecting, of_others.summing))
    # A finished cell's averaged weights stand beside the bytes of all its tensors and of its file, which safetensors
    # makes in the host's memory; shards write theirs one tensor after another.
    written = weights_bytes(own) * (2 if kernels == "cpu" else 1) if layout.shards == 1 else 0
    kept = _product(own, layout, kernels, rows)
    return weights_bytes(own) + max(_rounded(own) + measuring, kept + written)
