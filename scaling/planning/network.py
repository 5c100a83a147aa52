"""How long what processes that share a cell send each other takes, at stated rates of the network."""

from typing import NamedTuple

_LATENCY_S = 20e-6  # of a collective, whatever its size; assumed


class Network(NamedTuple):
    """Bytes a second that a device takes in: from others of its node (`link`), of which there are `per_node`, and from
    other nodes."""

    per_node: int
    link: float
    between: float

    def seconds(self, shards: int, replicas: int, of_shards: float, of_replicas: float, collectives: int) -> float:
        """Of so many bytes from the other shards and from the other replicas, in so many collectives. The shards of a
        replica are next to each other, so that they share a node as far as it reaches; a collective goes at the rate of
        its slowest part."""
        shards_rate = self.link if shards <= self.per_node else self.between
        replicas_rate = self.link if shards * replicas <= self.per_node else self.between
        return of_shards / shards_rate + of_replicas / replicas_rate + _LATENCY_S * collectives
