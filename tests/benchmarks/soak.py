"""A sweep under random kills, beside the same sweep undisturbed: `make soak`, about 20 minutes.

On a Ray cluster of three nodes on this machine (each with a CPU and a fake GPU) one sweep is driven by `saescale sweep`
twice. The second time, at random moments, a worker's process, a whole node or the driver itself is killed by SIGKILL;
a node is replaced by a new one, the driver is started again. What is counted at the end: kills that were survived;
cells lost, and results, curves or weights that differ from the undisturbed run's, of which there must be none; steps
that were done twice, from what each killed worker or driver last said against the checkpoints that it left, so at least
as many; and the time.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.progress import Progress

from saescale.storage import checkpoint
from saescale.storage.files import exists
from saescale.storage.lease import Driver, read_driver
from saescale.storage.rundir import RunDirectory
from tests.benchmarks.harness import ROOT, BenchmarkError, console, machine, run, show_table, write_result
from tests.survival import reached
from tests.trainers.synthetic import sparse_rows, write_store

NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
WORKERS = 3
CHECKPOINT_S = 5.0
SHARE = {"worker": 0.6, "node": 0.2, "driver": 0.2}  # of the kills


def main() -> None:
    arguments = _arguments()
    where, draw = machine(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="saescale-") as folder:
        spec = _spec(folder, arguments.tokens)
        cluster = _cluster()
        try:
            console.print("undisturbed")
            calm = _Soak(cluster, spec | {"out": f"{folder}/calm"}, folder, draw, pause_s=None)
            calm.drive()
            console.print(f"took {calm.seconds:.0f} s; now under kills, {arguments.pause:.0f} s apart on average")
            wild = _Soak(cluster, spec | {"out": f"{folder}/wild"}, folder, draw, pause_s=arguments.pause)
            wild.drive()
        finally:
            import ray

            ray.shutdown()
            cluster.shutdown()
        outcome = _compare(calm, wild)
    rows = [[name.replace("_", " "), _shown(value)] for name, value in outcome.items()]
    show_table("A sweep under random kills", ["", ""], rows)
    settings = {"tokens": arguments.tokens, "seed": arguments.seed, "mean_pause_s": arguments.pause}
    path = write_result("soak", {"machine": where, **settings, "outcome": outcome}, arguments.out)
    console.print(f"wrote {os.path.relpath(path)}")
    if outcome["cells_lost"] or outcome["cells_changed"]:
        raise BenchmarkError("cells were lost or changed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=8_388_608, help="that each cell trains on (default: 8,388,608)")
    parser.add_argument("--pause", type=float, default=12.0, help="mean seconds between kills (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/soak.json)")
    return parser.parse_args()


def _spec(folder: str, tokens: int) -> dict[str, Any]:
    return {
        "name": "soak",
        "store": write_store(f"{folder}/store", sparse_rows(65_536, seed=0), sparse_rows(4_096, seed=1)),
        "grid": {"n_latents": [64, 128, 256, 512], "k": [2, 4, 8], "seed": [0, 1]},
        "train": {
            "tokens": tokens,
            "batch_tokens": 1_024,
            "lr": {"at": 64, "value": 3e-3},
            "auxk": {"k": 8, "dead_after_tokens": 65_536},
            "precision": "fp32",
        },
        "eval": {"tokens": 4_096, "every_tokens": tokens // 16},
        "resources": {"workers": WORKERS, "checkpoint_every_s": CHECKPOINT_S},
        "wandb": {"mode": "off"},
    }


def _cluster() -> Any:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    for _ in range(WORKERS - 1):
        cluster.add_node(**NODE)
    return cluster


class _Soak:
    """One sweep, driven until it is done; with `pause_s`, something is killed that many seconds apart on average."""

    def __init__(
        self, cluster: Any, spec: dict[str, Any], folder: str, draw: random.Random, pause_s: float | None
    ) -> None:
        self.cluster, self.spec, self.draw, self.pause_s = cluster, spec, draw, pause_s
        self.run = RunDirectory(spec["out"])
        self.kills: Counter[str] = Counter()
        self.steps_lost = 0
        self.seconds = 0.0
        self._file = Path(folder, "sweep.yaml")

    def drive(self) -> None:
        """Raises BenchmarkError where the driver ends by itself with an error."""
        self._file.write_text(yaml.safe_dump(self.spec))
        began = time.monotonic()
        due = self._next()
        driver = self._start()
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("cells", total=24)
            try:
                while driver.poll() is None:
                    time.sleep(0.1)
                    if (standing := read_driver(self.run.url)) is not None:
                        done = standing.standing.done
                        bar.update(task, completed=done, description=f"cells, {self.kills.total()} kills")
                    if time.monotonic() > due and self._kill(driver):
                        due = self._next()
                        if driver.poll() is not None:
                            driver = self._start()
            finally:
                driver.kill()
                driver.wait()
        self.seconds = time.monotonic() - began
        if driver.returncode:
            raise BenchmarkError(f"the driver ended with status {driver.returncode}: {self._said()}")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "saescale.cluster.cli", "sweep", str(self._file)]
        command += ["--address", self.cluster.address, "--bootstraps", "0"]
        with self._file.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def _said(self) -> str:
        return "\n".join(self._file.with_suffix(".log").read_text().splitlines()[-5:])

    def _next(self) -> float:
        if self.pause_s is None:
            return float("inf")
        return time.monotonic() + self.draw.expovariate(1 / self.pause_s)

    def _kill(self, driver: subprocess.Popen[bytes]) -> bool:
        """Kills something that is at work; False where nothing is yet."""
        found = read_driver(self.run.url)
        if found is None or not found.lives() or not found.standing.workers:
            return False
        kind = self.draw.choices(list(SHARE), list(SHARE.values()))[0]
        if kind == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            self._count_lost(found, {worker.name for worker in found.standing.workers})
        elif kind == "worker":
            worker = self.draw.choice(found.standing.workers).name
            try:
                os.kill(int(worker.split("/")[-1]), signal.SIGKILL)
            except ProcessLookupError:  # it ended since the driver last said so
                return False
            self._count_lost(found, {worker})
        else:
            node = self.draw.choice([node for node in self.cluster.list_all_nodes() if not node.head])
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            pids = {process.pid for process in raylet.children(recursive=True)}
            if not any(int(worker.name.split("/")[-1]) in pids for worker in found.standing.workers):
                return False  # nothing is trained there
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(**NODE)
            gone = {w.name for w in found.standing.workers if int(w.name.split("/")[-1]) in pids}
            self._count_lost(found, gone)
        self.kills[kind] += 1
        return True

    def _count_lost(self, found: Driver, workers: set[str]) -> None:
        """Steps that the cells of `workers` had done since the last checkpoint that all cells of their pack have; at
        least so many, since the driver tells every few seconds how far they are."""
        for worker in workers:
            cells = [cell for cell in found.standing.running if cell.worker == worker]
            cells = [cell for cell in cells if not exists(self.run.result_url(cell.cell_id))]
            kept = [set(checkpoint.steps(self.run.checkpoint_url(cell.cell_id))) for cell in cells]
            common = max(set.intersection(*kept), default=0) if kept else 0
            self.steps_lost += sum(max(0, cell.step - common) for cell in cells)


def _compare(calm: _Soak, wild: _Soak) -> dict[str, Any]:
    expected, found = reached(calm.run), reached(wild.run)
    wanted = {row["cell_id"]: row for row in expected["results"]}
    got = {row["cell_id"]: row for row in found["results"] if row["status"] == "done"}
    same = {
        cell_id
        for cell_id in got
        if got[cell_id] == wanted[cell_id]
        and found["weights"][cell_id] == expected["weights"][cell_id]
        and _curve(found, cell_id) == _curve(expected, cell_id)
    }
    steps = sum(row["tokens"] for row in wanted.values()) // calm.spec["train"]["batch_tokens"]
    return {
        "kills": dict(wild.kills),
        "kills_survived": wild.kills.total(),
        "cells": len(wanted),
        "cells_lost": len(wanted.keys() - got.keys()),
        "cells_changed": len(got) - len(same),
        "steps_done_twice": wild.steps_lost,
        "share_done_twice": wild.steps_lost / steps,
        "seconds_undisturbed": calm.seconds,
        "seconds_under_kills": wild.seconds,
        "overhead": wild.seconds / calm.seconds - 1,
    }


def _curve(outcome: dict[str, Any], cell_id: str) -> list[dict[str, Any]]:
    return [row for row in outcome["curves"] if row["cell_id"] == cell_id]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    run(main)
