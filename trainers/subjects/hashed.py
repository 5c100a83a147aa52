"""Random numbers by their place: each is a function of a key and a number, on any device and in any order.

A generator's state would tie a row to the rows before it. Here integers are hashed (the finaliser of SplitMix64, Steele
et al. 2014), which is exact everywhere, so that what was drawn once can be drawn again alone.
"""

import torch
from torch import Tensor

from saescale.storage.manifest import Split

HELDOUT_ONE_IN = 4
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def hashed(key: Tensor, number: Tensor) -> Tensor:
    """64 random bits for each pair of a key and a number, int64, of the shape that both broadcast to."""
    x = key + (number + 1) * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def positive(bits: Tensor) -> Tensor:
    """31 of the bits, int64."""
    return (bits >> 33) & 0x7FFFFFFF


def in_split(rows: Tensor, split: Split) -> Tensor:
    """Which rows [rows, columns] of integers belong to the split, bool [rows]: what is in a row decides, whatever seed
    or number it was drawn by. One in four is held out."""
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.long().unbind(dim=1):
        key = hashed(key, column)
    return (positive(key) % HELDOUT_ONE_IN == 0) == (split == "heldout")


def uniform(bits: Tensor) -> Tensor:
    """Float32 in (0, 1), in steps of 2^-23: neither end is ever reached."""
    return (_shifted(bits, 41).float() + 0.5) * 2.0**-23


def normal(bits: Tensor) -> Tensor:
    """Float32, standard normal."""
    return torch.special.ndtri((_shifted(bits, 12).double() + 0.5) * 2.0**-52).float()


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)
