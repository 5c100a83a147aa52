"""Exact top-k over shards by gathering: every shard's candidates go to every other.

One message of batch x width keys from each. Of what any number of shards offer the k largest of each shard are enough,
so width is at most k.
"""

from torch import Tensor

from saescale.trainers.mesh.channel import Channel
from saescale.trainers.mesh.keys import kth_largest


def kth_of_all(channel: Channel, keys: Tensor, k: int) -> Tensor:
    """[batch]: the k-th largest key of all shards; each gives keys [batch, width], of one width."""
    everyone = channel.gather(keys, "select")
    return kth_largest(everyone.permute(1, 0, 2).reshape(len(keys), -1), k)
