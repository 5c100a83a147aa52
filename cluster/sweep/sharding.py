"""The smallest mesh whose processes each hold their part of a cell, and how long a step of it takes."""

from typing import NamedTuple

from pydantic import ValidationError

from saescale.cluster.sweep.work import work_of_step
from saescale.scaling.planning.devices import Device, Work
from saescale.scaling.planning.network import Mesh, Network, Sent, sent
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.training.memory import StreamSize, pack_memory, weights_bytes

_FLOAT = 4


class Step(NamedTuple):
    """Of a cell on a mesh: bytes of memory of one process, what each is sent, and seconds, of which some go to the
    network."""

    mesh: Mesh
    bytes: float
    sent: Sent
    compute_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.network_s


def part_of(cell: Cell, mesh: Mesh) -> Cell | None:
    """What one process of the mesh has of a cell; the largest share where shares differ. None where the cell cannot be
    cut so."""
    if mesh.processes == 1:
        return cell
    latents, rows = -(-cell.n_latents // mesh.shards), cell.batch_tokens // mesh.replicas
    if mesh.shards > cell.n_latents or cell.batch_tokens % mesh.replicas:
        return None
    own = {"n_latents": latents, "k": min(cell.k, latents), "batch_tokens": rows, "tokens": rows * cell.steps}
    try:
        return Cell.model_validate({**cell.model_dump(), **own})
    except ValidationError:  # such as experts that would lie on two shards
        return None


def part_memory(cell: Cell, mesh: Mesh, eval_tokens: int, stream: StreamSize, kernels: KernelKind) -> float | None:
    """Bytes that one process takes: its part as a cell of its own, and of the other shards their candidates or counts
    and the pieces of the reconstruction that it adds up."""
    part = part_of(cell, mesh)
    if part is None:
        return None
    alone = pack_memory([part], eval_tokens, stream, kernels).total
    told = _sent(cell, mesh)
    return alone + told.selection + 2 * _FLOAT * part.batch_tokens * cell.d_model * (mesh.shards > 1)


def step_on(cell: Cell, mesh: Mesh, device: Device, network: Network, eval_tokens: int, stream: StreamSize) -> Step:
    """Raises SaescaleError where the cell cannot be cut so."""
    kernels: KernelKind = "cpu" if device.name == "cpu" else "cuda"
    taken = part_memory(cell, mesh, eval_tokens, stream, kernels)
    if taken is None:
        raise SaescaleError(
            f"cell {cell.cell_id} cannot be cut into {mesh} (shards x replicas): give fewer shards, or replicas that "
            "divide batch_tokens"
        )
    whole, told = work_of_step(cell), _sent(cell, mesh)
    # What each does: products and pairs of its rows and latents; its own weights and scores.
    traffic = 8 * weights_bytes(cell) / mesh.shards + 4.0 * cell.batch_tokens * cell.n_latents / mesh.processes
    work = Work(whole.products / mesh.processes, whole.pairs / mesh.processes, traffic, 1.0)
    return Step(mesh, taken, told, device.seconds(work), network.seconds(mesh, told))


def smallest(
    cell: Cell, most: int, memory: float, device: Device, network: Network, eval_tokens: int, stream: StreamSize
) -> Step:
    """The step on the smallest mesh, of powers of two, whose processes have room, of equally small ones the fastest.

    Raises SaescaleError where none of at most `most` processes has.
    """
    size = 1
    while size <= most:
        fitting = []
        for shards in (2**i for i in range(size.bit_length())):
            mesh = Mesh(shards, size // shards)
            if part_of(cell, mesh) is not None:
                step = step_on(cell, mesh, device, network, eval_tokens, stream)
                fitting += [step] if step.bytes <= memory else []
        if fitting:
            return min(fitting, key=lambda step: (step.seconds, step.mesh.replicas))
        size *= 2
    alone = step_on(cell, Mesh(), device, network, eval_tokens, stream).bytes
    raise SaescaleError(
        f"cell {cell.cell_id} takes {alone / 2**30:,.0f} GiB, which no mesh of up to {most} {device.name} holds "
        f"({memory / 2**30:.0f} GiB each): give more (--gpus), a GPU with more memory (--gpu) or smaller batch_tokens"
    )


def _sent(cell: Cell, mesh: Mesh) -> Sent:
    pairs = cell.whole_settings.pairs_per_token(cell.n_latents)
    k = max(cell.k, min(round(pairs), cell.n_latents))
    return sent(mesh, cell.d_model, cell.n_latents, k, cell.batch_tokens, weights_bytes(cell))
