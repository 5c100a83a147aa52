"""Blocks of documents, the files in which their ids lie, and the contexts that go through the subject.

A document is a text of a corpus, which may come in pieces, or a sequence that the subject made. Blocks are tokenized
or drawn anywhere and in any order; the ids of a block lie in a file of their own below a folder, the spool. Whoever
decides what goes into which shard (assignment.py) holds less than 200 bytes for each piece and no token; whoever makes
a shard reads the blocks that it needs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Split
from saescale.trainers.subjects.numbered import BLOCK_SEQUENCES, draw_block
from saescale.trainers.subjects.subject import Generates, ReadsText
from saescale.trainers.subjects.texts.text import TEXT_COLUMN, Piece, Place, content_key, placed_pieces

SPLITS: tuple[Split, ...] = ("train", "heldout")
BLOCK_CHARACTERS = 2**18  # about 64,000 tokens


class Counted(NamedTuple):
    """A block whose ids lie in the spool: of each piece the document, the ids and how many of them are rows, int64
    [pieces]. Sequences have their `split`; of texts, which may go to either, there are the `keys` of the contents."""

    block: int
    doc: np.ndarray
    tokens: np.ndarray
    rows: np.ndarray
    split: Split | None
    keys: list[int]


class Texts(NamedTuple):
    """Block number `block` of a corpus, which begins at `place` there."""

    block: int
    pieces: list[Piece]
    place: Place

    def spool(self, spool: str, subject: ReadsText) -> Counted:
        """Tokenizes the block into its file in the folder `spool`, which is written whole or not at all."""
        ids = subject.tokenize([text.rstrip() + "\n\n" for _, text in self.pieces])
        files.write_atomic(block_file(spool, self.block), np.concatenate(ids).tobytes())
        tokens = np.array([len(each) for each in ids])
        doc = np.array([doc for doc, _ in self.pieces])
        return Counted(self.block, doc, tokens, tokens, None, [content_key(text) for _, text in self.pieces])


class Draw(NamedTuple):
    """Block number `block` of what the subject makes itself for a split of a harvest with `seed`."""

    block: int
    split: Split
    seed: int

    def spool(self, spool: str, subject: Generates) -> Counted:
        """Draws the block into its file in the folder `spool`. An id that is no row stands there as its complement."""
        drawn = draw_block(subject, self.split, self.seed, self.block)
        signed = [np.where(keep, ids, ~ids).astype(np.int32) for ids, keep in drawn]
        files.write_atomic(block_file(spool, self.block), np.concatenate(signed).tobytes())
        tokens = np.array([len(ids) for ids, _ in drawn])
        rows = np.array([int(keep.sum()) for _, keep in drawn])
        doc = self.block * BLOCK_SEQUENCES + np.arange(len(drawn))
        return Counted(self.block, doc, tokens, rows, self.split, [])


Block = Texts | Draw


def text_blocks(
    corpus: str,
    seed: int,
    column: str = TEXT_COLUMN,
    cut: int | None = None,
    first: int = 0,
    begin: Place | None = None,
) -> Iterator[Texts]:
    """The documents of the corpus in their order, cut into blocks; raises what `pieces` raises. From block `first` on,
    whose `place` is `begin`."""
    block, characters = first, 0
    found: list[Piece] = []
    for piece, place in placed_pieces(corpus, seed, column, cut, begin):
        begin = begin or place
        found.append(piece)
        characters += len(piece.text)
        if characters >= BLOCK_CHARACTERS:
            yield Texts(block, found, begin)
            block, found, characters, begin = block + 1, [], 0, None
    if found and begin is not None:
        yield Texts(block, found, begin)


def draws(split: Split, seed: int, first: int = 0) -> Iterator[Draw]:
    """Blocks of a split without end, from number `first` on. Even numbers are of one split and odd ones of the other:
    no two are the same."""
    number = max(first, SPLITS.index(split))
    while True:
        yield Draw(number, split, seed)
        number += len(SPLITS)


def read_block(spool: str, block: int) -> np.ndarray:
    """The ids of a block, int32. Raises SaescaleError when it is not in the spool."""
    where = block_file(spool, block)
    try:
        return np.frombuffer(files.read_bytes(where), np.int32)
    except FileNotFoundError as error:
        raise SaescaleError(f"{where}: the tokens that were put there are gone; run the same command again") from error


def block_file(spool: str, block: int) -> str:
    """Where the ids of a block lie."""
    return files.join(spool, f"{block:06d}.ids")


# --- what goes through the subject


class Context(NamedTuple):
    """`ids` int32 [length] as the subject reads them, which of them are rows, and the document of each."""

    ids: np.ndarray
    keep: np.ndarray  # bool [length]
    doc: np.ndarray  # int32 [length]


class Batch(NamedTuple):
    """Contexts of one length: like Context, [contexts, length]."""

    ids: np.ndarray
    keep: np.ndarray
    doc: np.ndarray


def text_contexts(ids: np.ndarray, doc: np.ndarray, length: int, prefix: Sequence[int]) -> list[Context]:
    """Ids [n] of documents, one after the other, cut into contexts; `prefix` stands before each and is no row."""
    before = np.array(prefix, np.int32)
    keep = np.arange(len(before) + length) >= len(before)
    return [
        Context(
            np.concatenate([before, ids[first : first + length]]),
            keep,
            np.concatenate([np.full_like(before, -1), doc[first : first + length]]),
        )
        for first in range(0, len(ids), length)
    ]


def sequence_context(signed: np.ndarray, doc: int, skip: int, rows: int) -> Context:
    """A sequence [length] as `Draw.spool` wrote it, of whose rows those from `skip` to `skip + rows` count."""
    keep = np.zeros(len(signed), bool)
    keep[np.flatnonzero(signed >= 0)[skip : skip + rows]] = True
    return Context(np.where(signed < 0, ~signed, signed), keep, np.full(len(signed), doc, np.int32))


def batches(contexts: Sequence[Context], size: int) -> list[Batch]:
    """At most `size` contexts at a time, those of one length together, shorter ones first."""
    found: list[Batch] = []
    for length in sorted({len(context.ids) for context in contexts}):
        alike = [context for context in contexts if len(context.ids) == length]
        parts = (alike[first : first + size] for first in range(0, len(alike), size))
        found += [Batch(*(np.stack(column) for column in zip(*part, strict=True))) for part in parts]
    return found
