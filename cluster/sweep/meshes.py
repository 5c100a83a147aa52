"""Which cells are shared by several workers, and by how many: what `resources.mesh` comes to."""

from collections.abc import Callable, Sequence
from typing import Protocol

from saescale.cluster.crew.claims import MeshShape, Needs, NeedsOnMesh, Resources
from saescale.cluster.sweep.packing import cost
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout


class Shareable(Protocol):
    """What decides whether a cell can be shared."""

    @property
    def architecture(self) -> str: ...
    @property
    def n_latents(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...


def check_meshes(cells: Callable[[], Sequence[Shareable]], asked: Resources) -> None:
    """Raises SaescaleError, before anything is started, where a cell can never be shared in the shape that is named."""
    if not isinstance(asked.mesh, MeshShape) or asked.mesh.layout.ranks == 1:
        return
    # Takes torch, which no other sweep needs here.
    from saescale.trainers.architectures.architecture import require_shareable

    layout = asked.mesh.layout
    for cell in cells():
        require_shareable(cell.architecture)
        Layout.checked(*layout, cell.n_latents, cell.batch_tokens)
    if isinstance(asked.workers, int) and asked.workers < layout.ranks:
        raise SaescaleError(
            f"resources.mesh asks for {layout}, which are {layout.ranks} workers at a time, and resources.workers is "
            f"{asked.workers}; raise that, or ask for a smaller mesh"
        )


def plan_meshes(
    cells: Sequence[Cell], asked: Resources, workers: int, memory: float, needs: Needs, on_mesh: NeedsOnMesh
) -> dict[str, Layout]:
    """The layout of each cell that is shared, by its name; all others are for one worker.

    auto: a cell that fits one worker (`memory` bytes) stays there, whose numbers are then those of one process. One
    that does not gets as many shards as it takes to fit, of the `workers` that there are, and twice as many as long as
    one of its processes has more to compute than an even share of all cells. Raises SaescaleError where it fits no
    mesh of all workers.
    """
    if isinstance(asked.mesh, MeshShape):
        layout = asked.mesh.layout
        return {cell.cell_id: layout for cell in cells} if layout.ranks > 1 else {}
    fair = sum(cost(cell) for cell in cells) / workers
    found = {}
    for cell in cells:
        if needs([cell]) <= memory or not _shareable(cell):
            continue  # what neither fits nor can be shared is packing's to refuse
        most = min(workers, cell.n_latents)
        shards = next((s for s in range(2, most + 1) if on_mesh(cell, Layout(s)) <= memory), None)
        if shards is None:
            least = on_mesh(cell, Layout(most)) if most > 1 else needs([cell])
            raise SaescaleError(
                f"cell {cell.cell_id} needs {needs([cell]) / 2**30:.1f} GiB, or {least / 2**30:.1f} GiB on each of "
                f"{most} workers that share it, and of {workers} workers each has {memory / 2**30:.1f} GiB; use more "
                "or larger workers, or a smaller batch_tokens"
            )
        while 2 * shards <= most and cost(cell) / shards > fair:
            shards *= 2
        found[cell.cell_id] = Layout(shards)
    return found


def _shareable(cell: Cell) -> bool:
    from saescale.trainers.architectures.architecture import find_architecture

    return hasattr(find_architecture(cell.architecture), "share")
