"""Files of a run and of a store, damaged one by one: commands give the right result or one line that names the file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saescale.cluster.sweep.ledger import Ledger, open_ledger
from saescale.cluster.sweep.spec import SweepSpec, load_spec, parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report.report import analyse, is_current
from saescale.storage import checkpoint
from saescale.storage.columns import RESULTS, CurveRow
from saescale.storage.documents import yaml_text
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.lease import Lease
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Shape, find_architecture
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.exchange import native
from saescale.trainers.exchange.run import open_run
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.results import Provenance, result_row
from saescale.trainers.training.train import PackJob, train_pack
from tests.cluster.command import assert_one_line, saescale_here
from tests.trainers.synthetic import sparse_rows, write_store

OLD_RUN = Path(__file__).parents[1] / "data" / "run-0.1.0"
SIZES, KS = (32, 64, 128, 256), (2, 4)


class Made:
    """A run of 8 cells as its driver and workers leave it, and the store it streamed from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDirectory(str(folder / "run"))

    @property
    def spec(self) -> SweepSpec:
        document = {
            "name": "damage",
            "store": str(self.folder / "store"),
            "out": self.run.url,
            "grid": {"n_latents": list(SIZES), "k": list(KS)},
            "train": {"tokens": 2_048, "batch_tokens": 256, "lr": 1e-3, "auxk": {"k": 0}, "precision": "fp32"},
            "eval": {"tokens": 64, "every_tokens": 1_024},
            "wandb": {"mode": "off"},
        }
        return parse_spec(document, "sweep")

    def ledger(self) -> Ledger:
        """As a driver opens it."""
        store = ActivationStore.open(self.spec.store)
        return open_ledger(self.run, self.run.read_spec(), self.spec, [store], "fp32")

    def results(self) -> list[dict[str, Any]]:
        return sorted(self.run.read_results().to_pylist(), key=lambda row: str(row["cell_id"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("damage"))
    write_store(made.spec.store, sparse_rows(512, seed=0), sparse_rows(128, seed=1))
    ledger = made.ledger()
    ledger.begin()
    for cell in ledger.cells:
        finish(made.run, cell, ledger)
    ledger.take_up(ledger.cells)
    ledger.settle()
    with Lease(made.run.url) as lease:
        lease.end("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saescale.scaling.report.report.draw_figures", lambda *_: [])
        analyse(made.run, FitSettings(0))
    return made


def finish(run: RunDirectory, cell: Cell, ledger: Ledger) -> None:
    """What a worker does: takes a turn, saves, ends it with weights, curve and result."""
    run.take_cell(cell.cell_id)
    run.save_checkpoint(cell.cell_id, 4, {"a": torch.ones(3).numpy()}, {"stream": {}})
    centre = Centre(torch.zeros(cell.d_model), 1.0)
    shape = Shape(cell.d_model, cell.n_latents)
    module = find_architecture(cell.architecture)
    params = {name: p.data for name, p in module.parameters(shape, cell.whole_settings, centre, 0).items()}
    native.write(
        Trained(SAE(cell.architecture, shape, cell.whole_settings, params), cell),
        f"{run.cell_url(cell.cell_id)}/{run.name_now(cell.cell_id, 'sae.safetensors')}",
    )
    nmse = 0.9 * cell.n_latents**-0.3 * cell.k**-0.2
    points = [
        CurveRow(
            step, step * 256, float(cell.flops(step * 256).sparse), nmse * 8 / step, nmse, cell.k, 0, 0, 1e-3, 10.0
        )
        for step in (4, 8)
    ]
    run.write_cell_curve(cell.cell_id, [point._asdict() for point in points])
    provenance = Provenance.of(ActivationStore.open(ledger.document["store"]), 64)
    result = result_row(cell, provenance, cell.tokens, cell.flops(cell.tokens), 1.0, points[-1], None, device="cpu")
    run.write_cell_result(cell.cell_id, result)


@pytest.fixture
def made(whole: Made, tmp_path: Path) -> Made:
    """A copy to be damaged."""
    return copy(whole, tmp_path / "copy")


def copy(whole: Made, folder: Path) -> Made:
    """The run with its store; both keep their places in sweep.yaml, which a copy does not need."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.folder / "run", folder / "run")
    shutil.copytree(whole.folder / "store", folder / "store")
    return Made(folder)


def one_file_of(folder: Path, kind: str) -> Path:
    return sorted(folder.glob(f"**/{kind}"))[0]


def damage(path: Path, how: str, share: float) -> None:
    content = bytearray(path.read_bytes())
    at = min(int(share * len(content)), len(content) - 1)
    if how == "truncated":
        path.write_bytes(content[:at])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[at] ^= 1 << int(share * 1e6) % 8
        path.write_bytes(content)


KINDS = ("results.parquet", "curves.parquet", "sweep.yaml", "fits.json", "driver-*.json", "result.json",
         "curve.parquet", "sae.safetensors", "manifest.json", "train-*.parquet", "heldout-*.parquet")  # fmt: skip


def commands(made: Made, cell: str) -> dict[str, Callable[[], Any]]:
    """What reads runs and stores, each with what it gives, to be compared with that of the undamaged."""
    url = made.run.url

    def told(*arguments: str) -> Any:
        result = saescale_here(*arguments)
        if result.returncode:
            assert_one_line_among_warnings(result.stderr)
            raise SaescaleError(result.stderr)
        return result.stdout

    def fitted() -> Any:
        document = json.loads(told("fit", url, "--bootstraps", "0", "--json"))
        return [(fit["law"], fit["coefficients"], fit["points"]) for fit in document["fits"]]

    def status() -> Any:
        document = json.loads(told("status", url, "--json"))
        return document["counts"], [(cell["cell_id"], cell["status"], cell["nmse"]) for cell in document["cells"]]

    return {
        "status": status,
        "fit": fitted,
        "inspect": lambda: bool(told("inspect", url)),
        "inspect cell": lambda: told("inspect", made.run.cell_url(cell)).replace(url, ""),
        "inspect store": lambda: told("inspect", str(made.folder / "store"), "--verify").replace(str(made.folder), ""),
        "load": lambda: {n: t.sum().item() for n, t in open_run(url).load(n_latents=32, k=2).sae.params.items()},
        "driver": lambda: {
            name: (row["status"], row["nmse"], row["flops_dense"]) for name, row in made.ledger().results.items()
        },
    }


def assert_one_line_among_warnings(stderr: str) -> None:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert [line.partition(":")[0] for line in lines] == ["warning"] * (len(lines) - 1) + ["error"], stderr


@pytest.fixture(scope="module")
def right(whole: Made) -> dict[str, Any]:
    return {name: run() for name, run in commands(whole, first_cell(whole)).items()}


def first_cell(made: Made) -> str:
    return sorted(path.name for path in (made.folder / "run" / "cells").iterdir())[0]


@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
@settings(max_examples=24, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(KINDS), st.sampled_from(("truncated", "flipped")), st.floats(0, 0.999))
@example("results.parquet", "empty", 0)
@example("sweep.yaml", "empty", 0)
@example("result.json", "empty", 0)
def test_any_file_damaged(whole: Made, right: dict[str, Any], kind: str, how: str, share: float) -> None:
    made = copy(whole, whole.folder / "damaged")
    path = one_file_of(made.folder, kind)
    damage(path, how, share)
    cell = path.parent.name if "cells" in path.parts else first_cell(whole)
    for name, run in commands(made, cell).items():
        before = contents(made.folder)
        found, said = outcome(run)
        # A sweep.yaml that was altered may be that of another sweep; what else is altered is found out.
        allowed = kind in ("sweep.yaml", "manifest.json") or (kind, name) == ("driver-*.json", "status")
        if said is None:
            assert allowed or name == "inspect cell" or found == right[name], (name, kind)
        else:
            assert "unexpected" not in said
            assert allowed or path.name in said, (name, said)
        assert contents(made.folder) == before, name


def outcome(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it gives, and what it says where it ends in an error that users read."""
    try:
        return run(), None
    except SaescaleError as error:
        return None, str(error)


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- the advice, obeyed, helps


def warned(made: Made, name: str) -> Ledger:
    with pytest.warns(SaescaleWarning, match=name):
        ledger = made.ledger()
    return ledger


@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
@pytest.mark.parametrize("name", ["results.parquet", "curves.parquet"])
@pytest.mark.parametrize("gone", [False, True])
def test_tables_are_made_again(made: Made, right: dict[str, Any], name: str, gone: bool) -> None:
    expected, curves = made.results(), made.run.read_curves().to_pylist()
    path = made.folder / "run" / name
    path.unlink() if gone else path.write_bytes(b"PAR1")
    assert {str(row): None for row in made.results()} == {str(row): None for row in expected}
    for command in ("status", "fit"):
        assert commands(made, "")[command]() == right[command]
    ledger = made.ledger()
    ledger.settle()  # what the same sweep, run again, does
    assert made.run.has_tables()
    assert sorted(map(str, made.run.read_curves().to_pylist())) == sorted(map(str, curves))


def test_status_knows_the_cells_that_a_lost_ledger_named(made: Made, right: dict[str, Any]) -> None:
    (made.folder / "run" / "results.parquet").unlink()
    cell = first_cell(made)
    shutil.rmtree(made.run.cell_url(cell))
    counts, cells = commands(made, "")["status"]()
    assert (counts["cells"], counts["done"], counts["pending"]) == (8, 7, 1)
    (pending,) = [name for name, status, _ in cells if status == "pending"]
    assert cell.startswith(pending)


def test_a_damaged_result_is_made_again(made: Made) -> None:
    cell = first_cell(made)
    where = Path(made.run.result_url(cell))
    expected = made.run.read_cell_result(cell)
    assert expected is not None
    where.write_bytes(where.read_bytes()[:100])
    (made.folder / "run" / "results.parquet").unlink()
    ledger = warned(made, "is made again from the cell's weights and curve")
    ledger.settle()
    found = made.run.read_cell_result(cell)
    assert found is not None
    for name in ("nmse", "flops", "flops_dense", "tokens", "settings", "store", "status"):
        assert found[name] == expected[name], name
    assert made.ledger().pending == []


def test_the_levels_of_a_damaged_result_are_measured_again(made: Made, tmp_path: Path) -> None:
    """Of a training that serves several k: no other file has what it reaches at each."""
    document = made.spec.model_dump(mode="json") | {"out": str(tmp_path / "levels")}
    document["grid"] = {"n_latents": [64], "k": [8], "architecture": ["hierarchical_topk"]}
    spec, run = parse_spec(document, "sweep"), RunDirectory(str(tmp_path / "levels"))

    def ledger() -> Ledger:
        return open_ledger(run, run.read_spec(), spec, [ActivationStore.open(spec.store)], "fp32")

    ledger().begin()
    (cell,) = ledger().cells
    train_pack(
        PackJob(
            cells=[cell], store=spec.store, run=run.url, sweep="levels", eval=EvalSpec(tokens=64, every_tokens=1_024)
        )
    )
    expected = run.read_cell_result(cell.cell_id)
    assert expected is not None
    Path(run.result_url(cell.cell_id)).write_bytes(b"{")
    (tmp_path / "levels" / "results.parquet").unlink()
    with pytest.warns(SaescaleWarning, match="is made again from the cell's weights and curve"):
        again = ledger()
    again.settle()
    found = run.read_cell_result(cell.cell_id)
    assert found is not None
    before, after = (json.loads(row["levels"]) for row in (expected, found))
    assert [level["k"] for level in after] == [level["k"] for level in before] == [1, 2, 4, 8]
    for name in ("nmse", "l0"):
        assert [level[name] for level in after] == pytest.approx([level[name] for level in before], rel=1e-6)


@pytest.mark.parametrize("content", [b"", b"{", b'{"cell_id": "x"'])
def test_a_damaged_result_is_made_again_from_the_table(made: Made, content: bytes) -> None:
    """With its times, and whether or not its turn left something behind."""
    cell = first_cell(made)
    where = Path(made.run.result_url(cell))
    expected = made.run.read_cell_result(cell)
    where.write_bytes(content)
    ledger = warned(made, "is damaged: it is made again from results.parquet")
    assert ledger.pending == []
    ledger.settle()
    found = made.run.read_cell_result(cell)
    assert found is not None
    assert expected is not None
    assert {name: found[name] for name in RESULTS.names} == {name: expected.get(name) for name in RESULTS.names}


def test_a_result_that_is_lost_says_what_it_costs(made: Made) -> None:
    cell = first_cell(made)
    Path(made.run.result_url(cell)).write_bytes(b"{")
    Path(made.run.cell_url(cell), "sae.safetensors").write_bytes(b"")
    (made.folder / "run" / "results.parquet").unlink()
    ledger = warned(made, "the cell's training is lost, and it is trained again")
    assert [pending.cell_id for pending in ledger.pending] == [cell]
    ledger.begin()
    finish(made.run, ledger.pending[0], ledger)
    assert made.ledger().pending == []


@pytest.mark.parametrize("content", [b"", b"name: damage\n", b"name: [", b"name: damage\ngrid: 3\n"])
def test_a_cut_sweep_yaml_is_damaged_and_can_be_removed(made: Made, content: bytes) -> None:
    path = made.folder / "run" / "sweep.yaml"
    path.write_bytes(content)
    assert_one_line(saescale_here("report", made.run.url), "sweep.yaml is damaged", "remove it")
    with pytest.raises(SaescaleError, match=r"sweep\.yaml is damaged .* remove it"):
        made.ledger()
    path.unlink()
    ledger = made.ledger()
    assert ledger.pending == []
    ledger.write_spec()
    assert made.ledger().document == ledger.document


def test_what_is_newer_says_so(made: Made) -> None:
    cell = first_cell(made)
    fits, driver = made.folder / "run" / "fits.json", made.folder / "run" / "driver-00001.json"
    made.run.write_json("fits.json", {"format": 2, "laws": []})
    driver.write_text(driver.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(SaescaleError, match=r"fits\.json has format 2, this saescale reads up to 1; upgrade"):
        _ = open_run(made.run.url).fits
    assert_one_line(saescale_here("status", made.run.url), "driver-00001.json has format 2", "upgrade saescale")
    weights = Path(made.run.cell_url(cell), "sae.safetensors")
    (weights.parent / "result.json").unlink()
    weights.write_bytes(weights.read_bytes().replace(b'\\"precision\\"', b'\\"precisiom\\"'))
    with pytest.raises(SaescaleError, match="was it written by a newer saescale"):
        native.read(str(weights.parent))
    assert fits.exists()


def test_a_report_is_not_current_when_evaluations_came_after_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saescale.scaling.report.report.draw_figures", lambda *_: [])
    assert is_current(made.run, FitSettings(0))
    made.run.write_evals(first_cell(made), "mine", [{"metric": "m", "value": 1.0}])
    assert not is_current(made.run, FitSettings(0))
    analyse(made.run, FitSettings(0))
    assert is_current(made.run, FitSettings(0))
    (made.folder / "run" / "evals.parquet").write_bytes(b"")
    assert_one_line(saescale_here("report", made.run.url), "evals.parquet is damaged (it is empty); remove it and run")


def test_a_checkpoint_pointer_that_was_altered_is_not_believed(tmp_path: Path) -> None:
    url = str(tmp_path)
    checkpoint.save(url, 3, {"a": torch.ones(2).numpy()}, {"lr": 0.25})
    pointer = tmp_path / "latest.json"
    pointer.write_text(pointer.read_text().replace("0.25", "0.75"))
    with pytest.warns(SaescaleWarning, match="checksum is another.*starts from the beginning"):
        assert checkpoint.steps(url) == []
    pointer.write_text('{"format": 2}')
    with pytest.raises(SaescaleError, match="has format 2"):
        checkpoint.steps(url)


def test_a_run_of_the_first_version_damaged(tmp_path: Path) -> None:
    for kind in ("results.parquet", "curves.parquet", "sweep.yaml", "fits.json", "result.json"):
        run = tmp_path / kind
        shutil.copytree(OLD_RUN, run)
        damage(one_file_of(run, kind), "truncated", 0.5)
        for arguments in (("status", str(run)), ("fit", str(run), "--bootstraps", "0"), ("inspect", str(run))):
            result = saescale_here(*arguments)
            if result.returncode:
                assert_one_line_among_warnings(result.stderr)


# --- sweep files


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.just("1e-3"), st.just([10**19]), st.just(list(range(1, 2_000))),
    st.just({"at": 64, "tokens": 1e300, "exponent": 1e3}), st.just({"at": 1, "value": 1e-3, "exponent": float("nan")}),
)  # fmt: skip
PLACES = ("grid.n_latents", "grid.k", "grid.seed", "grid.cells", "train.tokens", "train.lr", "train.batch_tokens",
          "train.ema", "eval.tokens", "resources.workers", "wandb.project", "train.auxk", "train.settings", "name",
          "store", "out", "grid", "train", "wandb")  # fmt: skip


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(PLACES), VALUES, min_size=1, max_size=3))
def test_any_sweep_file_is_a_sweep_or_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    document: dict[str, Any] = {"name": "any", "store": "store", "out": "out"}
    document |= {"grid": {"n_latents": [32], "k": [2]}, "train": {"tokens": 131_072}}
    for place, value in changed.items():
        section, _, key = place.partition(".")
        there = document.get(section)
        document[section] = (there if isinstance(there, dict) else {}) | {key: value} if key else value
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml_text(document), encoding="utf-8", errors="surrogatepass")
    spec, said = outcome(lambda: load_spec(str(path)))
    if said is None:
        assert 1 <= spec.size <= 100_000
        assert all(0 < cell.tokens < 2**63 for cell in spec.planned())
    else:
        assert "sweep.yaml" in said
        assert "\n" not in said


def test_a_grid_of_a_milliard_cells_and_names_that_wandb_refuses(tmp_path: Path) -> None:
    thousand = list(range(1, 1_001))
    train: dict[str, Any] = {"tokens": 131_072}
    document = {"name": "a", "store": "s", "out": "o", "grid": {"n_latents": thousand, "k": [1], "seed": thousand}}
    with pytest.raises(SaescaleError, match="grid: 1,000,000 cells are more than the 100,000 of a sweep"):
        parse_spec(document | {"train": train}, "sweep")
    document["grid"] = {"n_latents": [8], "k": [2]}
    for key in ("project", "entity"):
        for name, said in (
            ("a/b", "takes no name with /"),
            ("50%?", "% ?"),
            ("x" * 129, "128"),
            (" a", "spaces"),
            ("", "W&B"),
        ):
            with pytest.raises(SaescaleError, match=rf"wandb\.{key}: .*{re.escape(said)}"):
                parse_spec(document | {"train": train, "wandb": {key: name}}, "sweep")
        parse_spec(document | {"train": train, "wandb": {key: "größe_1.2-x"}}, "sweep")
