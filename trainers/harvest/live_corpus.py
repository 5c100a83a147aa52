"""One reading of what the blocks of a live source are made from."""

from collections.abc import Iterator
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.assignment import Assignment
from saescale.trainers.harvest.make_shard import Facts
from saescale.trainers.harvest.served import ServedFile
from saescale.trainers.harvest.spec import HarvestSpec

_END = object()


class Pass:
    """One reading of the corpus, or of what the subject draws, from its beginning."""

    def __init__(self, spec: HarvestSpec, facts: Facts, blocks: Iterator[Any]) -> None:
        self._spec, self._blocks = spec, blocks
        self.assignment = Assignment(spec, divisible=facts.reads_text)
        self.next_block = 0
        self._next: Any = None

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
        return block


def most_ids(block: Any, seen: dict[int, int]) -> int:
    """Bytes of the ids of a block, at most; of sequences that are still to be drawn, twice the most that there were."""
    if isinstance(block, ServedFile):
        return 4 * block.tokens
    if isinstance(block, contexts.Texts):
        return 4 * sum(len(text.encode("utf-8", "surrogatepass")) + 4 for _, text in block.pieces)
    return max(4 * contexts.BLOCK_CHARACTERS, 2 * max(seen.values(), default=0))
