"""Ray actors that harvest: a subject in each, to which blocks of text and shards are handed out.

An actor may die at any moment. What it was doing goes to another one, and what it had half done is not there.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, NamedTuple

import ray
from saescale.cluster.crew.connect import connect
from saescale.cluster.crew.harvest_worker import MARKER, ActorState, HarvestActor, Loaded
from saescale.cluster.crew.shares import share_out
from saescale.cluster.front.display import ActorRow
from saescale.storage import files
from saescale.storage.errors import SaescaleError, SaescaleWarning, Unavailable, one_line
from saescale.trainers.harvest.contexts import Counted, Texts
from saescale.trainers.harvest.make_shard import Facts, ShardJob, ShardRecord
from saescale.trainers.harvest.spec import HarvestSpec

MAX_ATTEMPTS = 5  # of a block or shard, and of starting an actor
BACKOFF_S = (0.5, 30.0)  # after the first death, doubled after each further one, and at most
POLL_S = 0.5
PATIENCE_S = 60.0  # until an actor that does not come up is mentioned

# Rows done, rows in all, tokens/s, what is being done, tokens/s of each actor at work.
Progress = Callable[[int, int, float, str, list[float]], None]


@dataclass
class _Actor:
    """What the driver knows of an actor; `shards`, `rows` and `seconds` are of the shards that it computed."""

    number: int
    handle: Any
    node: str = ""
    shards: int = 0
    rows: int = 0
    seconds: float = 0.0
    state: ActorState = field(default_factory=lambda: ActorState(-1, 0, 0.0))


class _Task(NamedTuple):
    """An item of the round `round`: `number` counts from 0 in it."""

    round: int
    number: int
    item: Any
    attempt: int = 1
    not_before: float = 0.0


class _Died(Exception):
    """An actor is gone, or what it gave is."""


class Actors:
    """The crew (trainers/harvest/conduct.py) of `actors` processes ("auto": one for each GPU, or for each node where
    there are none), each with one GPU where the cluster has them, else with its share of the CPU cores.

    It joins Ray, or starts one, when the subject is loaded, and is a context manager that ends what it started. Raises
    SaescaleError when Ray cannot be reached or has too few GPUs, when actors die again and again at one thing or in
    their start, and whatever SaescaleError an actor raises.
    """

    def __init__(
        self, spec: HarvestSpec, spool: str, actors: int | str, address: str | None, progress: Progress
    ) -> None:
        self._spec, self._spool, self._wanted, self._address = spec, spool, actors, address
        self._progress = progress
        self._owns_ray = False
        self._actors: list[_Actor] = []
        self._starting: dict[Any, _Actor] = {}  # reference of load() -> actor
        self._idle: deque[_Actor] = deque()
        self._running: dict[Any, tuple[_Actor, _Task]] = {}
        self._due: list[float] = []  # when replacements are to be started
        self._retries: list[_Task] = []
        self._round = 0
        self._failed_starts = 0  # since an actor last came up
        self._computed_in = "auto"
        self._first: Loaded | None = None
        self._stage = ""
        self._done = 0  # rows of finished shards
        self._alive_at = self._shown_at = time.monotonic()

    # --- the crew

    def load(self, computed_in: str) -> Facts:
        """Starts the actors; returns when one is up, and the others join when they are."""
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            connect(self._address)
        self._share_out()
        self._computed_in = computed_in
        files.write_atomic(files.join(self._spool, MARKER), b"")
        self.say(f"starting actors: {self._shares.actors}")
        for _ in range(self._shares.actors):
            self._start()
        while self._first is None:
            self._watch()
        return self._first.facts

    def tokenize(self, blocks: Iterator[Texts]) -> Iterator[Counted]:
        return self._each("tokenize", blocks)

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[ShardRecord]:
        self.say("harvesting")
        return self._each("make", jobs)

    def say(self, stage: str) -> None:
        """Tells `progress` what begins."""
        self._stage = stage
        self._tell(0, [])

    def rows(self) -> list[ActorRow]:
        """What each actor did that computed a shard."""
        return [
            ActorRow(actor.number, actor.node, actor.shards, actor.rows, actor.rows / actor.seconds)
            for actor in self._actors
            if actor.shards
        ]

    # --- starting and ending them

    def _share_out(self) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        spec = self._spec
        shards = -(-spec.tokens // spec.shard_rows) - (-spec.heldout_tokens // spec.shard_rows)
        self._shares = share_out(nodes, self._wanted, shards)

    def _start(self) -> None:
        shares = self._shares
        # Two threads: one works, the other answers state.
        options = {"num_cpus": shares.cpus, "num_gpus": shares.gpus, "max_concurrency": 2}
        handle: Any = ray.remote(HarvestActor).options(**options).remote(self._spec, self._spool, shares.threads)
        actor = _Actor(len(self._actors) + 1, handle)
        self._actors.append(actor)
        self._starting[handle.load.remote(self._computed_in)] = actor

    def _join(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            loaded: Loaded = _take(reference)
        except _Died as died:
            self._failed_starts += 1
            if self._failed_starts < MAX_ATTEMPTS:
                self._warn(f"an actor died while it started ({died}); another one is started")
                self._replace(self._failed_starts)
            elif self._idle or self._running or self._starting:
                self._warn(f"actors die while they start ({died}); the harvest goes on with fewer")
            else:
                raise SaescaleError(
                    f"{MAX_ATTEMPTS} actors in a row died while they started: {died}; if it is memory that is missing "
                    "use fewer (--actors), then run the same command again"
                ) from died
            return
        self._failed_starts = 0
        first = self._first = self._first or loaded
        self._computed_in = first.facts.computed_in
        if loaded.facts.computed_in != self._computed_in:  # "auto" came to something else here
            self._starting[actor.handle.load.remote(self._computed_in)] = actor
            return
        differing = [
            f"{name} is {here!r} there, {there!r} on {first.node}"
            for name, here, there in zip(Facts._fields, loaded.facts, first.facts, strict=True)
            if here != there
        ]
        if differing:
            raise SaescaleError(
                f"the node {loaded.node} would make other shards: {'; '.join(differing)}; give all nodes the same "
                "subject and packages"
            )
        actor.node = loaded.node
        self._idle.append(actor)

    def _replace(self, attempt: int) -> None:
        self._due.append(time.monotonic() + _backoff(attempt))

    def __enter__(self) -> "Actors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor.handle)
            if self._owns_ray:
                ray.shutdown()

    # --- handing out

    def _each(self, method: str, items: Iterator[Any]) -> Iterator[Any]:
        """What the actors' `method` gives for each item, in the order of the items."""
        self._round += 1
        self._retries = []
        fresh = (_Task(self._round, number, item) for number, item in enumerate(items))
        results: dict[int, Any] = {}
        for expected in count():
            while expected not in results:
                while self._idle and (task := self._next(fresh)) is not None:
                    actor = self._idle.popleft()
                    self._running[getattr(actor.handle, method).remote(task.number, task.item)] = actor, task
                busy = any(task.round == self._round for _, task in self._running.values())
                if self._idle and not busy and not self._retries:
                    return  # an actor is free and there is nothing to do
                results.update(self._watch())
            yield results.pop(expected)

    def _next(self, fresh: Iterator[_Task]) -> _Task | None:
        now = time.monotonic()
        for task in self._retries:
            if task.not_before <= now:
                self._retries.remove(task)
                return task
        return next(fresh, None)

    def _watch(self) -> dict[int, Any]:
        """Waits a little for something to happen; what the round's tasks gave meanwhile, by their number."""
        now = time.monotonic()
        for due in [due for due in self._due if due <= now]:
            self._due.remove(due)
            self._start()
        waited = [*self._running, *self._starting]
        ready, _ = ray.wait(waited, num_returns=1, timeout=POLL_S) if waited else ([], [])
        if not waited:
            time.sleep(POLL_S)
        results = {}
        for reference in ready:
            if reference in self._starting:
                self._join(reference)
            else:
                results.update(self._finish(reference))
        if self._running or self._idle:
            self._alive_at = now
        elif now - self._alive_at > PATIENCE_S:
            self._warn("no actor comes up: the cluster has no free CPUs or GPUs for one (`ray status`); still waiting")
        self._show()
        return results

    def _finish(self, reference: Any) -> dict[int, Any]:
        actor, task = self._running.pop(reference)
        try:
            result = _take(reference)
        except _Died as died:
            ray.kill(actor.handle)  # it may be out of reach only
            self._replace(task.attempt)
            self._again(task, f"an actor on {actor.node} died", died)
            return {}
        except Unavailable as error:
            self._idle.append(actor)
            self._again(task, "a store did not answer", error)
            return {}
        self._idle.append(actor)
        if task.round != self._round:
            return {}  # a block that turned out not to be needed
        if isinstance(result, ShardRecord):
            self._done += result.shard.rows
            if result.seconds is not None:
                actor.shards += 1
                actor.rows += result.shard.rows
                actor.seconds += result.seconds
        return {task.number: result}

    def _again(self, task: _Task, what: str, error: Exception) -> None:
        if task.round != self._round:
            return
        item = task.item.tokens.name if isinstance(task.item, ShardJob) else f"block {task.number} of the text"
        if task.attempt >= MAX_ATTEMPTS:
            raise SaescaleError(
                f"{what} {MAX_ATTEMPTS} times at {item}: {one_line(error)}; if it is memory that is missing use fewer "
                "actors (--actors); run the same command again to go on from the shards that are there"
            ) from error
        self._warn(f"{what} at {item}, which is tried again")
        self._retries.append(
            task._replace(attempt=task.attempt + 1, not_before=time.monotonic() + _backoff(task.attempt))
        )

    # --- what is told

    def _show(self) -> None:
        """Asks the actors at work where they are; of one that does not answer at once, what it last said counts."""
        if time.monotonic() - self._shown_at < POLL_S:
            return
        self._shown_at = time.monotonic()
        making = [(actor, task) for actor, task in self._running.values() if isinstance(task.item, ShardJob)]
        if not making:
            return
        asked = {actor.handle.state.remote(): actor for actor, _ in making}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_S)
        for answer in ready:
            try:
                asked[answer].state = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # it just died: its task will say so
        rows = sum(actor.state.rows for actor, task in making if actor.state.task == task.number)
        self._tell(rows, [actor.state.tokens_per_s for actor, _ in making if actor.state.tokens_per_s])

    def _tell(self, running_rows: int, rates: list[float]) -> None:
        total = self._spec.tokens + self._spec.heldout_tokens
        self._progress(self._done + running_rows, total, sum(rates), self._stage, rates)

    def _warn(self, text: str) -> None:
        warnings.warn(text, SaescaleWarning, stacklevel=3)


def _backoff(attempt: int) -> float:
    first, most = BACKOFF_S
    return float(min(most, first * 2 ** (attempt - 1)))


def _take(reference: Any) -> Any:
    """What an actor gave or raised; `_Died` when it could not."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, SaescaleError) else error)
    except ray.exceptions.RayError as error:
        said = one_line(error)
        # Ray's own account of it stands behind a page of identifiers.
        raise _Died(said[max(0, said.find("The actor is dead because")) :][:200]) from error
