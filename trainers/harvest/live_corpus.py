"""One reading of what the blocks of a live source are made from."""

from collections.abc import Iterator
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.assignment import Assignment, ShardTokens
from saescale.trainers.harvest.contexts import SPLITS, Counted, Draw, draws, text_blocks
from saescale.trainers.harvest.live_places import Begin, Places
from saescale.trainers.harvest.make_shard import Facts
from saescale.trainers.harvest.served import Served, ServedFile
from saescale.trainers.harvest.spec import HarvestSpec

_END = object()


class Pass:
    """One reading of the corpus, of a server's files, or of what the subject draws; from its beginning, or from where a
    noted block begins."""

    def __init__(
        self,
        spec: HarvestSpec,
        facts: Facts,
        served: Served | None,
        places: Places,
        begin: Begin | None = None,
        heldout: bool = False,
    ) -> None:
        self._spec, self._noted = spec, places
        divisible, self.read = facts.reads_text, 0  # the number of the next block of text
        self._blocks: Iterator[Any]
        if begin is None:
            self.assignment = Assignment(spec, divisible)
        else:
            self.assignment = Assignment.resumed(spec, divisible, begin.reached, places.held or [])
            self.read = begin.text
        self.next_block = -(-begin.reached.rows // spec.shard_rows) if begin else 0
        if served is not None:
            self._blocks = served.each(self.read)
        elif divisible:
            spec.check_contexts()
            place = None if begin is None else begin.place
            self._blocks = text_blocks(spec.corpus, spec.seed, spec.text_column, spec.cut_documents, self.read, place)
        else:
            spec.refuse_text()
            self._blocks = draws("heldout" if heldout else "train", spec.seed, self.read)
        self._next: Any = None
        self._places: dict[int, Any] = {}  # of blocks of text that are tokenized now
        self._begins: list[Begin] = []  # the last ones that a block may begin at

    def peek(self) -> Any:
        """The next block of text, None while a server has not written it. SaescaleError where the corpus ends here."""
        if self._next is None:
            self._next = next(self._blocks, _END)
        if self._next is _END:
            have, spec = {split: self.assignment.have(split) for split in ("train", "heldout")}, self._spec
            raise SaescaleError(
                f"the corpus {spec.corpus} ended early: it gave {have['train']:,} of {spec.tokens:,} tokens and "
                f"{have['heldout']:,} of {spec.heldout_tokens:,} held-out ones; ask for fewer, or give more text"
            )
        return self._next

    def next(self) -> Any:
        """The same, once."""
        block = self.peek()
        self._next = None
        self.read = block.block + (len(SPLITS) if isinstance(block, Draw) else 1)
        self._places[block.block] = getattr(block, "place", None)
        return block

    def add(self, counted: Counted) -> list[ShardTokens]:
        """The next block of text, tokenized; the blocks whose tokens are all known with it, and where they begin is
        noted."""
        place = self._places.pop(counted.block)
        if (reached := self.assignment.reached()) is not None:
            self._noted.hold(self.assignment.held_keys())
            self._begins.append(Begin(counted.block, place, reached))
        self.assignment.add(counted)
        found = list(self.assignment.next_shards("train"))
        for tokens in found:
            self.next_block = tokens.ordinal + 1
            first = tokens.ordinal * self._spec.shard_rows
            while len(self._begins) > 1 and self._begins[1].reached.rows <= first:
                self._begins.pop(0)
            if self._begins and self._begins[0].reached.rows <= first:
                self._noted.note(tokens.ordinal, self._begins[0])
        return found


def most_ids(block: Any, seen: dict[int, int]) -> int:
    """Bytes of the ids of a block, at most; of sequences that are still to be drawn, twice the most that there were."""
    if isinstance(block, ServedFile):
        return 4 * block.tokens
    if isinstance(block, contexts.Texts):
        return 4 * sum(len(text.encode("utf-8", "surrogatepass")) + 4 for _, text in block.pieces)
    return max(4 * contexts.BLOCK_CHARACTERS, 2 * max(seen.values(), default=0))
