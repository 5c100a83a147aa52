"""Which tokens of which documents make the contexts of which shard: decided by numbers of tokens alone.

Documents are tokenized in blocks, anywhere and in any order; the ids of a block lie in a file of their own below a
folder, the spool. Whoever decides holds less than 100 bytes for each document and no token; whoever makes a shard
reads the blocks that it needs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import xxhash
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.text import documents

if TYPE_CHECKING:
    from saescale.trainers.subjects.language_model import Subject

SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
BLOCK_CHARACTERS = 2**18  # about 64,000 tokens


class Texts(NamedTuple):
    """Block number `block` of a corpus: its documents, of which the first has the number `first`."""

    block: int
    first: int
    texts: list[str]


class Counted(NamedTuple):
    """A block whose ids lie in the spool: the number of its first document, and the tokens of each, [documents]."""

    block: int
    first: int
    tokens: np.ndarray


def text_blocks(corpus: str, seed: int) -> Iterator[Texts]:
    """The documents of the corpus in their order, cut into blocks; raises what `documents` raises."""
    block = first = characters = 0
    texts: list[str] = []
    for text in documents(corpus, seed):
        texts.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield Texts(block, first, texts)
            block, first, texts, characters = block + 1, first + len(texts), [], 0
    if texts:
        yield Texts(block, first, texts)


def spool_block(spool: str, texts: Texts, subject: Subject) -> Counted:
    """Tokenizes a block into its file in the folder `spool`, which is written whole or not at all."""
    ids = subject.tokenize([text.rstrip() + "\n\n" for text in texts.texts])
    files.write_atomic(_block_file(spool, texts.block), np.concatenate(ids).tobytes())
    return Counted(texts.block, texts.first, np.array([len(each) for each in ids]))


class Stretches(NamedTuple):
    """Stretches of documents, one after the other: tokens `start` to `start + tokens` of the file of `block` are of
    document `doc`. All are int64 [stretches]."""

    block: np.ndarray
    doc: np.ndarray
    start: np.ndarray
    tokens: np.ndarray

    def read(self, spool: str, context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and the document of each, both int32 [contexts, context_length].

        Raises SaescaleError when a block is not in the spool.
        """
        shape = (-1, context_length)
        return np.concatenate(list(self.ids(spool))).reshape(shape), np.concatenate(list(self.docs())).reshape(shape)

    def ids(self, spool: str) -> Iterator[np.ndarray]:
        """The token ids, int32, block after block."""
        for part in self._blocks():
            where = _block_file(spool, int(part.block[0]))
            try:
                ids = np.frombuffer(files.read_bytes(where), np.int32)
            except FileNotFoundError as error:
                raise SaescaleError(
                    f"{where}: the tokens that were put there are gone; run the same command again"
                ) from error
            yield np.concatenate([ids[start : start + n] for start, n in zip(part.start, part.tokens, strict=True)])

    def docs(self) -> Iterator[np.ndarray]:
        """The document of each token, int32, block after block."""
        for part in self._blocks():
            yield np.repeat(part.doc.astype(np.int32), part.tokens)

    def _blocks(self) -> Iterator[Stretches]:
        edges = [0, *(np.flatnonzero(np.diff(self.block)) + 1), len(self.block)]
        for first, last in pairwise(edges):
            yield Stretches(*(column[first:last] for column in self))


class ShardTokens(NamedTuple):
    """What a shard is made from: its split, which one of that split it is, and the tokens of its contexts."""

    split: Literal["train", "heldout"]
    ordinal: int
    stretches: Stretches

    @property
    def name(self) -> str:
        return f"{self.split}-{self.ordinal:05d}.parquet"


class Assignment:
    """Gives the tokens of a corpus to the two splits, block after block, until both are full.

    A document gives its tokens to one split only. A seeded hash of its number sends it to heldout with that split's
    share of the tokens; when its split is full it goes to the other one, so a corpus suffices whenever it has the
    tokens at all.
    """

    def __init__(self, spec: HarvestSpec) -> None:
        self._spec = spec
        self._wanted = {"train": spec.tokens, "heldout": spec.heldout_tokens}
        self._have = dict.fromkeys(self._wanted, 0)
        self._seen = 0
        self._taken: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}  # columns of Stretches

    @property
    def full(self) -> bool:
        """Whether both splits have all their tokens."""
        return self._have == self._wanted

    def add(self, counted: Counted) -> None:
        """The next block; blocks come in their order."""
        wanted, have = self._wanted, self._have
        heldout_share = wanted["heldout"] / sum(wanted.values())
        taken: dict[str, list[tuple[int, int, int, int]]] = {split: [] for split in SPLITS}
        start = 0
        for number, tokens in enumerate(counted.tokens.tolist(), start=counted.first):
            draw = xxhash.xxh3_64_intdigest(struct.pack("<QQ", self._spec.seed, number)) / 2**64
            first, second = ("heldout", "train") if draw < heldout_share else ("train", "heldout")
            split = first if have[first] < wanted[first] else second
            took = min(tokens, wanted[split] - have[split])
            if took:
                taken[split].append((counted.block, number, start, took))
            have[split] += took
            start += tokens
        self._seen += start
        for split, rows in taken.items():
            self._taken[split].append(np.array(rows, np.int64).reshape(-1, 4).T)

    def check_full(self) -> None:
        """Raises SaescaleError unless both splits have all their tokens."""
        if not self.full:
            have = self._have
            raise SaescaleError(
                f"the corpus {self._spec.corpus} is too short: it gave {self._seen:,} tokens (train "
                f"{have['train']:,}, heldout {have['heldout']:,}) where tokens + heldout_tokens = "
                f"{sum(self._wanted.values()):,} are wanted; ask for fewer, or give more text"
            )

    def shards(self) -> Iterator[ShardTokens]:
        """All shards in the order of the manifest."""
        for split in SPLITS:
            whole = self._whole(split)
            ends = np.cumsum(whole.tokens)
            for ordinal, first in enumerate(range(0, self._wanted[split], self._spec.shard_rows)):
                last = min(first + self._spec.shard_rows, self._wanted[split])
                yield ShardTokens(split, ordinal, _cut(whole, ends, first, last))

    def digest(self, spool: str) -> str:
        """xxh3-128 (hex) of all token ids and documents, by which other text under the same name shows.

        Reads the spool once for each split, a block at a time.
        """
        digest = xxhash.xxh3_128()
        for split in SPLITS:
            whole = self._whole(split)
            for column in (whole.ids(spool), whole.docs()):
                for part in column:
                    digest.update(part.data)
        return digest.hexdigest()

    def _whole(self, split: str) -> Stretches:
        return Stretches(*np.concatenate(self._taken[split], axis=1))


def _cut(whole: Stretches, ends: np.ndarray, first: int, last: int) -> Stretches:
    """Tokens `first` to `last` of stretches that end after `ends` tokens."""
    low, high = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1
    block, doc, start, tokens = (column[low:high].copy() for column in whole)
    skipped = first - int(ends[low] - tokens[0])
    start[0] += skipped
    tokens[0] -= skipped
    tokens[-1] -= int(ends[high - 1]) - last
    return Stretches(block, doc, start, tokens)


def _block_file(spool: str, block: int) -> str:
    return files.join(spool, f"{block:06d}.ids")
