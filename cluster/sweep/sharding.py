"""A step of a cell on a mesh, for a plan: memory of a process, what it is sent, and how long it takes."""

from typing import Any, NamedTuple

from saescale.cluster.sweep.work import work_of_step
from saescale.scaling.planning.devices import Device, Work
from saescale.scaling.planning.network import Network
from saescale.trainers.architectures.sae import step_of
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Sent, sent
from saescale.trainers.training.memory import weights_bytes


class Step(NamedTuple):
    """Of a cell on a mesh: bytes of memory of one process, what each is sent, and seconds, of which some go to the
    network."""

    mesh: Layout
    bytes: float
    sent: Sent
    compute_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.network_s


def step_on(cell: Cell, mesh: Layout, taken: float, device: Device, network: Network) -> Step:
    """`taken`: bytes that one process has in its memory."""
    whole = work_of_step(cell)
    told = Sent()
    if mesh.ranks > 1:
        step: Any = step_of(cell.architecture, cell.n_latents)  # every one that can be shared says it
        said = step.said(cell.whole_settings, cell.n_latents)
        told = sent(mesh, cell.d_model, cell.n_latents, said, cell.batch_tokens)
    # What each does: products and pairs of its rows and latents; its own weights and scores. Half of a pair's work are
    # the gradient's rows, which each replica sums over all of the batch.
    traffic = 8 * weights_bytes(cell) / mesh.shards + 4.0 * cell.batch_tokens * cell.n_latents / mesh.ranks
    pairs = whole.pairs / 2 * (1 / mesh.ranks + 1 / mesh.shards)
    work = Work(whole.products / mesh.ranks, pairs, traffic, 1.0)
    waited = network.seconds(*mesh, told.selection + told.reductions, told.replicas, told.collectives)
    return Step(mesh, taken, told, device.seconds(work), waited)
