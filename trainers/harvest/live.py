"""Makes the blocks of a live source (storage/live.py) ahead of those who stream, and removes them behind.

    with LiveHarvest(spec, "folder", crew) as live:     # makes the held-out rows, writes live.json
        live.run(should_stop)                           # until it says so; or in a thread

It is a harvest whose corpus is read while its shards are made: the same plan decides what is in which block
(assignment.py), the same code makes it (make_shard.py), and `saescale harvest` of the same spec writes the same bytes.
What is made next follows from where the consumers are (live_needs.py), nothing else, so that a producer that was killed
needs no memory of its own: the next one finds the blocks that lie there (live_blocks.py), where their tokens stand in
the corpus (live_places.py), and where the slowest consumer is.

At every moment the files below the folder take no more than `max_bytes`: room is taken before anything is written
(room.py). Of what there is room for, the slowest consumer decides: blocks from the one that it needs on are made, and
nobody runs further ahead of it than the disk holds. So no block is made twice while its consumers live.
"""

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import xxhash

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError
from saescale.storage.live import LIVE, Live, LiveSource, Making, name_of, open_source
from saescale.storage.manifest import MANIFEST
from saescale.storage.store import ActivationStore
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
from saescale.trainers.harvest.contexts import Block
from saescale.trainers.harvest.live_blocks import MADE, Blocks, blocks_in
from saescale.trainers.harvest.live_needs import LOOK_S, Awaited, Needs
from saescale.trainers.harvest.live_places import PLACES, Places
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.live_tokens import Tokens
from saescale.trainers.harvest.live_told import Told, require_alone
from saescale.trainers.harvest.make_shard import Facts, Made, ShardJob
from saescale.trainers.harvest.room import Room
from saescale.trainers.harvest.served import Served, ServedCrew
from saescale.trainers.harvest.spec import PLAN, HarvestSpec, read_plan, refuse_difference
from saescale.trainers.preprocess import SAMPLE_TOKENS
from saescale.trainers.subjects.texts.text import corpus_digest


class LiveHarvest:
    """The producer of the live source `spec`, whose blocks lie in the folder `url`; `crew` does the work, and has
    `spool`, a folder below it, for token ids. `awaited`: which cells are still to be trained, where somebody knows.

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
        awaited: Awaited | None = None,
    ) -> None:
        self._awaited = awaited
        self.spec, self.url, self.crew, self.spool, self._say = spec, url, crew, spool, say
        self._served = served
        self._told = Told(url, spec.max_bytes)
        self._sealed = False  # the folder is a whole store: there is nothing to do

    @property
    def making(self) -> Making:
        """What it says of itself."""
        return self._told.making

    # --- before anybody can stream

    def __enter__(self) -> Self:
        require_alone(self.url)
        try:
            self.live = self._prepare()
            self._told.begin()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(error)

    def _prepare(self) -> Live:
        harvest = self.spec.harvest(self.url, reads_text=True)
        if files.exists(files.join(self.url, MANIFEST)):
            return self._of_store()
        begun = _begun(self.url)
        if begun is None and self._served is None:
            check_first([harvest])
        self._require_files()
        self._tidy()
        self._say(f"loading {harvest.subject}")
        computed_in = str(begun["computed_in"]) if begun else "auto"
        asked = harvest.compute_dtype if harvest.compute_dtype != "auto" else computed_in
        facts = self.crew.load([self.spec.harvest(self.url, reads_text=False)], asked)
        self._harvest = harvest = self.spec.harvest(self.url, facts.reads_text)
        self.room = Room(self.spec, harvest, facts.d_model)
        self._require_room_for_files()
        self._count_served()
        self._told.begin()
        self._facts, self._plan = facts, _plan(harvest, facts)
        if self._served is not None:
            self._plan |= {"hidden_states_index": self.spec.hidden_states_index}
        if begun is not None:
            refuse_difference(self.url, begun, self._plan)
        text = facts.reads_text and self._served is None
        self._places = Places(self.url, corpus_digest(harvest.corpus) if text else "")
        self._tokens = Tokens(harvest, facts, self._served, self._places, self.spool, self.room)
        if files.exists(files.join(self.url, LIVE)):
            live = open_source(self.url)
            assert isinstance(live, LiveSource)
            live.verify(full=False)
            return self._as_asked(live.live)
        self._say("harvesting the held-out rows")
        return self._seal_heldout()

    def _require_files(self) -> None:
        """SaescaleError where cells are to be trained on rows of a server's files that were removed after use."""
        awaited = self._awaited() if self._awaited else None
        if not awaited or self._served is None or not files.exists(files.join(self.url, LIVE)):
            return
        source = open_source(self.url)
        assert isinstance(source, LiveSource)
        places = Places(self.url, "")
        begins = {cell: places.before(source.live.window_of(at.newest)) for cell, at in awaited.items()}
        first = {cell: begin.text if begin else 0 for cell, begin in begins.items()}
        if lacking := sorted(cell for cell, number in first.items() if number < self._served.removed):
            gone = self._served.path(first[lacking[0]])
            raise SaescaleError(
                f"live: {len(lacking)} of {len(awaited)} cells (such as {lacking[0]}) need hidden states that were "
                f"removed after use (remove_hidden_states): {gone} and those after it. Train these cells in a run of "
                "their own, on files that the server makes anew in another folder; and leave remove_hidden_states out "
                "of a sweep that is to be extended"
            )

    def _require_room_for_files(self) -> None:
        """SaescaleError where max_bytes cannot hold the server's files that will lie there at one time, so that the
        server would wait for room, and cells for rows, for ever."""
        if self._served is None or self._served.shape is None:
            return
        held, each = self.spec.heldout_tokens, self._served.shape.row_bytes
        if not self.spec.remove_hidden_states:
            of = "all train rows and the held-out ones; files that all cells have passed go with remove_hidden_states"
            self.room.require_files(self.spec.tokens + held, each, of)
        elif self._awaited is not None and not files.exists(files.join(self.url, LIVE)):
            first = min(SAMPLE_TOKENS, self.spec.tokens)
            of = "those on which cells measure their centre, before any file may go, and the held-out ones"
            self.room.require_files(first + held, each, of)

    def _seal_heldout(self) -> Live:
        """Makes the held-out rows from the first tokens of the corpus, then says what the source is."""
        reading = self._tokens.begin_heldout()
        heldout: list[ShardTokens] = []
        made: list[Made] = []

        def items() -> Iterator[Block | ShardJob | None]:
            given = 0
            while given < -(-self._harvest.heldout_tokens // self._harvest.shard_rows):
                if given < len(heldout):
                    yield ShardJob(heldout[given], self._plan)
                    given += 1
                else:
                    yield self._tokens.next_heldout()

        for result in self.crew.serve(items()):
            if isinstance(result, Made):
                made.append(result)
                continue
            self._tokens.counted(result)
            heldout += reading.assignment.next_shards("heldout")
        manifest = heldout_manifest(self._harvest, self._facts, reading.assignment.longest, made)
        if self._served is not None:
            length = reading.assignment.longest
            manifest = manifest.model_copy(update={"context_length": length, "contexts_cross_documents": False})
        self._tokens.end_heldout()
        return self._sealed_as(self._live(manifest))

    def _of_store(self) -> Live:
        """The folder is a finished store of the same harvest: all blocks are there, and stay."""
        store = ActivationStore.open(self.url)
        found = read_plan(self.spec.harvest(self.url, store.manifest.split_by == "content"))
        if found is None or store.rows("train") != self.spec.tokens:
            raise SaescaleError(f"{self.url} is a store that no harvest of this live source wrote; name another folder")
        self._plan = {key: value for key, value in found.items() if key != "tokens_xxh3"}
        self._sealed = True
        heldout = [shard for shard in store.manifest.shards if shard.split == "heldout"]
        return self._sealed_as(self._live(store.manifest.model_copy(update={"shards": heldout})))

    def _sealed_as(self, live: Live) -> Live:
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
        if (there := live.manifest.d_model) != (found := self._facts.d_model):
            raise SaescaleError(
                f"{self.url} holds a live source of width {there}, and {self.spec.hidden_states or self.spec.subject} "
                f"has rows of width {found}: of another model; give it a folder of its own"
            )
        return live

    @property
    def _blocks_of_pass(self) -> int:
        return -(-self.spec.tokens // self.spec.block_rows)

    # --- while somebody streams

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Makes blocks until `should_stop`. What it raises, consumers that wait for a block raise too."""
        if self._sealed:
            self._told.say(state="the whole store is there")
            while not should_stop() and not self._told.ended.wait(LOOK_S):
                pass
            return
        try:
            blocks = Blocks(self.url, self.room)
            for result in self.crew.serve(self._items(blocks, should_stop)):
                if not isinstance(result, Made):
                    self._tokens.counted(result)
                    continue
                again = blocks.made(result)
                if result.computed:
                    self._told.made(result, again)
        except BaseException as error:
            self._end(error)
            raise

    def clear(self) -> None:
        """Removes all blocks, and a server's files that may be removed: nobody needs them any more. The held-out rows
        stay."""
        if not self._sealed:
            self._tidy()
            for block in blocks_in(self.url):
                files.remove(files.join(self.url, name_of(block)))
        if self._served is not None and self.spec.remove_hidden_states:
            self._served.forget(self._served.count)

    def _items(self, blocks: Blocks, should_stop: Callable[[], bool]) -> Iterator[Block | ShardJob | None]:
        awaited = self._awaited_blocks if self.spec.remove_hidden_states else None
        needs = Needs(self.url, self._blocks_of_pass, self.room, awaited)
        while not should_stop():
            if needs.look():
                self._forget_served(needs)
                self._count_served()
                self._clean(blocks, needs)
                self._tell(blocks, needs)
            lacking = blocks.lacking(needs.wanted())
            yield self._next_job(blocks, needs, lacking) or self._tokens.next(lacking, blocks.making)

    def _awaited_blocks(self, away: Mapping[str, int]) -> Mapping[str, int] | None:
        """Of cells that are still to be trained the first block that each may ask for again; where nobody knows them,
        those of which a consumer was killed, as they are in `away`."""
        if self._awaited is None:
            return away
        awaited = self._awaited()
        if awaited is None:
            return None
        return {cell: self.live.window_of(goes_on.before) for cell, goes_on in awaited.items()}

    def _clean(self, blocks: Blocks, needs: Needs) -> None:
        """Removes what all have passed, and what there is no room for any more."""
        blocks.see()
        for block in blocks.present - needs.kept() - blocks.making:
            if needs.all_passed(block):
                blocks.remove(block)
        while len(blocks) > self.room.blocks and self._make_room(blocks, needs):
            pass
        self._tokens.forget(needs.passed % self._blocks_of_pass, blocks.making)

    def _forget_served(self, needs: Needs) -> None:
        """Removes the server's files that no block is made from any more, where it may."""
        if not self.spec.remove_hidden_states or self._served is None:
            return
        if needs.furthest is None or needs.furthest > self._blocks_of_pass:
            raise SaescaleError(
                f"live: remove_hidden_states removes files after one pass, and a cell trains on more than the "
                f"{self.spec.tokens:,} tokens of a pass; give it fewer tokens, or keep the files"
            )
        # A producer that begins again reads on from that place, and needs no file before it.
        if needs.held and (begin := self._places.before(needs.held)) is not None:
            self._served.forget(begin.text)

    def _count_served(self) -> None:
        """SaescaleError where a server's files leave no room for a window."""
        if self._served is not None:
            self.room.foreign = self._served.bytes()
            self._told.say(server_max_bytes=max(0, self.room.most_foreign))
        self.room.require()

    def _next_job(self, blocks: Blocks, needs: Needs, lacking: list[int]) -> ShardJob | None:
        """The next block to make, where there is room for it."""
        if not lacking or lacking[0] not in self._tokens.ready:
            return None
        if blocks.full and not self._make_room(blocks, needs):
            return None
        blocks.making.add(lacking[0])
        return ShardJob(self._tokens.ready[lacking[0]], self._plan)

    def _make_room(self, blocks: Blocks, needs: Needs) -> bool:
        return blocks.make_room(set(needs.wanted()), needs.need, self._blocks_of_pass)

    def _tell(self, blocks: Blocks, needs: Needs) -> None:
        if blocks.making:
            state = f"making block {min(blocks.making)}"
        elif any(block not in blocks.present for block in needs.wanted()):
            state = "reading the corpus" if self._served is None else "waiting for the server's next files"
        else:
            state = "waiting for the slowest consumer" if needs.living else "waiting for somebody to stream"
        if self.spec.remove_hidden_states and needs.living and needs.held < needs.passed:
            state += f"; files from block {needs.held} on are kept for cells whose worker is away"
        taken = len(blocks) * self.room.block + self._tokens.bytes + self.room.heldout + self.room.notes
        self._told.say(
            state=state, first=needs.first, blocks=len(blocks.present), bytes=taken + self.room.foreign,
            consumers=needs.living,
        )  # fmt: skip

    # --- what is left

    def _tidy(self) -> None:
        """Removes what killed producers left behind."""
        for name in files.list_names(self.url):
            if name.startswith(SPOOL_PREFIX) and not self.spool.rstrip("/").endswith(name):
                files.remove(files.join(self.url, name))
        for folder in ("", MADE, PLACES):
            files.remove_partials(files.join(self.url, folder) if folder else self.url)

    def _end(self, error: BaseException | None) -> None:
        if self._told.ended.is_set():
            return
        began = self._told.end(error)
        if not began and self._served is not None and not files.exists(files.join(self.url, PLAN)):
            self._served.unnamed()
        with suppress(SaescaleError):
            files.remove(self.spool)
        if not began and (local := files.local_path(self.url)) is not None:
            with suppress(OSError):
                os.removedirs(local)


@contextmanager
def live_here(spec: LiveSpec, url: str, cache: str | None = None) -> Iterator[LiveHarvest]:
    """A producer in a thread of this process, which needs no Ray; what it raises, those who stream raise."""
    spool, stop = files.join(url, SPOOL_PREFIX + uuid.uuid4().hex), threading.Event()
    served = None if spec.hidden_states is None else Served(spec.hidden_states, url, spec.remove_hidden_states)
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
