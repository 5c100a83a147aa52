"""Sweeps on a real three-node Ray cluster: results, kills, resume, the ledger, W&B files."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.crew import precision as crew_precision
from saescale.cluster.crew import train_crew
from saescale.cluster.crew.claims import Resources
from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.sweep import driver
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.cluster.sweep.status import read_status
from saescale.cluster.sweep.stores import verify
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report.report import analyse
from saescale.storage import registry
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.lease import Lease, Standing
from saescale.storage.rundir import RunDirectory
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.evals.run import evaluate_run
from saescale.trainers.exchange import native
from saescale.trainers.precision import Precision, Processor, cpu_precision, this_processor
from tests.cluster.conftest import Recorder, trained_alone
from tests.survival import assert_same, reached


@pytest.fixture(scope="module")
def crews(three_nodes: Any) -> Iterator[list[TrainCrew]]:
    """At most one: two workers for all tests that neither end them nor are about their start."""
    started: list[TrainCrew] = []
    yield started
    for crew in started:
        crew.close()


@pytest.fixture
def warm(crews: list[TrainCrew], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps get the workers that are there, and leave them, unless they end in an error: such workers are done for."""

    @contextmanager
    def lent(
        cells: int, resources: Resources, address: str | None, auto: str | None, taken: Any = None
    ) -> Iterator[TrainCrew]:
        if not crews:
            crews.append(TrainCrew(9, resources, address))
        try:
            yield crews[0]
        except BaseException:
            crews.pop().close()
            raise

    monkeypatch.setattr(train_crew, "TrainCrew", lent)


# --- with workers of their own, which are told to stop; first, since those of the others keep two of three GPUs


@pytest.mark.slow
def test_warnings_of_workers_reach_the_user(three_nodes: Any, document: dict[str, Any]) -> None:
    """A damaged checkpoint is met in a worker process; the driver says so, and the result is the same."""
    document["grid"] = {"n_latents": [64], "k": [2]}
    document["train"]["tokens"] = 262_144

    def interrupt(progress: Standing) -> None:
        if len(list(Path(document["out"]).glob("cells/*/checkpoint/*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(parse_spec(document, "test"), Recorder(interrupt), settings=FitSettings(10))
    newest = max(Path(document["out"]).glob("cells/*/checkpoint/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-8] + b"garbage!")
    with pytest.warns(SaescaleWarning, match="cannot be used, going back to the one before"):
        outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert outcome.run.read_results().to_pylist()[0]["status"] == "done"


@pytest.mark.slow
def test_a_report_made_half_way_is_made_again_when_the_sweep_is_done(
    three_nodes: Any, document: dict[str, Any]
) -> None:
    document["train"]["tokens"] = 131_072

    def interrupt(progress: Standing) -> None:
        if progress.done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(parse_spec(document, "test"), Recorder(interrupt), settings=FitSettings(10))
    run = RunDirectory(document["out"])
    half = analyse(run, settings=FitSettings(10)).document
    assert half["cells"] < 9
    whole = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert whole.fits["cells"] == 9


def test_auto_precision_is_the_same_for_all_cells_and_workers_of_another_kind_say_so(
    three_nodes: Any, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cpu_precision(this_processor())  # of the workers, which are processes of this machine
    other: Precision = "fp32" if real == "bf16" else "bf16"
    here = Processor("AuthenticAMD", {"avx512_bf16"} if other == "bf16" else set())
    monkeypatch.setattr(crew_precision, "this_processor", lambda: here)
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    document["train"]["precision"] = "auto"
    document["resources"] |= {"workers": 1, "gpus_per_worker": 0}
    with pytest.warns(SaescaleWarning, match=f"precision: auto is {other} for all .* made for {real}"):
        outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    spec = outcome.run.read_spec()
    assert spec is not None
    assert spec["resolved"]["precision"] == other
    cells = [native.read(outcome.run.cell_url(row["cell_id"])).cell for row in outcome.run.read_results().to_pylist()]
    assert [cell.precision for cell in cells] == [other, other]


def test_a_sweep_knows_its_cells_before_there_are_workers(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_ledger = [], driver.open_ledger

    def opening(*arguments: Any) -> Any:
        opened.append(open_ledger(*arguments))
        return opened[-1]

    def no_workers(*_: Any) -> None:
        raise SaescaleError("no workers today")

    monkeypatch.setattr(driver, "open_ledger", opening)
    monkeypatch.setattr(train_crew, "TrainCrew", no_workers)
    document["train"]["precision"] = "auto"
    document["resources"]["gpus_per_worker"] = 0
    with pytest.raises(SaescaleError, match="no workers today"):
        run_sweep(parse_spec(document, "test"), Recorder())
    assert [len(ledger.pending) for ledger in opened] == [9]


# --- with workers that are there


def test_a_finished_sweep_is_not_trained_again(warm: None, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    first = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    again = Recorder()
    second = run_sweep(parse_spec(document, "test"), again, settings=FitSettings(10))
    assert (first.trained, second.trained) == (2, 0)
    assert second.fits == first.fits
    assert again.stages == []


def test_results_whose_driver_died_before_the_ledger_are_kept(warm: None, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    wanted = outcome.run.read_results().to_pylist()
    outcome.run.write_results([{"cell_id": row["cell_id"], "status": "pending"} for row in wanted])
    again = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert again.trained == 0
    assert again.run.read_results().to_pylist() == wanted


def test_a_driver_that_died_while_it_fitted_is_succeeded(
    warm: None, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    document["grid"] = {"n_latents": [32], "k": [2]}

    def full(*_: Any, **__: Any) -> None:
        raise SaescaleError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "analyse", full)
        with pytest.raises(SaescaleError, match="disk full"):
            run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert read_status(document["out"]).state == "failed"
    with Lease(document["out"]), pytest.raises(SaescaleError, match="driven by another process"):
        run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert outcome.trained == 0
    assert read_status(document["out"]).state == "finished"


def test_another_sweep_in_the_run_directory_is_refused(warm: None, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32], "k": [2]}
    run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    before = RunDirectory(document["out"]).read_results().to_pylist()
    document["train"]["ema"] = 0.5
    with pytest.raises(SaescaleError, match=r"holds another sweep \(train.ema is 0.9 there and 0.5 here\)"):
        run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert RunDirectory(document["out"]).read_results().to_pylist() == before


def test_a_sweep_over_two_stores_trains_each_cell_as_by_itself(
    warm: None, document: dict[str, Any], two_stores: list[str]
) -> None:
    spec = parse_spec(document, "test")
    outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    assert (outcome.trained, outcome.failed) == (8, 0)
    assert {(row["site"], row["d_model"]) for row in outcome.run.read_results().to_pylist()} == {
        ("resid_post.0", 32), ("resid_post.3", 48),
    }  # fmt: skip
    assert_same(reached(outcome.run), trained_alone(spec))


@pytest.mark.slow  # it ends its workers, twice
@pytest.mark.parametrize("part", ["", "train-00000.parquet"], ids=["whole", "a shard"])
def test_a_store_that_vanishes_does_not_keep_the_others_from_being_trained(
    warm: None, document: dict[str, Any], two_stores: list[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    gone, away = Path(two_stores[1], part), Path(two_stores[1] + "-away")

    def verified(*arguments: Any) -> None:
        verify(*arguments)
        gone.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "verify", verified)
        with (
            pytest.warns(SaescaleWarning, match="its cells wait, those of other stores go on"),
            pytest.raises(SaescaleError, match=f"4 cells over {two_stores[1]} are left") as caught,
        ):
            run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    assert str(gone) in str(caught.value).split("; 4 cells")[0]
    run = RunDirectory(document["out"])
    assert {(row["site"], row["status"]) for row in run.read_results().to_pylist()} == {
        ("resid_post.0", "done"), ("resid_post.3", "pending"),
    }  # fmt: skip
    assert read_status(run.url).state == "failed"
    away.rename(gone)
    again = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    assert (again.trained, again.failed) == (4, 0)


def test_axes_and_an_architecture_of_ones_own_in_one_sweep(
    warm: None, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates, AuxK and batches are axes; the workers have the file from the driver alone."""
    monkeypatch.setattr(registry, "_GIVEN", {})
    page = (Path(__file__).parents[2] / "trainers" / "architectures" / "README.md").read_text()
    file = tmp_path / "my-toy.py"
    file.write_text(page.split("```python\n")[1].split("```")[0])
    document["grid"] = {"n_latents": 32, "k": 2, "architecture": ["topk", "my_toy"]}
    document["train"] |= {"tokens": 4_096, "lr": [1e-3, 3e-3], "batch_tokens": [128, 256], "ema": 0.9}
    document["train"] |= {"auxk": {"k": [0, 8], "dead_after_tokens": 1_024}, "settings": {"my_toy": {"share": 0.2}}}
    with pytest.raises(SaescaleError, match=r"unknown architecture 'my_toy'.* given with --architecture-file"):
        parse_spec(document, "test")
    ARCHITECTURES.give(str(file))
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    rows = outcome.run.read_results().to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    there = Counter((row["architecture"], row["lr"], row["batch_tokens"], row["k_aux"]) for row in rows)
    ways = list(itertools.product([1e-3, 3e-3], [128, 256]))
    wanted = [("topk", *way, k_aux) for way in ways for k_aux in (0, 8)] + [("my_toy", *way, None) for way in ways]
    assert there == Counter(wanted)
    assert (Path(outcome.run.url) / "architectures" / "my_toy.py").read_text() == file.read_text()
    # What was an axis did something; without a dead latent AuxK does nothing.
    assert len({row["nmse"] for row in rows if not row["k_aux"]}) == 8

    # Again it is the same sweep, from its own sweep.yaml too; with another file, or without one, it is not.
    recorded = outcome.run.read_spec()
    assert recorded is not None
    assert run_sweep(parse_spec(recorded, "sweep.yaml"), Recorder(), settings=FitSettings(0)).trained == 0
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(SaescaleError, match=r"file of the architecture my_toy has changed .*architectures/my_toy\.py"):
        run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(0))
    monkeypatch.setattr(registry, "_GIVEN", {})
    with pytest.raises(SaescaleError, match="my_toy is an architecture of your own, whose file is not here: give it"):
        parse_spec(recorded, "sweep.yaml")
    assert read_status(outcome.run.url).counts.done == 12
    # What can be measured without the file is; for all cells that need it there is one line.
    evaluated = evaluate_run(outcome.run.url, ["nmse"])
    assert (evaluated.measured, evaluated.failed) == (8, 4)
    (said,) = evaluated.why
    assert said.startswith("nmse of 4 cells: my_toy is an architecture of your own, whose file is not here: give it")


def test_a_poisoned_cell_fails_beside_healthy_ones(warm: None, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    document["train"]["lr"] = {"at": 32, "value": 1e-3, "exponent": 70.0}  # 1.2e18 at 64 latents
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    rows = {row["n_latents"]: row for row in outcome.run.read_results().to_pylist()}
    assert outcome.failed == 1
    assert rows[32]["status"] == "done"
    assert rows[64]["status"] == "failed"
    assert "diverged" in rows[64]["error"]


@pytest.mark.slow
def test_a_sweep_in_object_storage_with_wandb_offline(
    warm: None, document: dict[str, Any], store: Any, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fsspec

    from saescale.storage.files import join, list_names

    target = fsspec.filesystem("s3")
    target.put(store.url + "/", join(s3_url, "store"), recursive=True)
    monkeypatch.setenv("SAESCALE_CACHE", str(tmp_path / "cache"))
    document |= {"store": join(s3_url, "store"), "out": join(s3_url, "run"), "wandb": {"mode": "offline"}}
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    assert outcome.trained == 2
    assert "report.html" in list_names(document["out"])
    assert {row["status"] for row in outcome.run.read_results().to_pylist()} == {"done"}


def test_wandb_offline_runs_lie_in_the_run_directory(warm: None, document: dict[str, Any]) -> None:
    document["grid"] = {"n_latents": [32, 64], "k": [2]}
    document["wandb"] = {"mode": "offline"}
    outcome = run_sweep(parse_spec(document, "test"), Recorder(), settings=FitSettings(10))
    runs = list((Path(outcome.run.url) / "wandb").glob("offline-run-*"))
    assert len(runs) == 3  # two cells and the summary
    assert outcome.wandb is not None
    assert "wandb sync" in outcome.wandb


def test_a_sweep_that_cannot_be_planned_leaves_nothing(warm: None, document: dict[str, Any]) -> None:
    document["train"] |= {"batch_tokens": 2**30, "tokens": 2**30}
    with pytest.raises(SaescaleError, match=r"needs .* GiB.* each has"):
        run_sweep(parse_spec(document, "test"), Recorder())
    assert not Path(document["out"]).exists()


def test_too_few_held_out_rows_are_named_before_training(document: dict[str, Any]) -> None:
    document["eval"]["tokens"] = 4_096
    with pytest.raises(SaescaleError, match=r"holds 2048 heldout rows and eval\.tokens asks for 4096"):
        run_sweep(parse_spec(document, "test"), Recorder())
    assert not Path(document["out"]).exists()
