"""What a scrape of Ray's metrics ports shows while a sweep runs, and that the Grafana dashboard asks for just that."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from saescale.cluster.crew import metrics
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.spec import parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage.errors import SaescaleWarning
from saescale.storage.rundir import RunDirectory
from saescale.trainers.training.train import PackJob
from tests.cluster.conftest import Recorder

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy/grafana/saescale.json").read_text())
QUERIES = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
OURS, ANY = re.compile(r"ray_saescale_\w+"), re.compile(r"\bray_\w+")
GAUGES = {
    *("ray_saescale_stream_tokens_per_second", "ray_saescale_sae_tokens_per_second", "ray_saescale_stream_wait_ratio"),
    *("ray_saescale_cells_running", "ray_saescale_nmse_ratio", "ray_saescale_dead_fraction_ratio"),
}


def scrape() -> list[Sample]:
    """What the nodes that are up export under the names of the dashboard, or under names like them."""
    wanted = re.compile("saescale|" + "|".join({name for query in QUERIES for name in ANY.findall(query["expr"])}))
    samples: list[Sample] = []
    for port in (node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                lines = [line for line in answer.read().decode().splitlines() if wanted.search(line)]
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                continue  # a node that another test has just killed or begun, and that has no workers of this one
            raise
        families = text_string_to_metric_families("\n".join(lines) + "\n")
        samples += [sample for family in families for sample in family.samples]
    return samples


@contextmanager
def scraping() -> Iterator[list[list[Sample]]]:
    """Scrapes until it is left, more often than a gauge that is not set any more takes to go."""
    seen: list[list[Sample]] = []
    left = threading.Event()

    def keep_scraping() -> None:
        while not left.wait(0.3):
            seen.append(scrape())

    thread = threading.Thread(target=keep_scraping)
    thread.start()
    try:
        yield seen
    finally:
        left.set()
        thread.join()


def of_sweep(samples: list[Sample], sweep: str) -> list[Sample]:
    return [sample for sample in samples if sample.labels.get("sweep") == sweep]


def total(samples: list[Sample], name: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name)


def labels_of(query: dict[str, Any]) -> set[str]:
    """Those that one of the dashboard's queries, or the legend that goes with it, names."""
    selectors = re.findall(r"(\w+)=~?\"", query["expr"])
    lists = re.findall(r"\b(?:by|on) \(([^)]*)\)", query["expr"])
    return {*selectors, *re.findall(r"\w+", " ".join(lists)), *re.findall(r"\{\{(\w+)\}\}", query["legendFormat"])}


@pytest.mark.slow
def test_what_a_sweep_exports_is_what_the_dashboard_asks_for(three_nodes: Any, document: dict[str, Any]) -> None:
    name = f"watched-{time.time_ns()}"  # since counters of another one in this cluster stay
    document |= {"name": name, "grid": {"n_latents": [32, 64], "k": [2, 4]}}
    document["train"]["tokens"] = 524_288  # some seconds, or no export falls into them
    document["train"]["lr"] = {"at": 32, "value": 1e-3, "exponent": 70.0}  # the cells of 64 latents fail
    recorder = Recorder()
    with scraping() as seen:
        run = run_sweep(parse_spec(document, "test"), recorder, settings=FitSettings(10)).run
    seen.append(scrape())
    check_names(seen, name)
    check_values([of_sweep(samples, name) for samples in seen], run)
    packs = total(of_sweep(seen[-1], name), "ray_saescale_packs_finished_total")
    assert f"training 4 cells in {packs:.0f} pack{'s' * (packs != 1)}" in recorder.stages

    # What has ended is not shown for ever.
    deadline = time.monotonic() + 60
    while {sample.name for sample in of_sweep(scrape(), name)} & GAUGES and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {sample.name for sample in of_sweep(scrape(), name)} == {s.name for s in of_sweep(seen[-1], name)} - GAUGES


def check_names(seen: list[list[Sample]], sweep: str) -> None:
    """Nothing is asked for that is not there, and nothing of ours is there that no panel shows."""
    names = {sample.name for samples in seen for sample in of_sweep(samples, sweep)}
    assert names == {name for query in QUERIES for name in OURS.findall(query["expr"])}
    assert names >= {name for variable in VARIABLES for name in OURS.findall(variable)}
    labels: dict[str, set[str]] = {}
    for sample in (sample for samples in seen for sample in samples):
        labels.setdefault(sample.name, set()).update(sample.labels)
    for query in QUERIES:
        named = [labels[name] for name in ANY.findall(query["expr"])]
        assert labels_of(query) <= set.union(*named), query
        assert set(re.findall(r"\bon \((\w+)\)", query["expr"])) <= set.intersection(*named), query


def check_values(seen: list[list[Sample]], run: RunDirectory) -> None:
    """What was exported is what the run directory says. The last of `seen` is from after the workers' end."""
    exported = [sample for samples in seen for sample in samples]
    rows = {row["cell_id"]: row for row in run.read_results().to_pylist()}
    curves = run.read_curves().to_pylist()
    for name, column in (("ray_saescale_nmse_ratio", "nmse"), ("ray_saescale_dead_fraction_ratio", "dead_fraction")):
        cells = [sample for sample in exported if sample.name == name]
        values = {(sample.labels["cell_id"], sample.value) for sample in cells}
        assert values <= {(row["cell_id"], row[column]) for row in curves}
        assert values >= {(cell_id, row[column]) for cell_id, row in rows.items() if row["status"] == "done"}
        for labels in (sample.labels for sample in cells):
            assert all(labels[key] == str(rows[labels["cell_id"]][key]) for key in ("n_latents", "k", "seed"))
    running = {total(samples, "ray_saescale_cells_running") for samples in seen}
    assert 2 in running
    assert max(running) <= 4  # before those that fail have failed
    assert max(total(samples, "ray_saescale_sae_tokens_per_second") for samples in seen) > 0
    assert all(0 <= sample.value <= 1 for sample in exported if sample.name == "ray_saescale_stream_wait_ratio")
    assert total(seen[-1], "ray_saescale_cells_running") == total(seen[-1], "ray_saescale_sae_tokens_per_second") == 0
    assert total(seen[-1], "ray_saescale_cells_done_total") == total(seen[-1], "ray_saescale_cells_failed_total") == 2
    assert total(seen[-1], "ray_saescale_sae_tokens_total") == sum(row["tokens"] for row in rows.values())


def test_metrics_that_fail_are_off_and_fail_no_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no such metric")

    monkeypatch.setattr(metrics, "Gauge", refuse)
    worker = metrics.WorkerMetrics()
    job = PackJob.model_construct(cells=[], sweep="broken")
    with pytest.warns(SaescaleWarning, match="exports no metrics any more: ValueError: no such metric"):
        worker.start(job)
    worker.update(metrics.NOTHING)
    worker.end()
    worker.start(job)
