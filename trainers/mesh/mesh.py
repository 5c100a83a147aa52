"""The door of meshes: the processes that share one cell, latent shards x replicas; one process alone by default.

Whatever needs another process of the cell asks its mesh: an architecture's sparse step for the selection and for sums
over shards, the optimiser for means over replicas.
"""

from typing import Protocol

from torch import Tensor

from saescale.trainers.kernels.interface import Selected


class Mesh(Protocol):
    """`shard` of `shards` holds its share of the latents, `replica` of `replicas` sees its share of each batch."""

    shard: int
    shards: int
    replica: int
    replicas: int

    def select(self, local: Selected, k: int) -> Selected:
        """Of all shards' candidates for each token (`local`, indices of this shard) those that are among the k largest
        of all latents and of this shard. Exact; ties go to the lower index of the whole."""

    def sum_shards(self, t: Tensor) -> Tensor:
        """The sum over the shards of a replica, the same on each, in the order of the shards."""

    def mean_replicas(self, t: Tensor) -> Tensor:
        """The mean over the replicas of a shard, the same on each, in the order of the replicas."""


class Alone:
    """One process: it has all latents and sees the whole batch."""

    shard, shards, replica, replicas = 0, 1, 0, 1

    def select(self, local: Selected, k: int) -> Selected:
        return local

    def sum_shards(self, t: Tensor) -> Tensor:
        return t

    def mean_replicas(self, t: Tensor) -> Tensor:
        return t


ALONE = Alone()
