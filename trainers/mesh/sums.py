"""Sums over the processes of a group, in the order of their ranks: the same bits on each of them, at every call.

A large tensor is cut into as many parts as there are processes; each adds up one part of all of them, and the sums go
round. So each sends twice (p - 1) / p of the tensor, as little as a ring does.
"""

import torch
from torch import Tensor

from saescale.trainers.mesh.channel import Channel
from saescale.trainers.mesh.traffic import SMALL


def sum_in_order(channel: Channel, t: Tensor, kind: str) -> Tensor:
    """The sum of `t` of all processes of the group."""
    if channel.size == 1:
        return t
    if t.numel() <= SMALL:
        return _add(channel.gather(t, kind))
    mine = _add(channel.exchange(_parts(t, channel.size), kind))
    return channel.gather(mine, kind).view(-1)[: t.numel()].view(t.shape)


def _parts(t: Tensor, count: int) -> Tensor:
    """[count, -1] of `t`, with zeros at the end where it cannot be cut evenly; else not a copy of it."""
    flat = t.reshape(-1)
    if missing := -t.numel() % count:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return flat.view(count, -1)


def _add(parts: Tensor) -> Tensor:
    """[parts, ...] -> [...], one after another."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def reference(parts: list[Tensor]) -> Tensor:
    """The same in one process, of what each would have."""
    return _add(torch.stack(parts))
