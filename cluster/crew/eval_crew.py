"""The crew that evaluates: a loaded subject in each actor, to which pairs of cell and evaluation are handed out.

An actor may die at any moment. What it was doing goes to another one; what it had done is with the driver already.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from saescale.cluster.crew.crew import Crew, Died, Words, back_off, take
from saescale.cluster.crew.eval_worker import EvalActor, Evaluator
from saescale.cluster.crew.head import nodes
from saescale.cluster.crew.shares import share_out
from saescale.storage.errors import SaescaleError
from saescale.storage.files import local_path
from saescale.storage.waiting import Wait, hear
from saescale.trainers.evals.bench import Measured
from saescale.trainers.evals.plan import Pair

MAX_ATTEMPTS = 3  # at one pair
MAX_STARTS = 5  # that fail one after another
BACKOFF_S = (0.5, 30.0)  # after the first death, doubled after each further one, and at most
SHOW_S = 1.0  # between two looks at what actors wait for


class EvalCrew(Crew[Evaluator]):
    """`actors` processes ("auto": one for each GPU, or for each node where there are none, no more than `pairs`), each
    with one GPU where the cluster has them (`spread`: with as many of a node as all can have), else with its share of
    the CPU cores.

    A context manager that ends what it started. Raises SaescaleError when Ray cannot be reached or has too few GPUs,
    and when actors die again and again in their start.
    """

    words = Words(
        again="an actor died while it started ({why}); another one is started",
        fewer="actors die while they start ({why}); the evaluations go on with fewer",
        one="an actor",
    )

    def __init__(
        self,
        run: str,
        pairs: int,
        actors: int | str,
        address: str | None,
        trust_remote_code: bool = False,
        architectures: Mapping[str, str] | None = None,
        device_map: str | None = None,
        spread: bool = False,
    ) -> None:
        super().__init__(address)
        self._run = local_path(run) or run  # a relative path would mean another folder in an actor
        self._trusted, self._architectures = trust_remote_code, dict(architectures or {})
        self._device_map = device_map
        self._running: dict[Any, tuple[Any, Pair]] = {}
        self._deaths: dict[Pair, int] = {}
        self._shown_at = time.monotonic()
        try:
            self.connect()
            self._shares = share_out(nodes(), actors, pairs, spread)
            self.claim = {"CPU": self._shares.cpus, "GPU": float(self._shares.gpus)}
            for _ in range(self._shares.actors):
                self.start()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many measure side by side when all are up."""
        return self._shares.actors

    def measure(self, pairs: Sequence[Pair]) -> Iterator[Measured]:
        """Each pair once, as they are done."""
        waiting = deque(pairs)
        while waiting or self._running:
            while waiting and self.idle:
                actor, pair = self.idle.pop(0), waiting.popleft()
                self._running[actor.measure.remote(pair)] = actor, pair
            for reference in self.watch(self._running):
                if (done := self._finish(reference, waiting)) is not None:
                    yield done
            self._look()

    def _finish(self, reference: Any, waiting: deque[Pair]) -> Measured | None:
        actor, pair = self._running.pop(reference)
        try:
            done: Measured = take(reference)
        except Died as died:
            self.lost(actor, died.__cause__)
            deaths = self._deaths[pair] = self._deaths.get(pair, 0) + 1
            self.start_later(back_off(deaths, *BACKOFF_S))
            if deaths >= MAX_ATTEMPTS:
                why = f"the process that measured it died {deaths} times: {died}; if it is memory, use fewer (--actors)"
                return Measured(pair, [], why, 0.0, 0.0)
            self.warn(f"an actor died at {pair.evaluation} of {pair.cell}, which is tried again")
            waiting.append(pair)
            return None
        self.idle.append(actor)
        return done

    def _look(self) -> None:
        """What the actors at work wait for; and replaces those whose node is gone."""
        if time.monotonic() - self._shown_at < SHOW_S:
            return
        self._shown_at = time.monotonic()
        self.replace_stranded()
        asked = [actor.waits.remote() for actor, _ in self._running.values()]
        found: list[Wait] = []
        for answer in ray.wait(asked, num_returns=len(asked), timeout=SHOW_S)[0] if asked else []:
            try:
                found += ray.get(answer)
            except ray.exceptions.RayError:
                continue  # it just died: its pair will say so
        hear("evaluations", found)

    def close(self) -> None:
        hear("evaluations", [])
        super().close()

    # --- what its actors are

    def _create(self) -> tuple[Any, Any]:
        # Two threads: one works, the other answers what is waited for.
        options = {"num_cpus": self._shares.cpus, "num_gpus": self._shares.gpus, "max_concurrency": 2}
        arguments = (self._run, self._shares.threads, self._trusted, self._architectures, self._device_map)
        actor = self._actor(EvalActor, options, *arguments)
        return actor, actor.open.remote()

    def _most_starts(self) -> int:
        return MAX_STARTS

    def _pause(self, failures: int) -> float:
        return back_off(failures, *BACKOFF_S)

    def _nobody(self, why: str) -> SaescaleError:
        return SaescaleError(
            f"{MAX_STARTS} actors in a row died while they started: {why}; if it is memory that is missing use fewer "
            "(--actors), then run the same command again"
        )
