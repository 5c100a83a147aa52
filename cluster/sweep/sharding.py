"""A step of a cell on a mesh, for a plan: memory of a process, what it is sent, and how long it takes."""

from typing import NamedTuple

from saescale.cluster.sweep.work import work_of_step
from saescale.scaling.planning.devices import Device, Work
from saescale.scaling.planning.network import Mesh, Network, Sent, sent
from saescale.trainers.cell import Cell
from saescale.trainers.training.memory import weights_bytes


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


def step_on(cell: Cell, mesh: Mesh, taken: float, device: Device, network: Network) -> Step:
    """`taken`: bytes that one process has in its memory."""
    whole = work_of_step(cell)
    pairs = cell.whole_settings.pairs_per_token(cell.n_latents)
    k = max(cell.k, min(round(pairs), cell.n_latents))
    told = sent(mesh, cell.d_model, cell.n_latents, k, cell.batch_tokens, weights_bytes(cell))
    # What each does: products and pairs of its rows and latents; its own weights and scores.
    traffic = 8 * weights_bytes(cell) / mesh.shards + 4.0 * cell.batch_tokens * cell.n_latents / mesh.processes
    work = Work(whole.products / mesh.processes, whole.pairs / mesh.processes, traffic, 1.0)
    return Step(mesh, taken, told, device.seconds(work), network.seconds(mesh, told))
