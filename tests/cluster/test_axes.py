"""Axes of a sweep file: what lists mean as cells, what is said of those that cannot be, how a sweep grows by them."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from saescale.cluster.sweep.extend import extend
from saescale.cluster.sweep.ledger import open_ledger
from saescale.cluster.sweep.propose import Request, make_proposal
from saescale.cluster.sweep.spec import SweepSpec, load_spec, parse_spec
from saescale.scaling.planning.devices import find_device
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, axes_of
from saescale.trainers.loggers.wandb_cells import _name
from saescale.trainers.training.results import Provenance, result_row


class Store(NamedTuple):
    fingerprint: str = "f"
    d_model: int = 64


def asked(grid: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "name": "axes", "store": "store", "out": "out",
        "grid": {"n_latents": [64, 128], "k": [4, 8]} | (grid or {}),
        "train": {"tokens": 4_096, "batch_tokens": 256, "lr": 1e-3} | train,
    }  # fmt: skip


def cells(document: dict[str, Any]) -> list[Cell]:
    return parse_spec(document, "test").cells(Store(), "fp32")


def values(found: list[Cell], name: str) -> set[Any]:
    return {getattr(cell, name, cell.settings.get(name)) for cell in found}


@pytest.mark.parametrize(
    ("train", "name", "wanted"),
    [
        ({"lr": [1e-3, 3e-3, 0.001]}, "lr", {1e-3, 3e-3}),
        ({"lr": {"at": 64, "value": [1e-3, 4e-3]}}, "lr", {1e-3, 1e-3 * 2**-0.5, 4e-3, 4e-3 * 2**-0.5}),
        ({"lr": [1e-3, {"at": 64, "value": 2e-3, "exponent": [0, -1]}]}, "lr", {1e-3, 2e-3}),
        ({"tokens": [2_048, 4_096]}, "tokens", {2_048, 4_096}),
        ({"tokens": {"at": 64, "tokens": [1_024, 2_048], "exponent": 1.0}}, "tokens", {1_024, 2_048, 4_096}),
        ({"batch_tokens": [128, 256]}, "batch_tokens", {128, 256}),
        ({"ema": [0.9, 0.99]}, "ema", {0.9, 0.99}),
        ({"stream_seed": [0, 1]}, "stream_seed", {0, 1}),
        ({"auxk": {"k": [0, 8, "auto"]}}, "k_aux", {None, 8, 32}),
        ({"auxk": {"coefficient": [0.1, 0.2]}}, "auxk_coefficient", {0.1, 0.2}),
        ({"auxk": {"dead_after_tokens": [512, 1_024]}}, "dead_after_tokens", {512, 1_024}),
        ({"multi_topk": [False, True]}, "multi_topk", {None, True}),
        ({"settings": {"k_aux": [4, 16]}}, "k_aux", {4, 16}),
    ],
)  # fmt: skip
def test_each_number_of_train_may_be_a_list(train: dict[str, Any], name: str, wanted: set[Any]) -> None:
    found = cells(asked(**train))
    there = values(found, name)
    assert sorted(there, key=str) == (pytest.approx(sorted(wanted)) if name == "lr" else sorted(wanted, key=str))
    assert len({cell.cell_id for cell in found}) == len(found) == parse_spec(asked(**train), "test").size
    fields = [cell.model_dump(exclude={name, "settings"}) for cell in found]
    # Nothing else differs than n, k, and what was asked for.
    assert {len({repr(f[key]) for f in fields}) for key in fields[0] if key not in ("n_latents", "k", "lr")} == {1}


@pytest.mark.parametrize(
    ("name", "digest"), [("gpt2-small.yaml", "921739d58739ce82"), ("smollm2.yaml", "a0e2f894073cc5f9")]
)
def test_cells_of_sweeps_without_axes_keep_their_names(name: str, digest: str) -> None:
    """Those that the version before axes gave them, in its order."""
    spec = load_spec(str(Path(__file__).parents[2] / "deploy" / "sweeps" / name))
    ids = " ".join(cell.cell_id for cell in spec.cells(Store("f", 768), "bf16"))
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == digest


def test_axes_multiply_and_numbers_of_a_grid_need_no_list() -> None:
    document = asked({"n_latents": 64, "k": 4, "seed": 3}, lr=[1e-3, 2e-3], batch_tokens=[128, 256], ema=[0.9, 0.99])
    found = cells(document)
    assert {(c.n_latents, c.k, c.seed) for c in found} == {(64, 4, 3)}
    assert [(c.batch_tokens, c.lr, c.ema) for c in found] == list(
        itertools.product([128, 256], [1e-3, 2e-3], [0.9, 0.99])
    )
    assert found == cells(document | {"grid": {"n_latents": [64], "k": [4], "architecture": ["topk"], "seed": [3]}})


def test_a_list_of_one_names_the_same_cells() -> None:
    listed = asked(lr=[1e-3], batch_tokens=[256], auxk={"k": ["auto"]}, ema=[0.999])
    assert cells(listed) == cells(asked())


def test_an_architecture_has_no_cells_for_axes_that_it_does_not_have() -> None:
    grid = {"architecture": ["topk", "relu"], "n_latents": 64, "k": 4}
    auxk = {"k": [0, 8], "coefficient": [0.1, 0.2]}
    found = cells(asked(grid, auxk=auxk, settings={"coefficient": [0.5, None]}))
    of = {name: [c.settings for c in found if c.architecture == name] for name in ("topk", "relu")}
    assert of["relu"] == [{"coefficient": 0.5}, {}]
    # Without AuxK its coefficient is none either.
    assert of["topk"] == [{"auxk_coefficient": 0.1}, *({"k_aux": 8, "auxk_coefficient": c} for c in (0.1, 0.2))]


def test_settings_below_a_name_are_for_that_architecture_alone() -> None:
    settings = {"coefficient": 0.5, "gated": {"coefficient": [0.1, 0.2]}, "switch": {"experts": [4, 8]},
                "frozen-decoder": {"k_aux": 3}}  # fmt: skip
    names = ["relu", "gated", "switch", "frozen_decoder", "topk"]
    found = cells(asked({"architecture": names, "n_latents": 64, "k": 4}, settings=settings, auxk={"k": 5}))
    of = {name: [c.settings for c in found if c.architecture == name] for name in names}
    assert of == {
        "relu": [{"coefficient": 0.5}],
        "gated": [{"coefficient": 0.1}, {"coefficient": 0.2}],
        "switch": [{"experts": 4}, {}],
        "frozen_decoder": [{"k_aux": 3}],
        "topk": [{"k_aux": 5}],
    }


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes an architecture of the user's with a setting of that annotation."""
    (tmp_path / "architectures").mkdir()
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))

    def write(name: str, field: str) -> None:
        text = (
            "from typing import Literal\nfrom saescale.trainers.architectures import topk\n"
            f"class Settings(topk.Settings):\n    {field}\n"
            "parameters = topk.parameters\nforward = topk.forward\nlosses = topk.losses\nflops = topk.flops\n"
        )
        (tmp_path / "architectures" / f"{name}.py").write_text(text)

    return write


def test_one_name_of_two_meanings_has_to_be_told_apart(own: Callable[[str, str], None]) -> None:
    own("mine", "coefficient: bool = False")
    grid = {"architecture": ["mine", "relu"]}
    with pytest.raises(SaescaleError, match="setting coefficient means different things in mine and relu: write") as e:
        cells(asked(grid, settings={"coefficient": 1}))
    assert "{relu: {coefficient: 1}}" in str(e.value)
    found = cells(asked(grid, settings={"mine": {"coefficient": True}, "coefficient": 0.5}))
    assert {(c.architecture, c.settings["coefficient"]) for c in found} == {("mine", True), ("relu", 0.5)}


def test_a_setting_that_is_a_list_is_one_value(own: Callable[[str, str], None]) -> None:
    own("mine", "widths: list[int] = []")
    of = {tuple(c.settings["widths"]) for c in cells(asked({"architecture": "mine"}, settings={"widths": [1, 2]}))}
    assert of == {(1, 2)}
    found = cells(asked({"architecture": "mine"}, settings={"widths": [[1, 2], [3]]}))
    assert {tuple(c.settings["widths"]) for c in found} == {(1, 2), (3,)}


def test_one_number_is_one_cell_however_it_is_written() -> None:
    document = asked({"architecture": "relu"}, settings={"coefficient": [1, 1.0, "1e0"]})
    assert len(cells(document)) == parse_spec(document, "test").size == 4
    assert values(cells(document), "coefficient") == {1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("def flops", "def flop"), "defines no flops: it has to define Settings, parameters"),
        (("(architecture.Settings)", "(architecture.BaseModel)"), "has Settings that are no architecture.Settings"),
        (("share: float", "rate: float = 1.0\n    share: float"), "calls a setting rate, which"),
        (("    pre = (x", "    1 / 0\n    pre = (x"), "`forward` fails on 2 rows of d_model 8 .* ZeroDivisionError"),
        (
            ('latents @ params["decoder"] + params["centre"]', '(latents @ params["decoder"])[:, :3]'),
            r"`forward` fails .* x_hat are \[2, 3\] where \[2, 8\]",
        ),
        (('"bias": P', '"a.bias": P'), "`parameters` fails .* with a dot"),
        (("import torch", "raise SystemExit(1)"), "fails with SystemExit: 1; correct it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Field name")
def test_a_file_that_is_no_whole_architecture_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], said: str
) -> None:
    page = (Path(__file__).parents[2] / "trainers" / "architectures" / "README.md").read_text()
    toy = page.split("```python\n")[1].split("```")[0]
    assert change[0] in toy
    (tmp_path / "architectures").mkdir()
    (tmp_path / "architectures" / "broken.py").write_text(toy.replace(*change))
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    with pytest.raises(SaescaleError, match=said):
        parse_spec(asked({"architecture": "broken"}), "test")


SWITCH = {"architecture": ["topk", "switch"]}


@pytest.mark.parametrize(
    ("grid", "train", "said"),
    [
        ({}, {"lr": []}, "train.lr: list should have at least 1 item"),
        ({}, {"lr": [1e-3, "x"]}, "train.lr.1: input should be a valid number"),
        ({}, {"lr": [1e-3, -1]}, "train.lr.1: input should be greater than 0 (given: -1)"),
        ({}, {"lr": [1e-3, [2e-3]]}, "train.lr.1: input should be a valid number"),
        ({}, {"ema": [0.9, 1.0]}, "train.ema.1: input should be less than 1"),
        ({}, {"tokens": [4_096, "8,192"]}, "write 8192"),
        ({}, {"auxk": {"k": [0, True]}}, "train.auxk.k.1"),
        ({}, {"tokens": [4_096, 5_000]}, "train: tokens = 5000 is not a multiple of batch_tokens = 256"),
        ({}, {"batch_tokens": [256, 300]}, "train: tokens = 4096 is not a multiple of batch_tokens = 300"),
        ({}, {"lr": {"at": 64, "value": [1e-3, 1e-3], "exponent": [0, 500.0]}}, "train.lr is out of range at"),
        ({}, {"precision": ["fp32", "bf16"]}, "train.precision: input should be"),
        ({}, {"lr": [1e-3 * i for i in range(1, 40_000)]}, "159,996 cells are more than the 100,000 of a sweep"),
        ({}, {"lr": {"at": list(range(1, 2_000)), "value": [1e-3 * i for i in range(1, 2_000)],
                     "exponent": [0.1 * i for i in range(2_000)]}}, "cells are more than the 100,000"),
        ({"n_latents": [64, 100], "architecture": "switch"}, {},
         "the cells of n = 100, k = 4, switch: 8 experts do not divide n_latents=100"),
        (SWITCH, {"settings": {"experts": [8, 16]}}, "k = 8, switch: k=8 is larger than the 4 latents of each of 16"),
        (SWITCH, {"settings": {"switch": {"expert": 4}}}, "expert is no setting of switch: did you mean experts?"),
        (SWITCH, {"settings": {"swich": {"experts": 4}}}, "did you mean switch?"),
        (SWITCH, {"settings": {"experts": []}}, "setting experts of switch: the list is empty"),
        ({"architecture": ["gated", "relu"]}, {"settings": {"coefficient": [0.1, -1]}},
         "setting coefficient of gated: Input should be greater than 0 (given: -1)"),
        ({"cells": [{"n_latents": 64, "k": 4, "train": {"lrr": 1}}]}, {},
         "grid.cells, train of n_latents = 64, k = 4: lrr is not a key, did you mean lr?"),
        ({"cells": [{"n_latents": 64, "k": 4, "train": {"tokens": 5_000}}]}, {}, "5000 is not a multiple of"),
        ({}, {"lr": [True, 1e-3]}, "train.lr.0: input should be a number, not true or false (given: True)"),
        ({"architecture": "relu"}, {"settings": {"coefficient": True}}, "setting coefficient of relu: Input should be"),
        ({"architecture": "relu"}, {"settings": {"coefficient": float("inf")}}, "a finite number (given: inf"),
        ({"architecture": "relu"}, {"settings": {"gatd": {"coefficient": 1}}}, "did you mean gated?"),
        # Below the name of an architecture that the grid lacks now, too.
        ({}, {"settings": {"switch": {"expert": 4}}}, "expert is no setting of switch: did you mean experts?"),
        ({}, {"settings": {"switch": {"experts": [4, 0]}}}, "setting experts of switch: Input should be greater than"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(grid: dict[str, Any], train: dict[str, Any], said: str) -> None:
    with pytest.raises(SaescaleError) as caught:
        cells(asked(grid, **train))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_architectures_one_of_which_cannot_take_a_value(own: Callable[[str, str], None]) -> None:
    own("mine", "variant: Literal['relu', 'ste'] = 'ste'")
    own("other", "variant: Literal['a', 'b'] = 'a'")
    with pytest.raises(SaescaleError, match="setting variant means different things in mine and other"):
        cells(asked({"architecture": ["mine", "other"]}, settings={"variant": ["a"]}))


def test_unlike_cells_have_unlike_names_in_wandb() -> None:
    found = cells(asked({"architecture": ["topk", "relu"], "seed": [0, 1]}, lr=[1e-3, 2e-3], auxk={"k": [0, 8]}))
    axes = axes_of(found)
    assert set(axes) == {"lr", "k_aux"}
    fields = [(c.model_dump(exclude={"settings"}) | c.whole_settings.model_dump(), c.cell_id) for c in found]
    names = [_name(each, axes, cell_id) for each, cell_id in fields]
    assert len(set(names)) == len(found)
    assert "relu n64 k4 seed 1 lr 0.002" in names
    assert axes_of(cells(asked())) == ()
    # W&B takes no more than 128 characters.
    long = [_name(each, [*axes, *each], cell_id) for each, cell_id in fields]
    assert len(set(long)) == len(found)
    assert max(map(len, long)) == 128


# --- a sweep that grows


def grown(spec: SweepSpec, more: dict[str, Any], path: Path) -> tuple[SweepSpec, int]:
    path.write_text(yaml.safe_dump(more))
    return extend(spec, str(path))


def test_a_sweep_is_extended_along_an_axis(document: dict[str, Any], store: ActivationStore, tmp_path: Path) -> None:
    document["train"]["lr"] = [1e-3, 2e-3]
    spec, run = parse_spec(document, "test"), RunDirectory(document["out"])
    there = {cell.cell_id for cell in spec.cells(store, "fp32")}
    open_ledger(run, None, spec, [store], "fp32").begin()
    # The edge was the best: larger ones, also at one n and k alone.
    more = document | {"train": document["train"] | {"lr": [1e-3, 2e-3, 4e-3]}, "grid": {"n_latents": 32, "k": [2, 4]}}
    larger, added = grown(spec, more, tmp_path / "more.yaml")
    assert added == 2
    found = larger.cells(store, "fp32")
    assert {(c.n_latents, c.k, c.lr) for c in found if c.cell_id not in there} == {(32, 2, 4e-3), (32, 4, 4e-3)}
    assert there < {cell.cell_id for cell in found}
    assert larger.train == spec.train
    open_ledger(run, run.read_spec(), larger, [store], "fp32", extending=True).begin()
    # What is written can be read, and is the same sweep; again nothing is missing.
    again = parse_spec(run.read_spec() or {}, "again")
    assert set(again.planned()) == set(larger.planned())
    open_ledger(run, run.read_spec(), again, [store], "fp32")
    assert grown(spec, more, tmp_path / "more.yaml")[1] == 0
    # A file whose own list has grown says how to add.
    longer = parse_spec(document | {"train": document["train"] | {"lr": [1e-3, 2e-3, 4e-3]}}, "test")
    with pytest.raises(SaescaleError, match=r"train.lr is \[0.001, 0.002\] there and .* here\)"):
        open_ledger(run, run.read_spec(), longer, [store], "fp32")


def test_lists_in_another_order_are_the_same_sweep(document: dict[str, Any], store: ActivationStore) -> None:
    run = RunDirectory(document["out"])
    document["train"] |= {"lr": [1e-3, 2e-3], "ema": [0.9]}
    open_ledger(run, None, parse_spec(document, "test"), [store], "fp32").begin()
    document["train"] |= {"lr": [2e-3, 1e-3], "ema": 0.9}
    document["grid"]["n_latents"].reverse()
    open_ledger(run, run.read_spec(), parse_spec(document, "test"), [store], "fp32")


def test_a_number_that_is_no_axis_has_to_be_the_same(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document, "test")
    for train, said in (
        ({"ema": 0.5}, "train.ema is 0.5 and the sweep's is 0.9; .* make it an axis"),
        (
            {"precision": "bf16"},
            "train.precision is bf16 and the sweep's is fp32; .* make them the same, or",
        ),
    ):
        with pytest.raises(SaescaleError, match=said):
            grown(spec, document | {"train": document["train"] | train}, tmp_path / "more.yaml")


def test_a_plan_goes_on_with_the_best_way_of_training(document: dict[str, Any], store: ActivationStore) -> None:
    """nmse is made up, lowest at lr 2e-3 of 1e-3, 2e-3 and 4e-3, and at auxk.k = 8 of 0 and 8."""
    document["grid"] = {"n_latents": [64, 128, 256, 512], "k": [2, 4, 8], "architecture": ["batchtopk"]}
    document["train"] |= {"lr": {"at": 64, "value": [1e-3, 2e-3, 4e-3]}, "auxk": {"k": [0, 8]}}
    spec, run = parse_spec(document, "test"), RunDirectory(document["out"])
    ledger = open_ledger(run, None, spec, [store], "fp32")
    ledger.begin()
    rows = []
    for cell in ledger.cells:
        value = cell.lr * (cell.n_latents / 64) ** 0.5
        worse = 0.2 * abs(np.log2(value / 2e-3)) + 0.1 * (cell.settings.get("k_aux") is None)
        row = result_row(cell, Provenance.of(store, 2_048), cell.tokens, cell.flops(cell.tokens), 1.0, None, None)
        nmse = (0.1 + 4 * cell.n_latents**-0.6 * cell.k**-0.2) * np.exp(worse)
        rows.append(row | {"nmse": float(nmse), "l0": float(cell.k)})
    run.write_results(rows)
    plan = make_proposal(Request(hours=1.0, device=find_device("cpu", 1e11), source=run.url))
    found = plan.spec.cells(store, "fp32")
    assert {cell.architecture for cell in found} == {"batchtopk"}
    assert {cell.settings.get("k_aux") for cell in found} == {8}
    assert [cell.lr for cell in found] == pytest.approx([2e-3 * (cell.n_latents / 64) ** -0.5 for cell in found])
    assert len(found) == plan.design.counts.sum()
    assert "on average the best of 6 ways" in plan.prior.words
    # It was planned from what those cells say: the law that made them.
    assert plan.prior.cells["k"].shape == (12,)
    # And it extends the sweep that it came from.
    path = Path(document["out"]) / "more.yaml"
    path.write_text(plan.yaml())
    assert extend(spec, str(path)).added == len(found)
    json.dumps(plan.document(), allow_nan=False)
