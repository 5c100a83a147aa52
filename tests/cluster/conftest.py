"""One Ray cluster of three nodes for all tests of this folder, and sweeps small enough to run on it."""

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import yaml

from saescale.cluster.sweep.spec import SweepSpec
from saescale.storage.columns import CURVES
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.training.train import PackJob, train_pack
from tests.cluster.forked_workers import forked_workers
from tests.survival import reached
from tests.trainers.synthetic import sparse_rows, write_store

# A PNG of one white pixel, and what else is made of a figure.
BLANK = {
    "png": base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
    ),
    "pdf": b"%PDF-1.4",
    "svg": b"<svg/>",
}
NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}  # the GPU is a fake


@pytest.fixture(scope="session")
def three_nodes(s3_endpoint: str) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` of three nodes, one CPU and one fake GPU each; the session is connected to it.

    It needs `s3_endpoint` so that the nodes inherit the environment that points at the S3 server.
    """
    import ray
    from ray.cluster_utils import Cluster

    # Ray's own ten seconds between two exports of its metrics are longer than the tests' sweeps.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    with forked_workers() as forked:
        NODE.update(forked)
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        for _ in range(2):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this process end with blank still pictures: painting them takes longer than training. What they
    show is held by tests/scaling; a process of its own paints them."""
    monkeypatch.setattr("saescale.scaling.figures.paper.draw", lambda view: BLANK)


@pytest.fixture(autouse=True)
def watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps of this process are looked at ten times a second: those of the tests are over after a few of the usual
    turns, and who waits for a moment in one might miss it."""
    monkeypatch.setattr("saescale.cluster.crew.crew.POLL_S", 0.1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    url = str(tmp_path_factory.mktemp("cluster") / "store")
    write_store(url, sparse_rows(16_384, seed=0), sparse_rows(2_048, seed=1))
    return ActivationStore.open(url)


@pytest.fixture
def document(store: ActivationStore, tmp_path: Path) -> dict[str, Any]:
    """A valid sweep over `store`: 3 x 3 cells of a few seconds."""
    return {
        "name": "small",
        "store": store.url,
        "out": str(tmp_path / "run"),
        "grid": {"n_latents": [32, 64, 128], "k": [2, 4, 8]},
        "train": {
            "tokens": 16_384,
            "batch_tokens": 256,
            "lr": {"at": 64, "value": 3e-3},
            "auxk": {"k": 8, "dead_after_tokens": 4_096},
            "ema": 0.9,
            "precision": "fp32",  # so that results do not depend on the processor
        },
        "eval": {"tokens": 2_048, "every_tokens": 4_096, "evaluations": []},
        "resources": {"workers": 2, "checkpoint_every_s": 0.2},
        "wandb": {"mode": "off"},
    }


@pytest.fixture
def two_stores(document: dict[str, Any], store: Any, tmp_path: Path) -> list[str]:
    """The one of `document`, and one of layer 3 that is wider, so that its packs come first; `document` is a sweep
    over both."""
    wide = [np.tile(sparse_rows(rows, seed), 2)[:, :48].copy() for rows, seed in ((16_384, 2), (2_048, 3))]
    document["store"] = [store.url, write_store(str(tmp_path / "wide"), *wide, layer=3)]
    document["grid"] = {"n_latents": [32, 64], "k": [2, 4]}
    return document["store"]


def trained_alone(spec: SweepSpec) -> dict[str, Any]:
    """What the cells of `spec` reach (survival.py) where each store's are trained in this process, as one pack."""
    run, rows = RunDirectory(f"{spec.out}-alone"), []
    for url in spec.stores:
        cells = spec.cells(ActivationStore.open(url), "fp32")
        job = PackJob(cells=cells, store=url, run=run.url, sweep=spec.name, eval=spec.eval, threads=1)
        rows += train_pack(job).results
    run.write_results(rows)
    curves = [point for row in rows for point in run.read_cell_curve(row["cell_id"])]
    run.write_curves(pa.Table.from_pylist(curves, CURVES))
    return reached(run)


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(document: dict[str, Any]) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    return write


def processes(title: str) -> list[psutil.Process]:
    """Actors on the nodes that this process started, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{title}"):
                found.append(process)
    return found


class Recorder:
    """A display that remembers; `during` is called with every progress."""

    def __init__(self, during: Callable[[Standing], None] = lambda progress: None) -> None:
        self.stages: list[str] = []
        self.seen: list[Standing] = []
        self.evaluated: list[tuple[int, int, float | None]] = []
        self.during = during

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def sweep(self, progress: Standing) -> None:
        self.seen.append(progress)
        self.during(progress)

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None:
        self.evaluated.append((done, total, left_s))
