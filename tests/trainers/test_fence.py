"""A worker woken after its successor took over changes nothing, wherever between a look and a write it was halted."""

import json
import uuid
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from saescale.storage import files
from saescale.storage.lease import Lease, read_driver
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.halted import SUPERSEDED, halted_before

MakeCell = Callable[..., Cell]
# What the first worker is about to do when it is halted.
MOMENTS = {
    "curve": ("write_atomic", r"curve[^/]*\.parquet$", 2),
    "generation": ("write_atomic", r"step-[^/]*\.safetensors$", 3),
    "pointer": ("write_atomic", r"latest[^/]*\.json$", 3),
    "old generation": ("remove", r"step-[^/]*\.safetensors$", 2),
    "weights": ("write_atomic", r"sae[^/]*\.safetensors$", 1),
    "end": ("create", r"latest-00002\.json$", 1),
    "result": ("write_atomic", r"result\.json$", 1),
    "checkpoints": ("remove", r"checkpoint$", 1),
}


@pytest.fixture
def job(sparse_store: ActivationStore, make_cell: MakeCell) -> PackJob:
    """A cell of 7 steps with an evaluation every 2 and a checkpoint after each step."""
    return PackJob(
        cells=[make_cell(n_latents=32, k=2, tokens=1_792, settings={"k_aux": 8})],
        store=sparse_store.url,
        run="-",
        sweep="test",
        eval=EvalSpec(tokens=256, every_tokens=512),
        checkpoint_every_s=1e-6,
        threads=1,
    )


def everything(run: str) -> dict[str, bytes]:
    """Every file of a run but those of its drivers."""
    names = [name for name in files.list_below(run) if not name.startswith("driver")]
    return {name: files.read_bytes(files.join(run, name)) for name in names}


def reached(run: str, cell: Cell) -> dict[str, Any]:
    """Weights to the bit, curve and result, less times and whose turn it was."""
    there = RunDirectory(run)
    there.check_cell(cell.cell_id)
    result = there.read_cell_result(cell.cell_id) or {}
    curve = there.read_cell_curve(cell.cell_id)
    content = files.read_bytes(files.join(there.cell_url(cell.cell_id), "sae.safetensors"))
    return {
        "files": sorted(there.cell_files()[cell.cell_id]),
        "weights": content[8 + int.from_bytes(content[:8], "little") :],
        "curve": [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in curve],
        "result": {key: value for key, value in result.items() if key not in ("wall_s", "turn", "by", "xxh3")},
    }


@pytest.fixture
def undisturbed(job: PackJob, tmp_path: Any) -> dict[str, Any]:
    run = str(tmp_path / "undisturbed")
    train_pack(job.model_copy(update={"run": run}))
    found = reached(run, job.cells[0])
    assert found["files"] == ["curve.parquet", "result.json", "sae.safetensors"]
    assert len(found["curve"]) >= 3
    return found


@pytest.mark.parametrize(("where", "goes_on"), [("disk", False), ("s3", True)], ids=["ended", "goes on"])
@pytest.mark.slow
def test_a_woken_worker_changes_nothing(
    job: PackJob, undisturbed: dict[str, Any], tmp_path: Any, where: str, goes_on: bool, request: Any
) -> None:
    base = str(tmp_path) if where == "disk" else request.getfixturevalue("s3_url")
    for moment in MOMENTS if where == "disk" else ("generation", "pointer", "end", "result"):
        mine = job.model_copy(update={"run": files.join(base, f"{moment.replace(' ', '-')}-{uuid.uuid4().hex[:4]}")})
        succeed(mine, moment, goes_on)
        assert reached(mine.run, job.cells[0]) == undisturbed, moment


def succeed(job: PackJob, moment: str, goes_on: bool) -> None:
    """Has another driver take over from a worker that is halted at that moment, and wakes the worker."""
    (cell,), steps = job.cells, count()
    run, had_ended = RunDirectory(job.run), moment in ("result", "checkpoints")
    with (
        halted_before(*MOMENTS[moment], job) as first,
        Lease(job.run, known_dead=read_driver(job.run)) as held,  # as one that was watched
    ):
        ours = job.model_copy(update={"driver": held.driver})
        # It trains to the end, or has two steps more when the other one wakes.
        train_pack(ours, should_stop=lambda: goes_on and next(steps) == 1)
        before = everything(job.run)
        assert first.wake() in ((0, SUPERSEDED) if had_ended else (SUPERSEDED,)), moment
        held.require()
        after = everything(job.run)
        # What it was about to write lies there under a name of its own turn, which nobody reads; and of a cell that has
        # its result, whoever gave it that may remove the checkpoints.
        changed = {name for name in {*before, *after} if after.get(name) != before.get(name)}
        own = {name for name in changed if "turn-00001" in name or name.endswith("latest-00001.json")}
        assert all(had_ended and "/checkpoint/" in name for name in changed - own), moment
        assert [row["status"] for row in train_pack(ours).results] == ["done"]
        run.tidy_cell(cell.cell_id, run.read_cell_result(cell.cell_id) or {})


def test_a_cell_whose_files_are_not_those_of_its_result_is_named(job: PackJob, run_url: str) -> None:
    train_pack(job.model_copy(update={"run": run_url}))
    run, cell_id = RunDirectory(run_url), job.cells[0].cell_id
    run.check_cell(cell_id)
    run.write_cell_curve(cell_id, run.read_cell_curve(cell_id)[:1])
    with pytest.raises(Exception, match=r"curve\.parquet is damaged \(the cell's result\.json was"):
        run.check_cell(cell_id)
    assert json.loads(files.read_bytes(run.result_url(cell_id)))["turn"] == 1
