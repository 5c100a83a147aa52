"""What a process of a mesh sends at a step, and holds of what others send, for plans: the collectives of a sparse step,
written down once more as numbers. Without torch. tests/trainers/test_mesh.py holds what is sent to what is counted
where it is sent (channel.py)."""

from collections.abc import Sequence
from typing import NamedTuple

from saescale.trainers.mesh.layout import Layout

KEYS = 1024  # of all shards for a token, up to which gathering them sends less than the counts of radix.py take
BITS = 4  # of a key of each token, that a round of radix.py finds
BITS_OF_ALL = 8  # where there is one key for all tokens
SMALL = 512  # numbers, up to which all go to all to be summed (sums.py): one message instead of two
_KEY, _NUMBER = 8, 4
_COUNTS = 40  # of keys' size, that the counts of a token take where they are held


class Sent(NamedTuple):
    """Bytes that one process sends in a step, and receives, and how many collectives it takes part in."""

    selection: float = 0.0  # candidates for the other shards, or counts of their digits
    reductions: float = 0.0  # what is summed over shards: [rows, d_model] of each reconstruction
    replicas: float = 0.0  # errors and pairs of a replica's rows, for the other replicas
    collectives: int = 0

    @property
    def bytes(self) -> float:
        return self.selection + self.reductions + self.replicas


class Held(NamedTuple):
    """Bytes that one process has of what others send, or for them, at one time of a step or the other."""

    selecting: float  # candidates of all shards, or the counts of their digits
    summing: float  # beside its part of a reconstruction, while that of all shards is made
    gathering: float  # its own rows of each reconstruction, and those of all replicas


class Said(NamedTuple):
    """What a step asks its mesh for, AuxK apart, which while latents are dead is one selection and sum more."""

    ks: Sequence[int]  # latents of a token, of each selection for itself
    sums: int  # over shards, of [rows, d_model]
    pairs: int  # latents of a token that it decodes, of all shards
    of_batch: int = 0  # selections over all tokens at once
    errors: int | None = None  # [rows, d_model] that replicas tell each other of a sparse step; None: one of each sum
    numbers: int = 3  # that they tell of a pair: index, z and a gradient for each reconstruction that it is in
    dense: float = 0.0  # share of the steps that are dense, of which replicas sum the gradients of both matrices


def sent(layout: Layout, d_model: int, n_latents: int, said: Said, batch_tokens: int) -> Sent:
    """Of one step."""
    shards, replicas = layout.shards, layout.replicas
    rows = batch_tokens / replicas
    selection = reductions = copies = 0.0
    collectives = 0
    here = layout.share(n_latents, 0).size
    if shards > 1:
        rounds = 64 // BITS  # at most: mostly fewer decide
        for width, gathered in (_offered(layout, n_latents, k) for k in said.ks):
            keys, counts = (shards - 1) * rows * width * _KEY, rounds * _summed(rows * 2**BITS, shards)
            selection += keys if gathered else counts
            collectives += 1 if gathered else 2 * rounds
        reductions += said.sums * _summed(rows * d_model, shards)
        collectives += 2 * said.sums
    if layout.ranks > 1 and said.of_batch:
        rounds = 32 // BITS_OF_ALL  # of the scores' bits; ties take some more
        selection += said.of_batch * rounds * _summed(2**BITS_OF_ALL, layout.ranks)
        collectives += said.of_batch * (rounds + 3)  # whether more candidates are needed, how wide, how many
    if replicas > 1:
        errors = said.sums if said.errors is None else said.errors
        pairs = min(said.pairs, here * errors)
        by_pairs = (replicas - 1) * rows * (errors * d_model + said.numbers * pairs) * _NUMBER
        copies += (1 - said.dense) * by_pairs + said.dense * _summed(2 * here * d_model, replicas)
        collectives += 5 * said.sums
    if shards > 1:
        reductions += _summed(d_model, shards)  # the gradient of b_pre
        collectives += 2
    return Sent(selection, reductions, copies, collectives)


def held(layout: Layout, d_model: int, n_latents: int, k: int, batch_tokens: int, together: int = 1) -> Held:
    """In a step that selects `k` latents of a token and makes `together` reconstructions at a time; nothing where one
    process is alone."""
    shards, replicas = layout
    width, gathered = _offered(layout, n_latents, k)
    others = shards * width if gathered else k + _COUNTS
    keys = _KEY * (k + others) if shards > 1 else 0
    rows = batch_tokens / replicas
    row = _NUMBER * d_model * rows
    # What comes from others comes twice at a time: gloo gathers into memory of its own, and copies it (channel.py).
    summing = 2 + 1 / shards if shards > 1 else 0  # the sum of its share of the numbers, and the sums of all
    gathering = together + 2 * replicas if replicas > 1 else min(1, summing)
    return Held(2 * keys * rows, summing * row, gathering * row)


def _offered(layout: Layout, n_latents: int, k: int) -> tuple[int, bool]:
    """The candidates for a token from each shard, and whether all of them go to every shard."""
    width = min(k, layout.share(n_latents, 0).size)
    return width, layout.shards * width <= KEYS


def _summed(numbers: float, shards: int) -> float:
    """Of a tensor of which each shard gets the sum (sums.py)."""
    return (shards - 1) * numbers * _NUMBER * (1 if numbers <= SMALL else 2 / shards)
