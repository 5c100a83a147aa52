"""The pages: what they point to is there, their tables are those of the published results, their Python runs."""

import re
import subprocess
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import document
from saescale.scaling.report.report import analyse
from saescale.scaling.tables import load_rows
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.architecture import find_architecture
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals import downstream_loss
from saescale.trainers.training.train import PackJob, train_pack
from tests import published
from tests.benchmarks.readme_tables import tables
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "tests/benchmarks/README.md").read_text()
PAGES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_resolve(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    local = [link for link in links if link and not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_floor_and_room_with_a_door_has_a_page() -> None:
    rooms = ("architectures", "subjects", "evals", "exchange", "mesh", "kernels", "harvest")
    folders = ["storage", "scaling", "scaling/laws", "trainers", *(f"trainers/{room}" for room in rooms), "cluster"]
    assert [folder for folder in folders if ROOT / folder / "README.md" not in PAGES] == []
    assert len(README.splitlines()) <= 120


def test_every_setting_of_an_architecture_is_on_the_page() -> None:
    page = (ROOT / "trainers/architectures/README.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    said = {(name, own) for row in rows for name in re.findall(r"`(\w+)`", row[0]) for own in row[1].split(", ")}
    there = {
        (name, architecture)
        for architecture in ARCHITECTURES.names()
        for name in find_architecture(architecture).Settings.model_fields
        if name != "k"
    }
    assert there - said == set()
    assert {pair for pair in said if pair[1] in ARCHITECTURES.names()} - there == set()


@pytest.mark.parametrize("path", published.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_say_of_the_published_run_what_its_files_say(path: Path) -> None:
    assert path.read_text() == published.PAGES[path].page(path), "run python -m tests.published"


@pytest.mark.parametrize("data_set", published.DATA_SETS)
def test_the_published_results_are_the_same_in_both_forms_and_end_where_their_curves_do(data_set: str) -> None:
    folder = published.DATA_SETS[data_set].folder
    for name in ("results", "curves"):
        text, table = (load_rows(str(folder / f"{name}.{form}")) for form in ("csv", "parquet"))
        assert text.columns.keys() == table.columns.keys()
        for column in (name for name in text.columns if name not in ("status", "error")):
            assert [*map(str, text[column])] == [*map(str, table[column])], column
    results, curves = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("results", "curves"))
    for row in results:
        last = max((point for point in curves if point["cell_id"] == row["cell_id"]), key=lambda point: point["step"])
        assert [row[name] for name in ("tokens", "flops", "nmse")] == [last[n] for n in ("tokens", "flops", "nmse")]
        assert 0 < row["flops"] <= row["flops_dense"]
        if row.get("architecture", "topk") == "topk":  # others score fewer latents, or take dense steps
            assert 2 * row["n_latents"] * row["d_model"] * row["tokens"] < row["flops"] < row["flops_dense"]


def test_the_version_is_that_of_the_newest_changes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert project["version"].removesuffix(".dev0") == newest[1]


@pytest.mark.parametrize(("name", "table"), tables().items())
def test_tables_of_benchmarks_are_those_of_their_results(name: str, table: str) -> None:
    assert table in BENCHMARKS, f"run python -m tests.benchmarks.readme_tables and take its table of {name} over"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a run where the pages' Python expects the quickstart's."""
    folder = tmp_path_factory.mktemp("home")
    url = write_store(str(folder / "stores/smollm2-135m-l22"), sparse_rows(8_192, 0), sparse_rows(1_024, 1))
    shared = {
        "store": ActivationStore.open(url).identity, "d_model": D_MODEL, "tokens": 4_096, "batch_tokens": 256,
        "lr": 3e-3, "dead_after_tokens": 2_048, "ema": 0.9,
    }  # fmt: skip
    cells = [Cell.model_validate(shared | {"n_latents": n, "k": k}) for n in (64, 128, 256, 512) for k in (2, 4, 8)]
    out = str(folder / "runs/quickstart")
    done = train_pack(
        PackJob(cells=cells, store=url, run=out, sweep="pages", eval=EvalSpec(tokens=1_024, every_tokens=2_048))
    )
    run = RunDirectory(out)
    run.write_spec({"name": "pages", "store": url, "resolved": {}})
    run.write_results(done.results)
    for row in done.results:  # as if a language model had been there
        kl = {"metric": "kl", "value": 3 * row["nmse"] * row["k"] ** -0.1}
        run.write_evals(row["cell_id"], "downstream_loss", [kl], document("downstream_loss", downstream_loss.metrics))
    analyse(run, FitSettings(bootstraps=0))
    best = min(done.results, key=lambda row: row["nmse"])["cell_id"]
    (folder / "runs/quickstart/cells/CELL").symlink_to(folder / "runs/quickstart/cells" / best)
    return folder


@pytest.mark.parametrize("page", ["README.md", "saescale/README.md"])
def test_the_python_of_the_pages_runs(page: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {"activations": torch.from_numpy(sparse_rows(32, 2).astype("float32"))}
    exec(compile(block, page, "exec"), names)
    assert names["latents"].shape == (32, 512)
    assert names["x_hat"].shape == names["activations"].shape
