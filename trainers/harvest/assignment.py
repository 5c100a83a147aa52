"""Which tokens of which documents make which shard: decided by keys of texts and numbers of tokens, no token read."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Split
from saescale.trainers.harvest.contexts import (
    SPLITS,
    Context,
    Counted,
    read_block,
    sequence_context,
    text_contexts,
)
from saescale.trainers.harvest.spec import HarvestSpec

_LONG_TOKENS = 500  # about 2,000 characters: of documents that are no longer, cutting makes no more


class Stretches(NamedTuple):
    """Stretches of documents, one after the other: ids `start` to `start + tokens` of the file of `block` are of
    document `doc`, and of the rows among them those from `skip` to `skip + rows` are meant. All int64 [stretches]."""

    block: np.ndarray
    doc: np.ndarray
    start: np.ndarray
    tokens: np.ndarray
    skip: np.ndarray
    rows: np.ndarray

    def texts(self, spool: str, length: int, prefix: Sequence[int]) -> list[Context]:
        """The stretches as one text, cut into contexts of `length` ids behind `prefix`."""
        return text_contexts(np.concatenate(list(self.ids(spool))), np.concatenate(list(self.docs())), length, prefix)

    def sequences(self, spool: str) -> list[Context]:
        """Each stretch as a context of its own."""
        ids = np.concatenate(list(self.ids(spool)))
        ends = np.cumsum(self.tokens)[:-1]
        each = zip(np.split(ids, ends), self.doc.tolist(), self.skip.tolist(), self.rows.tolist(), strict=True)
        return [sequence_context(*one) for one in each]

    def ids(self, spool: str) -> Iterator[np.ndarray]:
        """The ids as they lie in the spool, int32, block after block. Raises SaescaleError where one is not there."""
        for part in self._blocks():
            ids = read_block(spool, int(part.block[0]))
            yield np.concatenate([ids[start : start + n] for start, n in zip(part.start, part.tokens, strict=True)])

    def docs(self) -> Iterator[np.ndarray]:
        """The document of each id, int32, block after block."""
        for part in self._blocks():
            yield np.repeat(part.doc.astype(np.int32), part.tokens)

    def _blocks(self) -> Iterator[Stretches]:
        edges = [0, *(np.flatnonzero(np.diff(self.block)) + 1), len(self.block)]
        for first, last in pairwise(edges):
            yield Stretches(*(column[first:last] for column in self))


class ShardTokens(NamedTuple):
    """What a shard is made from: its split, which one of that split it is, and the tokens of its contexts."""

    split: Split
    ordinal: int
    stretches: Stretches

    @property
    def name(self) -> str:
        return f"{self.split}-{self.ordinal:05d}.parquet"


class Reached(NamedTuple):
    """How far an assignment whose held-out rows are all there is between two blocks: train rows so far, the last
    document, and whether that is held out."""

    rows: int
    doc: int
    held: bool


class Assignment:
    """Gives the rows of blocks to the two splits, block after block, until both are full.

    A document gives its rows to one split only, and so do all texts with one content. A text (`divisible`: any of its
    tokens can begin or end a context) that comes for the first time goes to heldout with that split's share of the
    tokens, by a seeded hash of its content, or to the other split when the one is full: so a corpus suffices whenever
    it has enough different texts. A piece goes where its document began, and a text where its like went; where those
    differ, or that split is full, it is not used. A sequence says where it belongs.

    Where the held-out rows are drawn from the first tokens alone (`heldout_from`), what is not held out when they are
    all there is trained on: other texts are forgotten then, so that memory does not grow with the corpus and little
    says how far it is (`reached`).
    """

    def __init__(self, spec: HarvestSpec, divisible: bool) -> None:
        self._spec, self._divisible = spec, divisible
        self._wanted: dict[Split, int] = {"train": spec.tokens, "heldout": spec.heldout_tokens}
        self._have: dict[Split, int] = dict.fromkeys(self._wanted, 0)
        self._seen = 0
        self._document = -1, SPLITS[0]  # the last one, and its split
        self._equal = 0  # documents that begin like an earlier one
        self._splits: dict[int, Split] = {}  # of every text so far, by the key of its content
        self._taken: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}  # columns of Stretches
        self._given: dict[Split, int] = dict.fromkeys(self._wanted, 0)  # rows of `next_shards`
        self._before: dict[Split, int] = dict.fromkeys(self._wanted, 0)  # rows that are forgotten
        self.longest = 0  # ids of a document

    @classmethod
    def resumed(cls, spec: HarvestSpec, divisible: bool, reached: Reached, held: Iterable[int]) -> Assignment:
        """One that goes on where an earlier one `reached`; `held`: its `held_keys`."""
        found = cls(spec, divisible)
        found._have["train"] = reached.rows
        found._have["heldout"] = spec.heldout_tokens if divisible else 0
        found._before["train"] = reached.rows
        found._given["train"] = min(-(-reached.rows // spec.shard_rows) * spec.shard_rows, spec.tokens)
        found._given["heldout"] = found._have["heldout"]
        found._document = reached.doc, SPLITS[reached.held]
        found._splits = dict.fromkeys(held, "heldout")
        return found

    def reached(self) -> Reached | None:
        """How far it is; None while held-out rows are missing, since then it cannot be said in a few words."""
        if self._divisible and not self._settled:
            return None
        return Reached(self._have["train"], self._document[0], self._document[1] == "heldout")

    def held_keys(self) -> list[int]:
        """The contents that are held out; they stay the same from when all held-out rows are there."""
        return [key for key, split in self._splits.items() if split == "heldout"]

    @property
    def _settled(self) -> bool:
        return self._spec.heldout_from is not None and self.full(["heldout"])

    def full(self, splits: Iterable[Split] = SPLITS) -> bool:
        """Whether those splits have all their rows."""
        return all(self._have[split] == self._wanted[split] for split in splits)

    def add(self, counted: Counted) -> None:
        """The next block; blocks of a split come in their order."""
        wanted, have = self._wanted, self._have
        taken: dict[Split, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
        start = 0
        columns = (counted.doc.tolist(), counted.tokens.tolist(), counted.rows.tolist())
        for number, (doc, tokens, rows) in enumerate(zip(*columns, strict=True)):
            split = counted.split or self._split_of(doc, counted.keys[number])
            took = min(rows, wanted[split] - have[split]) if split else 0
            if split and took:
                taken[split].append((counted.block, doc, start, took if self._divisible else tokens, 0, took))
                have[split] += took
            start += tokens
        if self._settled:
            self._splits = dict.fromkeys(self.held_keys(), SPLITS[1])
        self._seen += start
        self.longest = max(self.longest, int(counted.tokens.max(initial=0)))
        for split, stretches in taken.items():
            self._taken[split].append(np.array(stretches, np.int64).reshape(-1, len(Stretches._fields)).T)

    def _split_of(self, doc: int, key: int) -> Split | None:
        """Where a piece of a text goes; None where an equal one is on the other side than the rest of its document."""
        if doc != self._document[0]:
            self._equal += key in self._splits
            self._document = doc, self._splits.get(key) or self._draw(key)
        split = self._document[1]
        if self._settled:
            return split if self._splits.get(key, split) == split else None
        return split if self._splits.setdefault(key, split) == split else None

    def _draw(self, key: int) -> Split:
        draw = xxhash.xxh3_64_intdigest(struct.pack("<QQ", self._spec.seed, key)) / 2**64
        heldout_share = self._wanted["heldout"] / (self._spec.heldout_from or sum(self._wanted.values()))
        first, second = SPLITS[::-1] if draw < heldout_share else SPLITS
        return second if self.full([first]) else first

    def check_full(self) -> None:
        """Raises SaescaleError unless both splits have all their tokens."""
        if not self.full():
            have = [f"{split} got {self._have[split]:,} of {self._wanted[split]:,}" for split in SPLITS]
            documents = self._document[0] + 1
            equal = f" ({self._equal:,} of them equal to an earlier one)" if self._equal else ""
            enough = self._seen >= sum(self._wanted.values())
            long = self._seen > _LONG_TOKENS * documents and not self._spec.cut_documents
            cut = ", or cut long ones (--cut-documents 2000)" if enough and long else ""
            raise SaescaleError(
                f"the corpus {self._spec.corpus} is too short: of its {self._seen:,} tokens in {documents:,} "
                f"document{'s' * (documents != 1)}{equal} {' and '.join(have)}. The split is by document, a .txt file "
                f"is one, and equal texts stay in one split: ask for fewer tokens, give more "
                f"{'other ' if equal else ''}{'documents' if enough else 'text'}{cut}"
            )

    def shards(self) -> Iterator[ShardTokens]:
        """All shards in the order of the manifest."""
        for split in SPLITS:
            whole = self._whole(split)
            ends = np.cumsum(whole.rows)
            for ordinal, first in enumerate(range(0, self._wanted[split], self._spec.shard_rows)):
                last = min(first + self._spec.shard_rows, self._wanted[split])
                yield ShardTokens(split, ordinal, self._cut(whole, ends, first, last))

    def next_shards(self, split: Split) -> Iterator[ShardTokens]:
        """Those whose rows are all known by now, each once, in their order: of a harvest that goes on while its shards
        are made. What they were cut from is forgotten."""
        have, wanted, rows = self._have[split], self._wanted[split], self._spec.shard_rows
        known = have if have == wanted else have // rows * rows
        while (first := self._given[split]) < known:
            last = min(first + rows, wanted)
            whole = self._whole(split)
            ends = self._before[split] + np.cumsum(whole.rows)
            yield ShardTokens(split, first // rows, self._cut(whole, ends, first, last))
            self._given[split] = last
            past = int(np.searchsorted(ends, last, "right"))
            if past:
                self._before[split] = int(ends[past - 1])
                self._taken[split] = [np.stack([column[past:] for column in whole])]

    def have(self, split: Split) -> int:
        """Rows that it has for that split by now."""
        return self._have[split]

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

    def _whole(self, split: Split) -> Stretches:
        return Stretches(*np.concatenate(self._taken[split], axis=1))

    def _cut(self, whole: Stretches, ends: np.ndarray, first: int, last: int) -> Stretches:
        """Rows `first` to `last` of stretches that end after `ends` rows."""
        low, high = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1
        block, doc, start, tokens, skip, rows = (column[low:high].copy() for column in whole)
        skip[0] = first - int(ends[low] - rows[0])
        rows[0] -= skip[0]
        rows[-1] -= int(ends[high - 1]) - last
        if self._divisible:
            start, tokens, skip = start + skip, rows, np.zeros_like(skip)
        return Stretches(block, doc, start, tokens, skip, rows)
