"""What an actor of evaluations runs: one bench, with its subject, that measures one pair at a time."""

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

import ray

from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists, join
from saescale.storage.rundir import SPEC, RunDirectory
from saescale.storage.waiting import Wait, waits
from saescale.trainers.architectures.own import take
from saescale.trainers.device import set_threads
from saescale.trainers.evals.bench import Bench, Measured
from saescale.trainers.evals.plan import Pair


class Evaluator(NamedTuple):
    """Where an actor is."""

    node: str
    node_id: str  # Ray's, hex
    pid: int


class EvalActor:
    """Runs in a process of its own; `waits` answers while it works. `architectures`: of the user's own, the text of
    their files."""

    def __init__(
        self,
        run: str,
        threads: int,
        trust_remote_code: bool,
        architectures: Mapping[str, str],
        device_map: str | None,
    ) -> None:
        take(architectures)
        self._run, self._threads, self._trusted, self._device_map = run, threads, trust_remote_code, device_map

    def open(self) -> Evaluator:
        """Opens the stores. SaescaleError names the node that does not see the run or its stores."""
        node = socket.gethostname()
        if not exists(join(self._run, SPEC)):
            raise SaescaleError(
                f"the node {node} does not see the run directory {self._run}; "
                "give a folder that all nodes share, or an object store (s3://...)"
            )
        try:
            self._bench = Bench(RunDirectory(self._run), trust_remote_code=self._trusted, device_map=self._device_map)
        except SaescaleError as error:
            raise SaescaleError(f"on the node {node}: {error}") from error
        return Evaluator(node, ray.get_runtime_context().get_node_id(), os.getpid())

    def measure(self, pair: Pair) -> Measured:
        """`Bench.measure`."""
        set_threads(self._threads)  # of this thread: Ray has another one for each call that it runs at a time
        return self._bench.measure(pair)

    def waits(self) -> tuple[Wait, ...]:
        return tuple(waits())
