"""The sequences of a subject that makes its own, by their numbers: anyone can make any of them again.

They come in blocks of `BLOCK_SEQUENCES`, each drawn by itself, so that a harvest's actors draw different blocks, and a
row of a store, whose `doc` is the number of its sequence, leads back to the whole sequence.
"""

import struct
from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import xxhash

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Split
from saescale.trainers.subjects.subject import Generates, Sequence

BLOCK_SEQUENCES = 256


def draw_block(subject: Generates, split: Split, seed: int, block: int) -> list[Sequence]:
    """Sequences `block * BLOCK_SEQUENCES` to `(block + 1) * BLOCK_SEQUENCES` of a harvest with that seed.

    Raises SaescaleError where the subject gives fewer, none with a row, or one that is no `Sequence`.
    """
    seed_of_block = xxhash.xxh3_64_intdigest(struct.pack("<QQ", seed, block)) >> 1  # one bit less: a signed integer
    found = list(islice(subject.sequences(split, seed_of_block), BLOCK_SEQUENCES))
    what = f"the subject {getattr(subject, 'name', type(subject).__name__)}"
    if len(found) < BLOCK_SEQUENCES:
        raise SaescaleError(f"{what} ended after {len(found)} sequences of {split}; it has to make them without end")
    for number, (ids, keep) in enumerate(found):
        if ids.ndim != 1 or ids.shape != keep.shape or not len(ids) or ids.min() < 0:
            raise SaescaleError(
                f"{what}: sequence {number} of {split} has ids {list(ids.shape)}, keep {list(keep.shape)}; both must "
                "be [length], the ids 0 or more"
            )
    if not any(keep.any() for _, keep in found):
        raise SaescaleError(f"{what} keeps no position of {BLOCK_SEQUENCES} sequences of {split}")
    return found


def find_sequences(subject: Generates, split: Split, seed: int, numbers: Iterable[int]) -> Iterator[Sequence]:
    """The sequences of those numbers, ascending: the `doc` of rows of `split` in a store harvested with that seed."""
    for block, those in groupby(numbers, lambda number: number // BLOCK_SEQUENCES):
        drawn = draw_block(subject, split, seed, block)
        for number in those:
            yield drawn[number % BLOCK_SEQUENCES]
