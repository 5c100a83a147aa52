"""Makes the blocks of a live source (storage/sources/live.py) ahead of those who stream, and removes them behind.

    with LiveHarvest(spec, "folder", crew) as live:     # makes the held-out rows, writes live.json
        live.run(should_stop)                           # until it says so; or in a thread

It is a harvest whose corpus is read while its shards are made: the same plan decides what is in which block
(assignment.py), the same code makes it (make_shard.py), and `saescale harvest` of the same spec writes the same bytes.
What is made next follows from where the consumers are, nothing else, so that a producer that was killed needs no
memory of its own: the next one finds the blocks that lie there and where the slowest consumer is.

At every moment the files below the folder take no more than `max_bytes`: room is taken before anything is written. Of
what there is room for, the slowest consumer decides: blocks from the one that it needs on are made, and nobody runs
further ahead of it than the disk holds. So no block is made twice while its consumers live.
"""

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import xxhash

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError
from saescale.storage.sources.live import (
    BEAT_S,
    CONSUMERS,
    LIVE,
    PRODUCER,
    Heard,
    Live,
    LiveSource,
    Making,
    Place,
    Places,
    name_of,
    open_source,
    read_making,
)
from saescale.storage.sources.manifest import MANIFEST
from saescale.storage.sources.store import ActivationStore
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.assignment import ShardTokens
from saescale.trainers.harvest.conduct import (
    PLAN_FORMAT,
    SPOOL_PREFIX,
    Alone,
    Crew,
    Meter,
    check_first,
    heldout_manifest,
)
from saescale.trainers.harvest.contexts import Block, Counted, draws, text_blocks
from saescale.trainers.harvest.live_corpus import Pass, most_ids
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.make_shard import Facts, Made, ShardJob
from saescale.trainers.harvest.room import AHEAD, Room
from saescale.trainers.harvest.served import Served, ServedCrew
from saescale.trainers.harvest.spec import PLAN, HarvestSpec, read_plan, refuse_difference

MADE = "made"  # a folder of the checksums of blocks, a file for each thousand
_BLOCK = re.compile(r"train-(\d+)\.parquet")
LOOK_S = 0.1  # between two looks at the folder
_ALONE_S = 3.0  # a producer that does not move for so long is dead


class LiveHarvest:
    """The producer of the live source `spec`, whose blocks lie in the folder `url`; `crew` does the work, and has
    `spool`, a folder below it, for token ids.

    Entering it makes the held-out rows and live.json, where they are not there. Raises SaescaleError where the folder
    holds another harvest or another producer works on it, where max_bytes is below a window, and what harvests raise.
    """

    def __init__(
        self,
        spec: LiveSpec,
        url: str,
        crew: Crew,
        spool: str,
        say: Callable[[str], None] = lambda stage: None,
        served: Served | None = None,
    ) -> None:
        self.spec, self.url, self.crew, self.spool, self._say = spec, url, crew, spool, say
        self._served = served
        self.making = Making(max_bytes=spec.max_bytes)
        self._ended = threading.Event()
        self._beat: threading.Thread | None = None
        self._sealed = False  # the folder is a whole store: there is nothing to do
        self._heard = Heard()
        # What is where.
        self._present: set[int] = set()  # blocks on the disk
        self._outstanding: set[int] = set()  # blocks that somebody makes
        self._ready: dict[int, ShardTokens] = {}  # blocks whose tokens lie in the spool
        self._spooled: dict[int, int] = {}  # bytes of blocks of text in the spool
        self._last_user: dict[int, int] = {}  # the last block that takes tokens of a block of text
        self._reserved: dict[int, int] = {}  # bytes of blocks of text that are tokenized now, at most
        self._pass: Pass | None = None
        self._sums: dict[int, dict[str, str]] = {}  # checksums of blocks that were made once, by thousands
        self._need = self._passed = 0  # of the slowest consumer; blocks are counted on over passes
        self._until: int | None = None  # of that which goes furthest
        self._looked = 0.0

    # --- before anybody can stream

    def __enter__(self) -> Self:
        self._require_alone()
        try:
            self.live = self._prepare()
            self._keep_beating()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def _require_alone(self) -> None:
        found = read_making(self.url)
        if found is None or found.state == "ended":
            return
        until = time.monotonic() + _ALONE_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 4)
            now = read_making(self.url)
            if now is not None and now.beat != found.beat:
                raise SaescaleError(f"{self.url}: another producer makes the blocks of this live source; end it first")

    def _prepare(self) -> Live:
        harvest = self.spec.harvest(self.url, reads_text=True)
        if files.exists(files.join(self.url, MANIFEST)):
            return self._of_store()
        begun = _begun(self.url)
        if begun is None and self._served is None:
            check_first([harvest])
        self._tidy()
        self._say(f"loading {harvest.subject}")
        computed_in = str(begun["computed_in"]) if begun else "auto"
        asked = harvest.compute_dtype if harvest.compute_dtype != "auto" else computed_in
        facts = self.crew.load([self.spec.harvest(self.url, reads_text=False)], asked)
        self._harvest = harvest = self.spec.harvest(self.url, facts.reads_text)
        self.room = Room(self.spec, harvest, facts.d_model)
        self.room.require(min(self.spec.window_blocks, self._blocks))
        self._keep_beating()
        self._facts, self._plan = facts, _plan(harvest, facts)
        if self._served is not None:
            self._plan |= {"hidden_states_index": self.spec.hidden_states_index}
        if begun is not None:
            refuse_difference(self.url, begun, self._plan)
        if files.exists(files.join(self.url, LIVE)):
            live = open_source(self.url)
            assert isinstance(live, LiveSource)
            live.verify(full=False)
            return self._as_asked(live.live)
        self._say("harvesting the held-out rows")
        return self._seal_heldout()

    def _seal_heldout(self) -> Live:
        """Makes the held-out rows from the first tokens of the corpus, then says what the source is."""
        self._pass = self._new_pass(heldout=True)
        self._heldout: list[ShardTokens] = []
        made: list[Made] = []

        def items() -> Iterator[Block | ShardJob | None]:
            assert self._pass is not None
            given = 0
            while given < -(-self._harvest.heldout_tokens // self._harvest.shard_rows):
                if given < len(self._heldout):
                    yield ShardJob(self._heldout[given], self._plan)
                    given += 1
                elif self._reserved or self._pass.peek() is None:
                    yield None
                else:
                    yield self._next_text(self._pass.next())

        for result in self.crew.serve(items()):
            if isinstance(result, Made):
                made.append(result)
                continue
            self._counted(result)
            self._heldout += self._pass.assignment.next_shards("heldout")
        manifest = heldout_manifest(self._harvest, self._facts, self._pass.assignment.longest, made)
        if self._served is not None:
            length = self._pass.assignment.longest
            manifest = manifest.model_copy(update={"context_length": length, "contexts_cross_documents": False})
        if not self._facts.reads_text:
            self._pass = None  # that was of the held-out sequences alone
        live = self._live(manifest)
        files.write_atomic(files.join(self.url, LIVE), live.model_dump_json(indent=1, exclude_none=True).encode())
        return live

    def _of_store(self) -> Live:
        """The folder is a finished store of the same harvest: all blocks are there, and stay."""
        store = ActivationStore.open(self.url)
        found = read_plan(self.spec.harvest(self.url, store.manifest.split_by == "content"))
        if found is None or store.rows("train") != self.spec.tokens:
            raise SaescaleError(f"{self.url} is a store that no harvest of this live source wrote; name another folder")
        self._plan = {key: value for key, value in found.items() if key != "tokens_xxh3"}
        self._sealed = True
        heldout = [shard for shard in store.manifest.shards if shard.split == "heldout"]
        live = self._live(store.manifest.model_copy(update={"shards": heldout}))
        files.write_atomic(files.join(self.url, LIVE), live.model_dump_json(indent=1, exclude_none=True).encode())
        return live

    def _live(self, manifest: Any) -> Live:
        sums = [shard.xxh3 for shard in manifest.shards]
        what = json.dumps([self._plan, self.spec.window_blocks, sums], sort_keys=True, default=str)
        return Live(
            identity=xxhash.xxh3_128_hexdigest(what.encode()), tokens=self.spec.tokens, block_rows=self.spec.block_rows,
            window_blocks=self.spec.window_blocks, manifest=manifest,
        )  # fmt: skip

    def _as_asked(self, live: Live) -> Live:
        asked = (self.spec.tokens, self.spec.block_rows, self.spec.window_blocks)
        if (live.tokens, live.block_rows, live.window_blocks) != asked:
            raise SaescaleError(
                f"{self.url} holds a live source of {live.tokens:,} tokens in windows of {live.window_blocks} blocks; "
                "name another folder, or remove it"
            )
        return live

    @property
    def _blocks(self) -> int:
        return -(-self.spec.tokens // self.spec.block_rows)

    # --- while somebody streams

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Makes blocks until `should_stop`. What it raises, consumers that wait for a block raise too."""
        if self._sealed:
            self.making = self.making.model_copy(update={"state": "the whole store is there"})
            while not should_stop() and not self._ended.wait(LOOK_S):
                pass
            return
        try:
            for result in self.crew.serve(self._items(should_stop)):
                if isinstance(result, Made):
                    self._made(result)
                else:
                    self._counted(result)
        except BaseException as error:
            self._end(error)
            raise

    def clear(self) -> None:
        """Removes all blocks: nobody needs them any more. The held-out rows stay."""
        if not self._sealed:
            self._tidy()
            for block in _found(self.url):
                files.remove(files.join(self.url, name_of(block)))

    def _items(self, should_stop: Callable[[], bool]) -> Iterator[Block | ShardJob | None]:
        self._present = self._with_checksums(_found(self.url))
        while not should_stop():
            self._look()
            yield self._next_job() or self._next_tokens()

    def _look(self) -> None:
        """Where the consumers are, and what they have passed."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        places = Places.of(self.url, self._heard)
        known = places.living or places.gone
        if places.living:
            self._need = min(map(self._needed, places.living.values()))
            for name in places.gone:
                files.remove(files.join(self.url, CONSUMERS, name))
        elif places.gone:
            self._need = min(place.passed for place in places.gone.values())  # where they will go on
        ends = [place.end for place in known.values()] or [self._blocks]
        self._until = None if None in ends else max(end for end in ends if end is not None)
        self._passed = min((place.passed for place in known.values()), default=self._need)
        self._present |= _found(self.url) & self._outstanding
        wanted = self._wanted()
        keep = {number % self._blocks for number in range(self._passed, self._need)} | set(wanted)
        for block in self._present - keep - self._outstanding:
            if self._all_passed(block):
                self._remove(block)
        while len(self._present | self._outstanding) > self.room.blocks and self._make_room():
            pass
        self._forget_tokens(self._passed)
        self._tell(len(places.living))

    def _needed(self, place: Place) -> int:
        """The first block that a consumer is to find. Where all of them have room it keeps those behind it too: it may
        only have looked at the first rows, or go back to them."""
        short = place.end is not None and place.end - place.passed <= self.room.blocks
        return place.passed if short else place.need

    def _all_passed(self, block: int) -> bool:
        return block < self._passed % self._blocks or self._passed >= self._blocks

    def _wanted(self) -> list[int]:
        """The blocks that are to lie on the disk, the most urgent first."""
        last = self._need + min(self.room.blocks, self._blocks)
        last = last if self._until is None else min(last, self._until)
        return [number % self._blocks for number in range(self._need, last)]

    def _next_job(self) -> ShardJob | None:
        """The next block to make, where there is room for it."""
        wanted = self._wanted()
        block = next((b for b in wanted if b not in self._present and b not in self._outstanding), None)
        if block is None or block not in self._ready:
            return None
        if len(self._present | self._outstanding) >= self.room.blocks and not self._make_room():
            return None
        self._outstanding.add(block)
        return ShardJob(self._ready[block], self._plan)

    def _make_room(self) -> bool:
        """Removes a block that nobody needs now, if there is one."""
        spare = self._present - set(self._wanted()) - self._outstanding
        if spare:
            self._remove(max(spare, key=self._distance))
        return bool(spare)

    def _distance(self, block: int) -> int:
        """How long it takes until a block that nobody needs now is needed: those that were just passed go last."""
        return (self._need - 1 - block) % self._blocks

    def _next_tokens(self) -> Block | None:
        """The next block of text, where a block that is wanted lacks its tokens."""
        lacking = [b for b in self._wanted() if b not in self._present and b not in self._outstanding]
        ahead = [b for b in lacking if b in self._ready]
        if not lacking or len(ahead) == len(lacking) or len(ahead) > AHEAD:
            return None
        missing = next(b for b in lacking if b not in self._ready)
        if self._pass is None or self._pass.next_block > missing:
            if self._reserved or self._outstanding or missing != lacking[0]:
                return None  # their tokens are still needed, or those of what is made before
            self._drop_tokens()
            self._pass = self._new_pass()
        used = sum(self._spooled.values()) + sum(self._reserved.values())
        if used > self.room.tokens // 2:
            self._forget_tokens(self._need)
            used = sum(self._spooled.values()) + sum(self._reserved.values())
        block = self._pass.peek()
        if block is None:
            return None
        if used + most_ids(block, self._spooled) > self.room.tokens:
            if not self._reserved and not ahead and not self._outstanding:
                raise SaescaleError(
                    f"live: the tokens of block {missing} do not fit into the {self.room.tokens:,} bytes that are kept "
                    "for them: most of the corpus is held out or repeated; raise max_bytes and block_rows"
                )
            return None
        return self._next_text(self._pass.next())

    def _new_pass(self, heldout: bool = False) -> Pass:
        harvest, facts = self._harvest, self._facts
        blocks: Iterator[Any]
        if self._served is not None:
            blocks = self._served.each()
        elif facts.reads_text:
            harvest.check_contexts()
            blocks = text_blocks(harvest.corpus, harvest.seed, harvest.text_column, harvest.cut_documents)
        else:
            harvest.refuse_text()
            blocks = draws("heldout" if heldout else "train", harvest.seed)
        return Pass(harvest, facts, blocks)

    def _next_text(self, block: Block) -> Block:
        self._reserved[block.block] = most_ids(block, self._spooled)
        return block

    # --- what was done

    def _counted(self, counted: Counted) -> None:
        assert self._pass is not None
        del self._reserved[counted.block]
        self._spooled[counted.block] = int(counted.tokens.sum()) * 4
        self._pass.assignment.add(counted)
        rows = max(self._pass.assignment.have("train") - 1, 0)
        self._last_user[counted.block] = rows // self.spec.block_rows
        for tokens in self._pass.assignment.next_shards("train"):
            self._pass.next_block = tokens.ordinal + 1
            self._ready[tokens.ordinal] = tokens

    def _made(self, made: Made) -> None:
        shard = made.records[0].shard
        match = _BLOCK.fullmatch(shard.name)
        assert match is not None
        block = int(match[1])
        self._outstanding.discard(block)
        self._present.add(block)
        known = self._checksums(block)
        if (before := known.get(str(block))) not in (None, shard.xxh3):
            self._remove(block)
            raise SaescaleError(
                f"{self.url}: block {block} was made again with other bytes ({shard.xxh3}, not {before}): the corpus "
                "or the subject was changed, or machines of another kind round otherwise; restore it, or begin anew "
                "in another folder"
            )
        if made.computed:
            self.making = self.making.model_copy(update={
                "made": self.making.made + made.rows,
                "again": self.making.again + (made.rows if before else 0),
                "tokens_per_s": made.rows / max(1e-9, made.seconds),
            })  # fmt: skip
        if before is None:
            known[str(block)] = shard.xxh3
            files.write_atomic(files.join(self.url, MADE, f"{block // 1000:05d}.json"), json.dumps(known).encode())

    def _checksums(self, block: int) -> dict[str, str]:
        thousand = block // 1000
        if thousand not in self._sums:
            where = files.join(self.url, MADE, f"{thousand:05d}.json")
            try:
                self._sums[thousand] = read_json(where, f"remove {self.url}, or name another folder")
            except FileNotFoundError:
                self._sums[thousand] = {}
        return self._sums[thousand]

    def _with_checksums(self, found: set[int]) -> set[int]:
        """Of the blocks that lie there those that were told of; others may be half of something, and go."""
        known = {block for block in found if str(block) in self._checksums(block)}
        for block in found - known:
            files.remove(files.join(self.url, name_of(block)))
        return known

    # --- what goes

    def _remove(self, block: int) -> None:
        files.remove(files.join(self.url, name_of(block)))
        self._present.discard(block)

    def _forget_tokens(self, before: int) -> None:
        """Those of blocks before that one, which nobody makes; of this pass over the corpus alone."""
        first = before % self._blocks
        for block in [b for b in self._ready if b < first and b not in self._outstanding]:
            del self._ready[block]
        needed = min([*self._ready, *self._outstanding, *([self._pass.next_block] if self._pass else [])], default=0)
        for text in [text for text, last in self._last_user.items() if last < needed]:
            files.remove(contexts.block_file(self.spool, text))
            del self._last_user[text], self._spooled[text]

    def _drop_tokens(self) -> None:
        for text in self._spooled:
            files.remove(contexts.block_file(self.spool, text))
        self._ready, self._spooled, self._last_user = {}, {}, {}

    def _tidy(self) -> None:
        """Removes what killed producers left behind."""
        for name in files.list_names(self.url):
            if name.startswith(SPOOL_PREFIX) and not self.spool.rstrip("/").endswith(name):
                files.remove(files.join(self.url, name))
        files.remove_partials(self.url)
        files.remove_partials(files.join(self.url, MADE))

    # --- what is told

    def _tell(self, consumers: int) -> None:
        missing = [b for b in self._wanted() if b not in self._present]
        first = self._need % self._blocks
        if self._outstanding:
            state = f"making block {min(self._outstanding)}"
        elif missing:
            state = "reading the corpus"
        else:
            state = "waiting for the slowest consumer" if consumers else "waiting for somebody to stream"
        tokens = sum(self._spooled.values()) + sum(self._reserved.values())
        blocks = len(self._present | self._outstanding)
        taken = blocks * self.room.block + tokens + self.room.heldout + self.room.notes
        self.making = self.making.model_copy(update={
            "state": state, "first": first, "blocks": len(self._present), "bytes": taken, "consumers": consumers,
        })  # fmt: skip

    def _keep_beating(self) -> None:
        if self._beat is None:
            self._beat = threading.Thread(target=self._keep, name="saescale-live-producer", daemon=True)
            self._beat.start()

    def _keep(self) -> None:
        while True:
            with suppress(SaescaleError):
                self._write()
            if self._ended.wait(BEAT_S):
                return

    def _write(self) -> None:
        self.making = self.making.model_copy(update={"beat": self.making.beat + 1})
        files.write_atomic(files.join(self.url, PRODUCER), self.making.model_dump_json().encode())

    def _end(self, error: BaseException | None) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        with suppress(SaescaleError):
            files.remove(self.spool)
        if self._beat is None:  # it never began: nothing is left of it
            if (local := files.local_path(self.url)) is not None:
                with suppress(OSError):
                    os.removedirs(local)
            return
        self._beat.join()
        why = str(error) if isinstance(error, Exception) else None
        self.making = self.making.model_copy(update={"state": "ended", "error": why})
        with suppress(SaescaleError):
            self._write()


@contextmanager
def live_here(spec: LiveSpec, url: str, cache: str | None = None) -> Iterator[LiveHarvest]:
    """A producer in a thread of this process, which needs no Ray; what it raises, those who stream raise."""
    spool, stop = files.join(url, SPOOL_PREFIX + uuid.uuid4().hex), threading.Event()
    served = None if spec.hidden_states is None else Served(spec.hidden_states, url)
    alone: Crew = (
        Alone(spool, cache, Meter(0)) if served is None else ServedCrew(served, spec.hidden_states_index, spool)
    )
    with LiveHarvest(spec, url, alone, spool, served=served) as live:

        def run() -> None:
            with suppress(Exception):
                live.run(stop.is_set)

        thread = threading.Thread(target=run, name="saescale-live-harvest", daemon=True)
        thread.start()
        try:
            yield live
        finally:
            stop.set()
            thread.join()


def _plan(spec: HarvestSpec, facts: Facts) -> dict[str, Any]:
    return {
        "format": PLAN_FORMAT,
        **spec.identity(facts.reads_text),
        "fingerprint": facts.fingerprint,
        "computed_in": facts.computed_in,
    }


def _begun(url: str) -> dict[str, Any] | None:
    """The plan by which the folder was begun; None for an empty one."""
    try:
        return read_json(files.join(url, PLAN), f"remove {url} or name another folder")
    except FileNotFoundError:
        return None


def _found(url: str) -> set[int]:
    """Blocks on the disk."""
    return {int(match[1]) for name in files.list_names(url) if (match := _BLOCK.fullmatch(name))}
