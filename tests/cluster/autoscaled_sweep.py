"""A sweep on a cluster that an autoscaler grows: python -m tests.cluster.autoscaled_sweep SWEEP.yaml ADDRESS NODES

In a process of its own, since that of the tests has joined another cluster. Stops the sweep as soon as NODES nodes have
a worker at the same time, waits until all are gone, and prints as JSON how many nodes had one at most, how many there
were then, and how many are left.
"""

import contextlib
import json
import sys
import time
from typing import Any

import ray

from saescale.cluster.sweep import execute
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import load_spec
from saescale.storage.lease import Standing

PATIENCE_S = 60.0


class Watching:
    """A display that ends the sweep when enough nodes train."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.most, self.nodes = wanted, 0, 0

    def stage(self, text: str) -> None: ...

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None: ...

    def sweep(self, standing: Standing) -> None:
        training = len(standing.running)
        if training > self.most:
            self.most, self.nodes = training, with_gpu()
        if training >= self.wanted:
            raise KeyboardInterrupt


def with_gpu() -> int:
    return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())


def main(sweep: str, address: str, wanted: int) -> dict[str, Any]:
    execute.LOOK_S = 1.0
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    before, display = with_gpu(), Watching(wanted)
    with contextlib.suppress(KeyboardInterrupt):
        run_sweep(load_spec(sweep), display, address)
    until = time.monotonic() + PATIENCE_S
    while with_gpu() and time.monotonic() < until:
        time.sleep(0.5)
    return {"before": before, "training": display.most, "nodes": display.nodes, "after": with_gpu()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
