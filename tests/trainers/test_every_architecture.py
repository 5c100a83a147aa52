"""What holds for every architecture of the room: it goes on after a stop to the same bits, and is read as it was."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import default_device
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange import native
from saescale.trainers.training.train import PackJob, measured_centre, train_pack

MakeCell = Callable[..., Cell]
ROWS = 2_048


def _cells(make_cell: MakeCell) -> list[Cell]:
    shared = {"tokens": 8_192, "n_latents": 128, "k": 4}
    cells = [make_cell(architecture=name, **shared) for name in ARCHITECTURES.names()]
    given = make_cell(architecture="relu", settings={"coefficient": 0.05}, **shared)
    return [*cells, given, make_cell(architecture="prolu", settings={"variant": "relu"}, **shared)]


def _train(cells: list[Cell], store: ActivationStore, run: str, stop: int | None = None) -> dict[str, object]:
    """All results but times; stopped after `stop` steps and begun again, where that is said."""
    job = PackJob(cells=cells, store=store.url, run=run, sweep="x", eval=EvalSpec(tokens=ROWS), threads=1)
    if stop is not None:
        calls = count()
        assert train_pack(job, should_stop=lambda: next(calls) == stop).stopped
    hidden = {"wall_s", "xxh3", "turn", "by"}
    results = train_pack(job).results
    return {row["cell_id"]: {name: value for name, value in row.items() if name not in hidden} for row in results}


@pytest.fixture
def trained(sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path) -> dict[str, object]:
    return _train(_cells(make_cell), sparse_store, str(tmp_path / "whole"))


def test_it_goes_on_to_the_same_bits_and_is_read_as_it_was(
    trained: dict[str, object], sparse_store: ActivationStore, make_cell: MakeCell, tmp_path: Path
) -> None:
    cells, runs = _cells(make_cell), [RunDirectory(str(tmp_path / name)) for name in ("whole", "stopped")]
    # In the middle of what the controller measures (every 8th step from the 7th on), and not at a multiple of it.
    assert _train(cells, sparse_store, runs[1].url, stop=19) == trained
    held_out = HeldOut(sparse_store, ROWS, default_device(), sparse_store.url)
    with measured_centre(sparse_store, cells[0]) as centre:
        pass
    for cell in cells:
        saes = [native.read(run.cell_url(cell.cell_id)).sae for run in runs]
        for name, tensor in saes[0].params.items():
            assert torch.equal(tensor, saes[1].params[name]), (cell.architecture, name)

        def read(sae: SAE = saes[0]) -> SAE:
            return sae

        (quality,) = held_out.evaluate([read], centre.b_pre, False)
        row = trained[cell.cell_id]
        assert isinstance(row, dict)
        assert (quality.nmse, quality.l0) == pytest.approx((row["nmse"], row["l0"]), rel=1e-6)
        assert (row["l0_error"] is not None) == cell.whole_settings.k_is_target
