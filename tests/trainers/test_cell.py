"""What a cell is called, what it may be told, and the cells of the version before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.cell import Cell
from saescale.trainers.exchange import native

OLD_RUN = Path(__file__).parents[1] / "data" / "run-0.1.0"
FIELDS: dict[str, Any] = {
    "store": "280c968a2bffdd34fd965d5c0112c839", "d_model": 32, "n_latents": 128, "k": 2, "tokens": 8192,
    "batch_tokens": 256, "lr": 0.002, "dead_after_tokens": 4096,
}  # fmt: skip
MakeCell = Callable[..., Cell]


def test_golden_cell_ids() -> None:
    """A change here renames every cell that was ever trained: sweeps would train them all again."""
    assert Cell(**FIELDS).cell_id == "n128-k2-s0-65bac1f6"
    told = Cell(**FIELDS, settings={"k_aux": 8, "multi_topk": True}, seed=3, ema=0.9, precision="bf16")
    assert told.cell_id == "n128-k2-s3-7ceb113e"


def test_cell_names_follow_from_what_defines_them(make_cell: MakeCell) -> None:
    assert make_cell().cell_id == make_cell().cell_id
    assert make_cell().cell_id.startswith("n64-k3-s0-")
    different = [make_cell(), make_cell(lr=1e-3), make_cell(seed=1), make_cell(multi_topk=True), make_cell(ema=0.5),
                 make_cell(k_aux=8), make_cell(precision="bf16"), make_cell(heldout_rows=64)]  # fmt: skip
    assert len({cell.cell_id for cell in different}) == len(different)
    assert Cell.model_validate(json.loads(make_cell().model_dump_json())) == make_cell()


def test_what_is_at_its_default_is_no_part_of_the_name() -> None:
    class Later(Cell):
        """A version that has one field and one default more."""

        warmup_tokens: int = 0

    plain = Cell(**FIELDS)
    assert Later(**FIELDS).cell_id == plain.cell_id
    assert Later(**FIELDS, warmup_tokens=1).cell_id != plain.cell_id
    spelt = Cell(**FIELDS, architecture="topk", settings={"k_aux": 0, "auxk_coefficient": 1 / 32}, seed=0)
    assert (spelt.cell_id, spelt.settings) == (plain.cell_id, {})
    assert spelt.whole_settings.model_dump() == {
        "k": 2, "k_aux": 0, "auxk_coefficient": 1 / 32, "multi_topk": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "topc"}, "unknown architecture 'topc': did you mean topk?"),
        ({"settings": {"k_axu": 3}}, "k_axu is no setting of topk: did you mean k_aux?"),
        ({"settings": {"k": 3}}, "k is no setting of topk"),
        ({"settings": {"k_aux": -1}}, "setting k_aux of topk: Input should be greater than or equal to 0 (given: -1)"),
        ({"k": 129}, "k=129 is larger than n_latents=128"),
        ({"tokens": 8193}, "not a multiple of batch_tokens"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Cell(**(FIELDS | fields))
    assert said in str(caught.value)


def test_a_cell_of_0_1_0_is_a_topk_cell() -> None:
    old = FIELDS | {
        "activation": "topk", "k_aux": 8, "auxk_coefficient": 0.03125, "multi_topk": False, "precision": "fp32"
    }  # fmt: skip
    cell = Cell.model_validate(old)
    assert cell == Cell(**FIELDS, settings={"k_aux": 8})


def test_a_run_of_0_1_0_can_still_be_read() -> None:
    run = RunDirectory(str(OLD_RUN))
    results = run.read_results().to_pylist()
    assert {row["architecture"] for row in results} == {"topk"}
    assert len(results) == 6
    assert len(run.read_curves()) == sum(len(run.read_cell_curve(row["cell_id"])) for row in results) > 6
    raw = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 5 + 2
    for row in results:
        trained = native.read(run.cell_url(row["cell_id"]))
        n, k = row["n_latents"], row["k"]
        assert (trained.cell.n_latents, trained.cell.k, trained.cell.settings) == (n, k, {"k_aux": 8})
        assert {name: tuple(tensor.shape) for name, tensor in trained.sae.params.items()} == {
            "W_enc": (n, 32), "W_dec": (n, 32), "b_enc": (n,), "b_pre": (32,)
        }  # fmt: skip
        latents = trained.encode(raw)
        assert latents.shape == (40, n)
        assert 0 < int((latents > 0).sum(dim=1).max()) <= k
        assert torch.isfinite(trained.reconstruct(raw)).all()


def test_files_that_hold_no_sae(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="there is no SAE at"):
        native.read(str(tmp_path))
    with pytest.raises(SaescaleError, match=r"run-0.1.0 is a run, .*name one of them: .*run-0.1.0/cells/CELL_ID"):
        native.read(str(OLD_RUN))
    (tmp_path / "sae.safetensors").write_bytes(b"no such thing")
    with pytest.raises(SaescaleError, match=r"is no safetensors file.*; copy or export it again"):
        native.read(str(tmp_path))
    (tmp_path / "cells" / "one").mkdir(parents=True)
    (tmp_path / "cells" / "one" / "sae.safetensors").write_bytes(b"no such thing")
    with pytest.raises(SaescaleError, match=r"is no safetensors file.*remove the cell's folder and run the same sweep"):
        native.read(str(tmp_path / "cells" / "one"))
    good = next((OLD_RUN / "cells").iterdir()) / "sae.safetensors"
    other = good.read_bytes().replace(b'\\"activation\\":\\"topk\\"', b'\\"activation\\":\\"tpok\\"')
    (tmp_path / "sae.safetensors").write_bytes(other)
    with pytest.raises(SaescaleError, match="architecture: unknown architecture 'tpok': did you mean topk") as caught:
        native.read(str(tmp_path))
    assert "\n" not in str(caught.value)
