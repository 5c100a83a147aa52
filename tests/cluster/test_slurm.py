"""The Slurm script, submitted to a real Slurm of two nodes on this machine."""

import glob
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saescale.storage.lease import RunningCell, read_driver
from saescale.storage.rundir import RunDirectory
from tests.cluster.command import ROOT
from tests.cluster.slurm import NODES, Slurm, require_slurm, running_slurm


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    require_slurm()
    with running_slurm() as slurm:
        yield slurm


class Jobs:
    """Of one sweep, submitted as the page says. What they print is in `said`."""

    def __init__(self, slurm: Slurm, sweep: str, run: str, folder: Path) -> None:
        self.slurm, self.sweep, self.run, self.said = slurm, sweep, run, folder / "said"

    def submit(self) -> str:
        given = f"--export=ALL,SAESCALE_VENV={self.slurm.folder}/venv,RAY_object_store_memory={80 * 2**20}"
        small = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=4000")
        script = str(ROOT / "deploy" / "slurm.sh")
        return self.slurm.call(
            "sbatch", "--parsable", *small, given, f"--output={self.said}", script, self.sweep
        ).strip()  # fmt: skip

    def until(self, job: str, wanted: Callable[[], Any], what: str, patience: float = 240) -> None:
        end = time.monotonic() + patience
        while not wanted():
            assert time.monotonic() < end, f"{what}: {self.slurm.state(job)} {self.said.read_text()}"
            time.sleep(0.25)

    def ended(self, job: str) -> str:
        """The state of a job that has ended."""
        self.until(job, lambda: self.slurm.state(job) not in ("RUNNING", "COMPLETING", "PENDING"), "not ended")
        return self.slurm.state(job)

    def training(self, job: str) -> dict[str, int]:
        """The step of each cell, as soon as two workers train."""
        found: list[RunningCell] = []

        def two() -> bool:
            driver = read_driver(self.run)
            drives = driver is not None and driver.state == "running"
            found[:] = [cell for cell in driver.standing.running if cell.step > 0] if driver and drives else []
            return len({cell.worker for cell in found}) == 2

        self.until(job, two, "two workers")
        return {cell.cell_id: cell.step for cell in found}


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_and_outlives_a_node(
    slurm: Slurm, document: dict[str, Any], sweep_file: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    document["grid"] = {"n_latents": [64], "k": [4]}
    document["train"] |= {"tokens": 16_384 * 200, "batch_tokens": [256, 512]}
    document["eval"]["every_tokens"] = 16_384 * 20
    document["resources"] = {"workers": 2, "gpus_per_worker": 1, "checkpoint_every_s": 600.0}
    jobs = Jobs(slurm, sweep_file(document), document["out"], tmp_path)

    # Both nodes train; the signal that comes before the time is up saves, and nothing is left on either.
    first = jobs.submit()
    jobs.training(first)
    signalled = time.time()
    slurm.call("scancel", "--batch", "--signal=TERM", first)
    assert jobs.ended(first) == "FAILED"
    files = list(Path(jobs.run).glob("cells/*/checkpoint/latest-*.json"))
    assert len(files) == 2
    assert all(path.stat().st_mtime >= signalled for path in files)
    saved = {path.parts[-3]: json.loads(path.read_text())["generations"][-1]["step"] for path in files}
    jobs.until(first, lambda: not slurm.processes(first), "processes left")
    assert glob.glob(f"/tmp/ray-{first}-*") == []

    # The same command goes on from there, and a node that dies then takes neither the job nor the sweep along.
    second = jobs.submit()
    steps = jobs.training(second)
    assert steps.keys() == saved.keys()
    assert all(steps[cell] >= saved[cell] for cell in saved)
    slurm.power_off(NODES[1], second)
    assert jobs.ended(second) == "COMPLETED", jobs.said.read_text()
    assert [row["status"] for row in RunDirectory(jobs.run).read_results().to_pylist()] == ["done", "done"]
