"""Token ids of the blocks that a live source makes next: read ahead of them into the spool, and forgotten behind."""

from collections.abc import Sequence, Set

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.assignment import ShardTokens
from saescale.trainers.harvest.contexts import Block, Counted
from saescale.trainers.harvest.live_corpus import Pass, most_ids
from saescale.trainers.harvest.live_places import Places
from saescale.trainers.harvest.make_shard import Facts
from saescale.trainers.harvest.room import AHEAD, Room
from saescale.trainers.harvest.served import Served
from saescale.trainers.harvest.spec import HarvestSpec


class Tokens:
    """Those of the source that `harvest` describes, in the folder `spool`; `ready`: the blocks whose tokens are
    there."""

    def __init__(
        self, harvest: HarvestSpec, facts: Facts, served: Served | None, places: Places, spool: str, room: Room
    ) -> None:
        self._harvest, self._facts, self._served, self._places = harvest, facts, served, places
        self._spool, self._room = spool, room
        self._pass: Pass | None = None
        self.ready: dict[int, ShardTokens] = {}
        self._spooled: dict[int, int] = {}  # bytes of blocks of text in the spool
        self._last_user: dict[int, int] = {}  # the last block that takes tokens of a block of text
        self._reserved: dict[int, int] = {}  # bytes of blocks of text that are tokenized now, at most

    @property
    def bytes(self) -> int:
        """On the disk, at most."""
        return sum(self._spooled.values()) + sum(self._reserved.values())

    # --- of the held-out rows, which come first

    def begin_heldout(self) -> Pass:
        """Reads from the beginning."""
        self._pass = Pass(self._harvest, self._facts, self._served, self._places, heldout=True)
        return self._pass

    def next_heldout(self) -> Block | None:
        """The next block of text, where none is tokenized now."""
        assert self._pass is not None, "begin_heldout comes first"
        return None if self._reserved or self._pass.peek() is None else self._take(self._pass)

    def end_heldout(self) -> None:
        """What was read goes on with the train rows, but for sequences, which were of the held-out ones alone."""
        if not self._facts.reads_text:
            self._pass = None

    # --- of the blocks

    def next(self, lacking: Sequence[int], making: Set[int]) -> Block | None:
        """The next block of text, where one of the blocks in `lacking`, the most urgent first, lacks its tokens;
        `making` are those that are made now."""
        ahead = [block for block in lacking if block in self.ready]
        if not lacking or len(ahead) == len(lacking) or len(ahead) > AHEAD:
            return None
        missing = next(block for block in lacking if block not in self.ready)
        begin = self._places.before(missing)
        if (
            self._pass is None
            or self._pass.next_block > missing
            or (begin is not None and begin.text > self._pass.read)
        ):
            if self._reserved or making or missing != lacking[0]:
                return None  # their tokens are still needed, or those of what is made before
            self._drop()
            self._pass = Pass(self._harvest, self._facts, self._served, self._places, begin)
        if self.bytes > self._room.tokens // 2:  # of those that are made too: if they go, their tokens are read again
            self.forget(missing, making | set(lacking))
        block = self._pass.peek()
        if block is None:
            return None
        if self.bytes + most_ids(block, self._spooled) > self._room.tokens:
            if not self._reserved and not ahead and not making:
                raise SaescaleError(
                    f"live: the tokens of block {missing} do not fit into the {self._room.tokens:,} bytes that are "
                    "kept for them: most of the corpus is held out or repeated; raise max_bytes and block_rows"
                )
            return None
        return self._take(self._pass)

    def _take(self, reading: Pass) -> Block:
        block: Block = reading.next()
        self._reserved[block.block] = most_ids(block, self._spooled)
        return block

    def counted(self, counted: Counted) -> None:
        """A block of text lies in the spool."""
        assert self._pass is not None, "it was read"
        del self._reserved[counted.block]
        self._spooled[counted.block] = int(counted.tokens.sum()) * 4
        found = self._pass.add(counted)
        rows = max(self._pass.assignment.have("train") - 1, 0)
        self._last_user[counted.block] = rows // self._harvest.shard_rows
        self.ready |= {tokens.ordinal: tokens for tokens in found}

    def forget(self, first: int, kept: Set[int]) -> None:
        """Removes those of blocks before `first` but the ones that are to be `kept`; of this reading of the corpus
        alone."""
        for block in [block for block in self.ready if block < first and block not in kept]:
            del self.ready[block]
        needed = min([*self.ready, *([self._pass.next_block] if self._pass else [])], default=0)
        for text in [text for text, last in self._last_user.items() if last < needed]:
            files.remove(contexts.block_file(self._spool, text))
            del self._last_user[text], self._spooled[text]

    def _drop(self) -> None:
        for text in self._spooled:
            files.remove(contexts.block_file(self._spool, text))
        self.ready, self._spooled, self._last_user = {}, {}, {}
