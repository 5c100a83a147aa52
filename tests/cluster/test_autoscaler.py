"""Ray's own autoscaler under a sweep whose number of workers is left open: from no GPU to several and back to none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.command import ROOT, environment
from tests.cluster.ray_head import ray_head


@pytest.mark.slow
def test_the_cluster_grows_for_a_sweep_and_shrinks_after_it(
    document: dict[str, Any], sweep_file: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    """Two packs, since cells of two batches cannot read one stream, and long enough for a second node to come."""
    document["grid"] = {"n_latents": [64], "k": [4]}
    document["train"] |= {"tokens": 16_384 * 4_000, "batch_tokens": [256, 512]}
    document["eval"]["every_tokens"] = 16_384 * 100
    document["resources"] = {"workers": "auto", "gpus_per_worker": 1, "checkpoint_every_s": 5.0}
    node = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80 * 2**20}, "min_workers": 0, "max_workers": 3}
    token = "a" * 32
    with ray_head(token, 0, ROOT, node) as head:
        command = [sys.executable, "-m", "tests.cluster.autoscaled_sweep", sweep_file(document), head.gcs, "2"]
        result = subprocess.run(
            command, env=environment(RAY_AUTH_TOKEN=token, RAY_AUTH_MODE="token"), cwd=ROOT, text=True,
            capture_output=True, timeout=280,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"before": 0, "training": 2, "nodes": 2, "after": 0}
    # What trained on the nodes that are gone was saved before they went.
    assert len(list(Path(document["out"]).glob("cells/*/checkpoint/latest-*.json"))) == 2
