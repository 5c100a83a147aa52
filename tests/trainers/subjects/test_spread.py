"""Models whose layers lie in memory and on the disk: the streams and logits of the whole model, bit for bit."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from saescale.cluster.cli import app
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import EvalSpec
from saescale.trainers.evals.bench import Bench
from saescale.trainers.evals.plan import Pair
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.spread import most_memory
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.training.train import train_pack
from tests.trainers.live_case import cell_of, job_of


def most_of(subject: Any) -> str:
    """A device map with room in memory for three quarters of the model."""
    return f"cpu={sum(each.numel() * each.element_size() for each in subject.model.parameters()) * 3 // 4}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams_and_logits_of_a_spread_model_are_those_of_the_whole(tiny_subject: str, dtype: str) -> None:
    told: list[str] = []
    whole: Any = get_subject(tiny_subject, dtype=dtype)
    spread: Any = get_subject(tiny_subject, dtype=dtype, device_map=most_of(whole), notify=told.append)
    assert {each.device.type for each in spread.model.parameters()} == {"cpu", "meta"}  # meta: on the disk
    assert re.search(r"is spread: of its parts \d on cpu, \d on disk$", told[-1])
    assert spread.fingerprint == whole.fingerprint
    ids = torch.randint(whole.embedded, (3, 24), generator=torch.Generator().manual_seed(0))
    sites = [Site(layer=layer, positions="all") for layer in range(whole.n_layers)]
    middle = sites[whole.n_layers // 2]

    def answers(subject: Any) -> list[torch.Tensor]:
        plain = subject.run(ids, sites, logits=True)
        patched = subject.run(ids, sites, {middle: lambda stream: stream * 0.5}, logits=True)
        early = subject.run(ids, sites[:1])
        resumed = subject.resume(ids, middle, plain.resid[middle.layer])
        return [*plain.resid, plain.logits, *patched.resid, patched.logits, *early.resid, resumed]

    for found, expected in zip(answers(spread), answers(whole), strict=True):
        assert torch.equal(found, expected)


def test_a_harvest_of_a_spread_model_writes_the_same_store(tiny_subject: str, tiny_corpus: str, tmp_path: Path) -> None:
    def spec(name: str, **more: str) -> HarvestSpec:
        return HarvestSpec(
            subject=tiny_subject, layer=2, corpus=tiny_corpus, out=str(tmp_path / name), tokens=1_024,
            heldout_tokens=256, context_length=32, compute_dtype="float32", **more,
        )  # fmt: skip

    harvest(spec("whole"))
    harvest(spec("spread", device_map=most_of(get_subject(tiny_subject, dtype="float32"))))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "spread").iterdir()) == names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()
    # One that was begun on one device may be finished on several.
    (tmp_path / "spread" / "manifest.json").unlink()
    harvest(spec("spread"))
    shutil.rmtree(tmp_path / "spread")


def test_evaluations_of_a_spread_subject_measure_the_same(tiny_subject: str, tiny_corpus: str, tmp_path: Path) -> None:
    """Spread as the live source of the run says, or as whoever measures."""
    url, run = str(tmp_path / "store"), RunDirectory(str(tmp_path / "run"))
    harvest(
        HarvestSpec(
            subject=tiny_subject, layer=2, corpus=tiny_corpus, out=url, tokens=1_024, heldout_tokens=256,
            context_length=32, compute_dtype="float32",
        )
    )  # fmt: skip
    store = ActivationStore.open(url)
    cell = cell_of(store, tokens=512, heldout_rows=256)
    run.write_results(train_pack(job_of(store, run.url, [cell], eval=EvalSpec(tokens=256))).results)
    most, pair = most_of(get_subject(tiny_subject, dtype="float32")), Pair(cell.cell_id, "downstream_loss")
    rows, where = [], []
    for recorded, given in ((None, None), (most, None), ("97=70GB", most)):
        run.write_spec({"name": "a", "store": {"live": {"folder": url, "device_map": recorded}}, "resolved": {}})
        bench = Bench(run, device_map=given)
        measured = bench.measure(pair)
        assert measured.error is None
        rows.append(measured.rows)
        subject: Any = bench.lay_out(cell.cell_id, "downstream_loss").subject
        where.append({each.device.type for each in subject.model.parameters()})
        assert bench.spread == bool(recorded)
    assert rows[0] == rows[1] == rows[2]
    assert where[0] != {"cpu", "meta"}
    assert where[1] == where[2] == {"cpu", "meta"}
    # As the command line has it, to which every device map gets through.
    command = ["eval", run.url, "--evals", "downstream_loss", "--device-map"]
    refused = CliRunner().invoke(app, [*command, "97=70GB,cpu=1GB"])
    assert refused.exit_code == 1
    assert "there is no GPU 97, counted from 0" in refused.output.replace("\n", " ")
    assert len(run.read_evals()) == 0
    assert CliRunner().invoke(app, [*command, most]).exit_code == 0
    found = run.read_evals().to_pylist()
    assert [row["value"] for row in found] == [row.get("value") for row in rows[0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where it fits depends on what is free there")
@pytest.mark.parametrize("device_map", ["auto", "cpu=100GB"])
def test_a_model_that_fits_one_device_lies_there(tiny_subject: str, device_map: str) -> None:
    told: list[str] = []
    whole: Any = get_subject(tiny_subject, dtype="float32")
    found: Any = get_subject(tiny_subject, dtype="float32", device_map=device_map, notify=told.append)
    assert told[-1].endswith("is spread: of its parts 1 on cpu")
    ids = torch.arange(12)[None]
    assert torch.equal(found.run(ids, [], logits=True).logits, whole.run(ids, [], logits=True).logits)


def test_a_gpu_that_is_not_there_is_named(tiny_subject: str) -> None:
    with pytest.raises(SaescaleError, match=r"device_map: there is no GPU 97, counted from 0, of the \d+ here"):
        get_subject(tiny_subject, device_map="97=70GB,cpu=1GB")


@pytest.mark.parametrize(
    ("given", "read"),
    [("auto", None), ("0=70GB, 1=1.5GiB,cpu=10", {0: 70 * 10**9, 1: 3 * 2**29, "cpu": 10})],
)
def test_device_maps_are_read(given: str, read: object) -> None:
    assert most_memory(given) == read


@pytest.mark.parametrize("given", ["", "0", "0=many", "gpu=1GB", "0=70 GB cpu=1GB"])
def test_what_is_no_device_map_is_said(given: str) -> None:
    with pytest.raises(SaescaleError, match="is no memory of a device: give auto, or as 0=70GB"):
        most_memory(given)


@pytest.mark.parametrize(("given", "device"), [("0=70GB,0=10GB", "0"), ("cpu=1GB,1=70GB, cpu=1GB", "cpu")])
def test_a_device_has_one_memory(given: str, device: str) -> None:
    with pytest.raises(SaescaleError, match=f"device_map names the device {device} twice"):
        most_memory(given)


def test_subjects_of_one_device_say_so() -> None:
    with pytest.raises(SaescaleError, match="othello lies on one device; leave device_map out"):
        get_subject("othello", device_map="auto")
