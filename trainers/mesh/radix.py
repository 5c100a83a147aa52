"""Exact top-k over shards by counting, where gathering all candidates would say too much.

The k-th largest key of a token is found four bits at a time from the top: each shard counts how many of its candidates
that still agree with what is known have each of the 16 digits, the counts are added up, and the digit in which the k-th
one lies is known to all. A message of 16 counts a token and round, whatever k and the number of shards are. It ends as
soon as for every token all candidates that agree are among the k largest, which is mostly before the last digit.
What is selected over all tokens at once has one row of keys, and eight bits a round: a KiB, whatever the batch is.
"""

import torch
from torch import Tensor

from saescale.trainers.mesh.channel import Channel
from saescale.trainers.mesh.keys import NONE
from saescale.trainers.mesh.sums import sum_in_order
from saescale.trainers.mesh.traffic import BITS


def kth_of_all(channel: Channel, keys: Tensor, k: int, bits: int = BITS) -> Tensor:
    """[batch]: a key that the k largest of all processes reach and no other does, unless they are equal; keys
    [batch, width] of any width, `bits` of them found in a round.

    NONE where there are no more than k.
    """
    batch, number = len(keys), 2**bits
    # As if they were unsigned: the sign is the highest bit, and turned.
    agreed = keys.new_zeros(batch)  # of each token the digits that are known
    open_ = keys > NONE
    wanted = torch.full((batch,), k, device=keys.device)
    whole = torch.zeros(batch, dtype=torch.bool, device=keys.device)  # all that agree are wanted
    for shift in range(64 - bits, -1, -bits):
        digits = ((keys ^ NONE) >> shift) & (number - 1)
        counts = keys.new_zeros(batch, number, dtype=torch.int32)
        counts.scatter_add_(1, digits, open_.int())
        counts = sum_in_order(channel, counts, "select").long()
        above = counts.flip(1).cumsum(dim=1).flip(1)  # how many have that digit or a higher one
        # The highest digit that the k largest do not go below; 0 where there are fewer than wanted.
        digit = ((above >= wanted[:, None]).sum(dim=1) - 1).clamp_(min=0)
        digit = torch.where(whole, 0, digit)  # which is none to be added
        here = above.gather(1, digit[:, None])[:, 0]
        higher = here - counts.gather(1, digit[:, None])[:, 0]
        agreed |= digit << shift
        open_ &= (digits == digit[:, None]) & ~whole[:, None]
        wanted = torch.where(whole, wanted, wanted - higher)
        whole |= here <= wanted + higher
        if bool(whole.all()):
            break
    return agreed ^ NONE
