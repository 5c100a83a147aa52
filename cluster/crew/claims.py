"""What the processes of a sweep ask of a cluster, and what packs ask of them."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout

# Strict: `true`, "512" and 8.0 are mistakes in a sweep file. Reals are lax, because YAML reads 8e-4 as text.
Positive = Annotated[int, Field(gt=0, strict=True)]
NotNegative = Annotated[int, Field(ge=0, strict=True)]

GPU_SHARE = 0.95  # of a GPU's memory that a worker can have; the rest is CUDA's own
CPU_SHARE = 0.8  # of a node's that all workers on it can have

Needs = Callable[[Sequence[Cell]], float]  # bytes of a worker's memory that cells take as one pack
NeedsOnMesh = Callable[[Cell, Layout], float]  # bytes of each worker's memory that a cell takes on a mesh


class Section(BaseModel):
    """A section of a sweep file: no other keys than its fields."""

    # What is wrong is told by `sweep.spec`, which knows what may be shown.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class MeshShape(Section):
    """The processes that share one cell: each shard holds a part of its latents, each replica works on a part of every
    batch. They are workers like the others, shards x replicas of them at a time."""

    shards: Positive = 1
    replicas: Positive = 1

    @property
    def layout(self) -> Layout:
        return Layout(self.shards, self.replicas)


class Resources(Section):
    """workers: processes that train packs. auto: one a GPU, or one a CPU core, but no more than cells, a shared cell
    counted as often as it is shared; where nodes join the cluster their number grows, and while there is work for more
    an autoscaler is asked for them. A number is asked for whatever the cluster has now. Where there are no GPUs yet,
    `gpus_per_worker: 1` asks for some.
    """

    workers: Positive | Literal["auto"] = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # auto: the cores shared out
    # auto: a cell that does not fit one worker's memory is shared by as few as it fits, of those that the cluster has
    # when the sweep begins. A shape: every cell is.
    mesh: MeshShape | Literal["auto"] = "auto"
    checkpoint_every_s: float = Field(default=60.0, gt=0)  # the most work, in seconds, that a killed worker loses
    # A worker that gets nothing done for so long, not one batch, is ended and its pack begun again elsewhere.
    stalled_after_s: float = Field(default=900.0, gt=0)
