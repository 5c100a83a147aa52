"""The door of meshes: the processes that share one cell, latent shards x replicas; one process alone by default.

Whatever needs another process of the cell asks its mesh: an architecture's sparse step for the selection, for sums over
shards and for the rows of other replicas; the training of a cell for what is told of the whole.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh.keys import kth_largest


class Mesh(Protocol):
    """`shard` of `shards` holds its share of the latents, `replica` of `replicas` works on its rows of each batch."""

    shard: int
    shards: int
    replica: int
    replicas: int

    @property
    def alone(self) -> bool:
        """Whether it is one process, which has nobody to ask."""

    @property
    def first(self) -> int:
        """Of this shard's latents the first one's index in the whole cell."""

    def whole(self, latents: int) -> int:
        """How many latents the cell has of which this shard has so many."""

    def here(self, latents: int) -> int:
        """How many this shard has of a cell of so many."""

    def rows(self, rows: int) -> slice:
        """Which of a batch's rows this replica works on."""

    def select(self, local: Selected, k: int) -> Selected:
        """Of all shards' candidates for each token (`local`, indices of this shard) those that are among the k largest
        of all latents and of this shard. Exact; ties go to the lower index of the whole."""

    def kth_of_rows(self, keys: Tensor, k: int) -> Tensor:
        """[batch]: of keys [batch, width] of all shards one that the k largest of each row reach, and no other does."""

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        """Of what all processes give, int64 [n] of any n, a key that the k largest reach and no other does but for
        equal ones; the lowest int64 where there are no more than k. The same on each."""

    def gather_all(self, t: Tensor) -> Tensor:
        """[processes, *t.shape]: of every process of the cell, in their order."""

    def sum_shards(self, t: Tensor) -> Tensor:
        """The sum over the shards of a replica, the same on each, in the order of the shards."""

    def sum_replicas(self, t: Tensor) -> Tensor:
        """The sum over the replicas of a shard, the same on each, in the order of the replicas."""

    def gather_replicas(self, t: Tensor) -> Tensor:
        """The rows of all replicas of a shard, one after another in their order: all of a batch where `t` is those of
        `rows`."""


class Alone:
    """One process: it has all latents and works on the whole batch."""

    shard, shards, replica, replicas = 0, 1, 0, 1
    alone, first = True, 0

    def whole(self, latents: int) -> int:
        return latents

    def here(self, latents: int) -> int:
        return latents

    def rows(self, rows: int) -> slice:
        return slice(0, rows)

    def select(self, local: Selected, k: int) -> Selected:
        return local

    def kth_of_rows(self, keys: Tensor, k: int) -> Tensor:
        return kth_largest(keys, k)

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        if len(keys) <= k:
            return torch.tensor(torch.iinfo(torch.int64).min, device=keys.device)
        return keys.topk(k, sorted=False).values.amin()

    def gather_all(self, t: Tensor) -> Tensor:
        return t[None]

    def sum_shards(self, t: Tensor) -> Tensor:
        return t

    def sum_replicas(self, t: Tensor) -> Tensor:
        return t

    def gather_replicas(self, t: Tensor) -> Tensor:
        return t


ALONE = Alone()


class Group(Protocol):
    """The processes of a mesh, whatever cell they share: what training asks of it beside what a cell's step does."""

    rank: int

    def mesh(self, n_latents: int) -> Mesh:
        """That of one cell."""

    def tell(self, said: Any) -> list[Any]:
        """What every process says, in the order of the ranks; small things, as Python has them."""

    def tell_first(self, said: Any) -> Any:
        """What rank 0 says."""

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """As `tell_first`, of what is asked at every step."""

    def all(self, flag: bool) -> bool:
        """Whether every process says so."""


class One:
    """The group of one process."""

    rank = 0

    def mesh(self, n_latents: int) -> Mesh:
        return ALONE

    def tell(self, said: Any) -> list[Any]:
        return [said]

    def tell_first(self, said: Any) -> Any:
        return said

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def all(self, flag: bool) -> bool:
        return flag


ONE = One()
