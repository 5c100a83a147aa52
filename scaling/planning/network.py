"""What the processes of a mesh send each other at every step, and how long that takes at stated rates of the network.

The layout is trainers/mesh's: a process has its share of the latents (shard) and its rows of the batch (replica). The
shards of one replica stand next to each other, so that they share a node as far as it reaches.
"""

from typing import NamedTuple

KEYS = 1024  # of all shards for a token, up to which candidates are gathered; beyond, they are counted by digits
_KEY, _FLOAT = 8, 4
_DIGITS, _ROUNDS = 16, 16  # of a key of 64 bits, four bits at a time, all of them: the most that it takes
_LATENCY_S = 20e-6  # of a collective, whatever its size; assumed


class Mesh(NamedTuple):
    shards: int = 1
    replicas: int = 1

    @property
    def processes(self) -> int:
        return self.shards * self.replicas

    def __str__(self) -> str:
        return f"{self.shards} x {self.replicas}"


class Sent(NamedTuple):
    """Bytes that one process receives in a step, and how many collectives it takes part in."""

    selection: float = 0.0  # candidates of the other shards, or counts of their digits
    reductions: float = 0.0  # [rows, d_model] of the reconstruction forward, of its gradient backward
    replicas: float = 0.0  # gradients of this share of the weights
    collectives: int = 0

    @property
    def bytes(self) -> float:
        return self.selection + self.reductions + self.replicas


def sent(mesh: Mesh, d_model: int, n_latents: int, k: int, batch_tokens: int, weights: float) -> Sent:
    """By the collectives of trainers/mesh: a sum over p processes brings each (p - 1) / p of the tensor twice.

    k: latents of a token that are selected in all; weights: bytes of the parameters of the whole cell.
    """
    rows = batch_tokens / mesh.replicas
    share = (mesh.shards - 1) / mesh.shards
    selection = reductions = replicas = 0.0
    collectives = 0
    if mesh.shards > 1:
        width = min(k, -(-n_latents // mesh.shards))
        gathered = mesh.shards * width <= KEYS
        counts = _ROUNDS * 2 * share * rows * _DIGITS * _FLOAT
        selection = (mesh.shards - 1) * rows * width * _KEY if gathered else counts
        reductions = 2 * (2 * share * rows * d_model * _FLOAT)
        collectives += (1 if gathered else 2 * _ROUNDS) + 4
    if mesh.replicas > 1:
        replicas = 2 * (mesh.replicas - 1) / mesh.replicas * weights / mesh.shards
        collectives += 2
    return Sent(selection, reductions, replicas, collectives)


class Network(NamedTuple):
    """Bytes a second that a device takes in: from others of its node (`link`), of which there are `per_node`, and from
    other nodes."""

    per_node: int
    link: float
    between: float

    def seconds(self, mesh: Mesh, what: Sent) -> float:
        """Of a step. A collective goes at the rate of its slowest part."""
        of_shards = self.link if mesh.shards <= self.per_node else self.between
        of_replicas = self.link if mesh.processes <= self.per_node else self.between
        waits = _LATENCY_S * what.collectives
        return (what.selection + what.reductions) / of_shards + what.replicas / of_replicas + waits
