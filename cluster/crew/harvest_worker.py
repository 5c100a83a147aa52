"""What an actor of a harvest runs: one loaded subject that tokenizes blocks and makes shards."""

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import ray

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.waiting import Wait, waits
from saescale.trainers.device import set_threads
from saescale.trainers.harvest.conduct import Meter
from saescale.trainers.harvest.contexts import Block, Counted
from saescale.trainers.harvest.make_shard import Facts, Harvester, Made, ShardJob
from saescale.trainers.harvest.spec import HarvestSpec

MARKER = "here"  # a file that the driver puts into the spool: a node that lacks it sees another folder


class Loaded(NamedTuple):
    """Where an actor is, and what its subject is."""

    node: str
    facts: Facts
    node_id: str  # Ray's, hex
    pid: int


class ActorRow(NamedTuple):
    """What an actor of a harvest computed: shards of all stores, and contexts' rows, each once for all layers, also a
    second meanwhile, reading and writing included."""

    actor: int
    node: str
    shards: int
    rows: int
    tokens_per_s: float


class ActorState(NamedTuple):
    """How far an actor is with its task number `task`: rows done of it; tokens/s since the actor's first batch; what it
    has waited for since some seconds."""

    task: int
    rows: int
    tokens_per_s: float
    waits: tuple[Wait, ...] = ()


class HarvestActor:
    """Runs in a process of its own; `state` answers while it works."""

    def __init__(self, specs: Sequence[HarvestSpec], spool: str, threads: int) -> None:
        self._specs, self._spool, self._threads = specs, spool, threads
        self._meter = Meter(total=0)
        self._task, self._before = -1, 0

    def load(self, computed_in: str) -> Loaded:
        """Loads the subject. SaescaleError names the node that lacks it, or does not see the store's folder."""
        node = socket.gethostname()
        set_threads(self._threads)
        if not files.exists(files.join(self._spool, MARKER)):
            raise SaescaleError(
                f"the node {node} does not see the store's folder {self._specs[0].out}; "
                "give a folder that all nodes share, or an object store (s3://...)"
            )
        try:
            self._harvester = Harvester(self._specs, self._spool, computed_in)
        except SaescaleError as error:
            raise SaescaleError(f"on the node {node}: {error}") from error
        return Loaded(node, self._harvester.facts, ray.get_runtime_context().get_node_id(), os.getpid())

    def tokenize(self, task: int, block: Block) -> Counted:
        """`Harvester.tokenize`."""
        return self._harvester.tokenize(block)

    def make(self, task: int, job: ShardJob) -> Made:
        """`Harvester.make`."""
        set_threads(self._threads)  # of this thread: Ray has another one for each call that it runs at a time
        self._task, self._before = task, self._meter.done
        return self._harvester.make(job, self._meter.tell)

    def state(self) -> ActorState:
        return ActorState(self._task, self._meter.done - self._before, self._meter.rate, tuple(waits()))
