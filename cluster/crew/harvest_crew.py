"""The crew that harvests: a subject in each actor, to which blocks of text and shards are handed out.

An actor may die at any moment. What it was doing goes to another one, and what it had half done is not there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import ray

from saescale.cluster.crew.connect import wanted_address
from saescale.cluster.crew.crew import Crew, Died, Words, back_off, take
from saescale.cluster.crew.harvest_worker import MARKER, ActorRow, ActorState, HarvestActor, Loaded
from saescale.cluster.crew.head import nodes
from saescale.cluster.crew.shares import Shares, share_out
from saescale.storage import files
from saescale.storage.errors import SaescaleError, Unavailable, one_line
from saescale.storage.waiting import SAY_AFTER_S, Wait, hear
from saescale.trainers.harvest.contexts import Block, Counted
from saescale.trainers.harvest.make_shard import Facts, Made, ShardJob
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import check_sites_before_loading

MAX_ATTEMPTS = 5  # of a block or shard, and of starting an actor
SHOW_S = 0.5  # between two looks at the actors at work, and that they get to answer
BACKOFF_S = (0.5, 30.0)  # after the first death, doubled after each further one, and at most

# Rows done, rows in all, tokens/s, what is being done, tokens/s of each actor at work.
ShowHarvest = Callable[[int, int, float, str, list[float]], None]


@dataclass
class _Actor:
    """What an actor did; `shards`, `rows` and `seconds` are of the shards that it computed."""

    number: int
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


class HarvestCrew(Crew[Loaded]):
    """The crew (trainers/harvest/conduct.py) of `actors` processes ("auto": one for each GPU, or for each node where
    there are none), each with one GPU where the cluster has them, else with its share of the CPU cores.

    `rows` are those of a store. It joins Ray, or starts one, when the subject is loaded, and is a context manager that
    ends what it started. Raises SaescaleError when Ray cannot be reached or has too few GPUs, when actors die again and
    again at one thing or in their start, and whatever SaescaleError an actor raises.
    """

    words = Words(
        again="an actor died while it started ({why}); another one is started",
        fewer="actors die while they start ({why}); the harvest goes on with fewer",
        one="an actor",
    )

    def __init__(self, rows: int, spool: str, actors: int | str, address: str | None, show: ShowHarvest) -> None:
        super().__init__(address)
        self._rows, self._spool, self._wanted = rows, spool, actors
        self._specs: list[HarvestSpec] = []
        self._progress = show
        self._did: dict[Any, _Actor] = {}  # of each actor that was ever started
        self._running: dict[Any, tuple[Any, _Task]] = {}
        self._retries: list[_Task] = []
        self._round = 0
        self._exhausted = False
        self.over: Callable[[], bool] = lambda: False  # whether to leave what is under way
        self._computed_in = "auto"
        self._first: Loaded | None = None
        self._stage = ""
        self._done = 0  # rows of finished shards
        self._shown_at = time.monotonic()
        self._moved = (0, time.time())  # rows, and since when there are no more

    # --- what a harvest asks of its crew

    def load(self, specs: Sequence[HarvestSpec], computed_in: str) -> Facts:
        """Starts the actors; returns when one is up, and the others join when they are."""
        self._specs, spec = list(specs), specs[0]
        if not ray.is_initialized() and wanted_address(self._address) is None:  # a Ray of this machine alone
            layers = [each.layer for each in specs]
            check_sites_before_loading(
                spec.subject, layers, spec.context_length, trust_remote_code=spec.trust_remote_code
            )
        self.connect()
        shards = -(-spec.tokens // spec.shard_rows) - (-spec.heldout_tokens // spec.shard_rows)
        self._shares = self._share_out(shards)
        self.claim = {"CPU": self._shares.cpus, "GPU": float(self._shares.gpus)}
        self._computed_in = computed_in
        files.write_atomic(files.join(self._spool, MARKER), b"")
        self.say(f"starting actors: {self._shares.actors}")
        for _ in range(self._shares.actors):
            self.start()
        while self._first is None:
            self.watch(())
        return self._first.facts

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[Counted]:
        return self._each(blocks)

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[Made]:
        self.say("harvesting")
        return self._each(jobs)

    def serve(self, items: Iterator[Block | ShardJob | None]) -> Iterator[Counted | Made]:
        return self._each(items)

    def say(self, stage: str) -> None:
        """Tells what begins."""
        self._stage = stage
        self._tell(0, [])

    def rows(self) -> list[ActorRow]:
        """What each actor did that computed a shard."""
        return [
            ActorRow(did.number, did.node, did.shards, did.rows, did.rows / did.seconds)
            for did in self._did.values()
            if did.shards
        ]

    # --- what its actors are

    def _share_out(self, shards: int) -> Shares:
        """How many there are, and what each has."""
        return share_out(nodes(), self._wanted, shards, spread=self._specs[0].device_map is not None)

    def _create(self) -> tuple[Any, Any]:
        shares = self._shares
        # Two threads: one works, the other answers state.
        options: dict[str, Any] = {"num_cpus": shares.cpus, "num_gpus": shares.gpus, "max_concurrency": 2}
        actor = self._actor(HarvestActor, options, self._specs, self._spool, shares.threads)
        self._did[actor] = _Actor(len(self._did) + 1)
        return actor, actor.load.remote(self._computed_in)

    def _most_starts(self) -> int:
        return MAX_ATTEMPTS

    def _pause(self, failures: int) -> float:
        return back_off(failures, *BACKOFF_S)

    def _nobody(self, why: str) -> SaescaleError:
        return SaescaleError(
            f"{MAX_ATTEMPTS} actors in a row died while they started: {why}; if it is memory that is missing use fewer "
            "(--actors), then run the same command again"
        )

    def _joined(self, actor: Any, info: Loaded) -> None:
        first = self._first = self._first or info
        self._computed_in = first.facts.computed_in
        if info.facts.computed_in != self._computed_in:  # "auto" came to something else here
            self.starting[actor.load.remote(self._computed_in)] = actor
            return
        differing = [
            f"{name} is {here!r} there, {there!r} on {first.node}"
            for name, here, there in zip(Facts._fields, info.facts, first.facts, strict=True)
            if here != there
        ]
        if differing:
            raise SaescaleError(
                f"the node {info.node} would make other shards: {'; '.join(differing)}; give all nodes the same "
                "subject and packages"
            )
        self._did[actor].node = info.node
        super()._joined(actor, info)

    # --- handing out

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        """What the actors give for each item, in the order of the items: a shard is made, a block tokenized."""
        self._round += 1
        self._retries = []
        self._exhausted = False
        fresh = self._tasks(items)
        results: dict[int, Any] = {}
        for expected in count():
            while expected not in results:
                while self.idle and (task := self._next(fresh)) is not None:
                    actor = self.idle.pop(0)
                    method = actor.make if isinstance(task.item, ShardJob) else actor.tokenize
                    self._running[method.remote(task.number, task.item)] = actor, task
                if self.over():
                    return
                busy = any(task.round == self._round for _, task in self._running.values())
                if self.idle and self._exhausted and not busy and not self._retries:
                    return  # an actor is free and there is nothing to do
                results.update(self._ended())
            yield results.pop(expected)

    def _tasks(self, items: Iterator[Any]) -> Iterator[_Task | None]:
        """Where an item is None there is nothing to do for now."""
        numbers = count()
        for item in items:
            yield None if item is None else _Task(self._round, next(numbers), item)
        self._exhausted = True

    def _next(self, fresh: Iterator[_Task | None]) -> _Task | None:
        now = time.monotonic()
        for task in self._retries:
            if task.not_before <= now:
                self._retries.remove(task)
                return task
        return next(fresh, None)

    def _ended(self) -> dict[int, Any]:
        """Waits a little for something to happen; what the round's tasks gave meanwhile, by their number."""
        results = {}
        for reference in self.watch(self._running):
            results.update(self._finish(reference))
        self._show()
        return results

    def _finish(self, reference: Any) -> dict[int, Any]:
        actor, task = self._running.pop(reference)
        did = self._did[actor]
        try:
            result = take(reference)
        except Died as died:
            self.lost(actor, died.__cause__)
            self.start_later(back_off(task.attempt, *BACKOFF_S))
            self._half_done(task.item)
            self._again(task, f"an actor on {did.node} died", died)
            return {}
        except Unavailable as error:
            self.idle.append(actor)
            self._again(task, "a store did not answer", error)
            return {}
        self.idle.append(actor)
        if task.round != self._round:
            return {}  # a block that turned out not to be needed
        if isinstance(result, Made):
            self._done += result.rows
            if result.computed:
                did.shards += result.computed
                did.rows += result.rows
                did.seconds += result.seconds
        return {task.number: result}

    def _half_done(self, item: Any) -> None:
        """An actor died at it. What it had half written is removed with the next harvest."""

    def _again(self, task: _Task, what: str, error: Exception) -> None:
        if task.round != self._round:
            return
        item = task.item.tokens.name if isinstance(task.item, ShardJob) else f"block {task.number} of the text"
        if task.attempt >= MAX_ATTEMPTS:
            raise SaescaleError(
                f"{what} {MAX_ATTEMPTS} times at {item}: {one_line(error)}; if it is memory that is missing use fewer "
                "actors (--actors); run the same command again to go on from the shards that are there"
            ) from error
        self.warn(f"{what} at {item}, which is tried again")
        self._retries.append(
            task._replace(attempt=task.attempt + 1, not_before=time.monotonic() + back_off(task.attempt, *BACKOFF_S))
        )

    # --- what is told

    def _show(self) -> None:
        """Asks the actors at work where they are; of one that does not answer at once, what it last said counts."""
        if time.monotonic() - self._shown_at < SHOW_S:
            return
        self._shown_at = time.monotonic()
        making = {actor: task for actor, task in self._running.values() if isinstance(task.item, ShardJob)}
        if not making:
            return
        asked = {actor.state.remote(): self._did[actor] for actor in making}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=SHOW_S)
        for answer in ready:
            try:
                asked[answer].state = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # it just died: its task will say so
        states = {actor: self._did[actor].state for actor in making}
        rows = sum(state.rows for actor, state in states.items() if state.task == making[actor].number)
        self._say_waits(self._done + rows, [wait for state in states.values() for wait in state.waits])
        self._tell(rows, [state.tokens_per_s for state in states.values() if state.tokens_per_s])

    def _say_waits(self, rows: int, found: list[Wait]) -> None:
        """What the actors wait for, as they say; where they say nothing and no row is done, that."""
        reached, since = self._moved
        if rows != reached:
            self._moved = rows, time.time()
        elif not found and time.time() - since > SAY_AFTER_S:
            found = [Wait("the actors to get a batch done", since)]
        hear("harvest", found)

    def close(self) -> None:
        hear("harvest", [])
        super().close()

    def _tell(self, running_rows: int, rates: list[float]) -> None:
        self._progress(self._done + running_rows, self._rows, sum(rates), self._stage, rates)
