"""The producers of live sources on a Ray cluster: actors that harvest beside those that train."""

import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from saescale.cluster.crew.harvest import for_other_nodes
from saescale.cluster.crew.harvest_crew import HarvestCrew
from saescale.cluster.crew.head import nodes
from saescale.cluster.crew.shares import Shares, share_beside
from saescale.storage import files
from saescale.storage.errors import SaescaleWarning
from saescale.trainers.harvest.conduct import SPOOL_PREFIX
from saescale.trainers.harvest.contexts import block_file
from saescale.trainers.harvest.live import LiveHarvest
from saescale.trainers.harvest.live_needs import GoesOn
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.make_shard import Facts, ShardJob
from saescale.trainers.harvest.served import Served, ServedCrew
from saescale.trainers.harvest.spec import HarvestSpec


class LiveCrew(HarvestCrew):
    """Harvests until `over` is set, beside workers that train: it leaves them at least half of what there is."""

    def __init__(self, spec: LiveSpec, spool: str, address: str | None, over: threading.Event) -> None:
        super().__init__(spec.tokens, spool, spec.actors, address, lambda *_: None)
        self.over = over.is_set

    def load(self, specs: Sequence[HarvestSpec], computed_in: str) -> Facts:
        return super().load([for_other_nodes(spec) for spec in specs], computed_in)

    def _share_out(self, shards: int) -> Shares:
        return share_beside(nodes(), self._wanted, shards, spread=self._specs[0].device_map is not None)

    def _half_done(self, item: Any) -> None:
        """Its bytes are counted no more, so they go at once."""
        if isinstance(item, ShardJob):
            files.remove_partials(self._specs[0].out, of=item.tokens.name)
        else:
            files.remove_partials(self._spool, of=block_file("", item.block).strip("/"))

    @property
    def taken(self) -> dict[str, float]:
        """What its actors claim of the cluster together."""
        return {name: share * self._shares.actors for name, share in self.claim.items()}


@dataclass
class Producing:
    """`taken`: what the producers claim of the cluster; `done` is set when nobody needs their blocks any more."""

    taken: dict[str, float] = field(default_factory=dict)
    done: bool = False


@contextmanager
def producing(
    lives: Mapping[str, LiveSpec],
    address: str | None,
    say: Any,
    awaited: Callable[[str], Mapping[str, GoesOn] | None],
) -> Iterator[Producing]:
    """While the blocks of live sources, by their folders, are made: from when one can stream from all of them on.
    `awaited` says of a folder which cells are still to be trained from it (None: that is not known yet).

    Raises what LiveHarvest and HarvestCrew raise. What a producer meets later, those who wait for its blocks raise.
    """
    over = threading.Event()
    running: list[tuple[LiveHarvest, LiveCrew | ServedCrew, threading.Thread]] = []
    producing = Producing()
    try:
        for url, spec in lives.items():
            where = files.local_path(url) or url
            spool = files.join(where, SPOOL_PREFIX + uuid.uuid4().hex)
            served = None
            if spec.hidden_states is not None:
                served = Served(spec.hidden_states, where, spec.remove_hidden_states)
            crew: LiveCrew | ServedCrew
            if served is None:
                crew = LiveCrew(spec, spool, address, over)
            else:  # by this process: there is nothing to compute
                crew = ServedCrew(served, spec.hidden_states_index, spool)
            live = LiveHarvest(spec, where, crew, spool, say, served, partial(awaited, url))
            thread = threading.Thread(target=_run, args=(live, over), name="saescale-live-harvest", daemon=True)
            running.append((live, crew, thread))
            live.__enter__()
            thread.start()
            for name, share in crew.taken.items() if isinstance(crew, LiveCrew) and crew.claim else ():
                producing.taken[name] = producing.taken.get(name, 0.0) + share
        yield producing
    finally:
        over.set()
        for live, crew, thread in reversed(running):
            if thread.ident is not None:
                thread.join()
            if producing.done:
                live.clear()
            live.__exit__(None, None, None)
            if isinstance(crew, LiveCrew):
                crew.close()


def _run(live: LiveHarvest, over: threading.Event) -> None:
    try:
        live.run(over.is_set)
    except Exception as error:  # the packs say it, when they wait for a block
        warnings.warn(f"no more blocks of {live.url} are made: {error}", SaescaleWarning, stacklevel=2)
