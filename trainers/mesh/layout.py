"""Which process of a mesh has what: ranks, shares of the latents, rows of a batch. Without torch, for who plans one."""

from typing import NamedTuple, Self

from saescale.storage.errors import SaescaleError


class MeshBroken(SaescaleError):
    """The processes of a mesh lost each other: one ended, or kept the others waiting for too long. They go on from
    the last checkpoint when they are started again."""


class Share(NamedTuple):
    """Latents `first` to `first + size` of a cell."""

    first: int
    size: int


class Layout(NamedTuple):
    """`shards` x `replicas` processes. The shards of one replica have ranks next to each other, so that what they say
    to each other at every step stays on a node as far as it can."""

    shards: int = 1
    replicas: int = 1

    @classmethod
    def checked(cls, shards: int, replicas: int, n_latents: int, batch_tokens: int) -> Self:
        """Raises SaescaleError where a cell of that size cannot be shared so."""
        if shards < 1 or replicas < 1:
            raise SaescaleError(f"a mesh of {shards} shards x {replicas} replicas is none: give 1 or more of each")
        if shards > n_latents:
            raise SaescaleError(
                f"{shards} shards exceed n_latents = {n_latents}: each needs a latent of its own, so give at most "
                f"{n_latents} shards"
            )
        if batch_tokens % replicas:
            raise SaescaleError(
                f"a batch of {batch_tokens} tokens cannot be cut into {replicas} equal slices; make batch_tokens a "
                "multiple of the replicas"
            )
        return cls(shards, replicas)

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas

    def place(self, rank: int) -> tuple[int, int]:
        """(shard, replica) of a rank."""
        return rank % self.shards, rank // self.shards

    def rank(self, shard: int, replica: int) -> int:
        return replica * self.shards + shard

    def share(self, n_latents: int, shard: int) -> Share:
        """The first n_latents % shards of them have one latent more than the others."""
        size, more = divmod(n_latents, self.shards)
        return Share(shard * size + min(shard, more), size + (shard < more))

    def rows(self, rows: int, replica: int) -> slice:
        """A replica's rows of so many: equal slices where that is possible, else as equal as they can be."""
        return slice(replica * rows // self.replicas, (replica + 1) * rows // self.replicas)

    def __str__(self) -> str:
        return f"{self.shards} shards x {self.replicas} replicas"
