"""The examples of clusters: they parse, ask for a token, and hold no secret. Nothing here starts one."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.command import ROOT

DEPLOY = ROOT / "deploy"


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_cluster_of_ray_up() -> None:
    import jsonschema
    import ray.autoscaler

    cluster = load("ray-cluster.yaml")
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starting = [command for command in commands if "ray start" in command]
        assert starting
        assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starting)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_cluster_of_kuberay() -> None:
    cluster = load("kuberay.yaml")["spec"]
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["enableInTreeAutoscaling"] is True
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    for environment in (cluster["autoscalerOptions"]["env"], *(container["env"] for container in containers)):
        values = {entry["name"]: entry for entry in environment}
        assert values["RAY_AUTH_MODE"]["value"] == "token"
        for name in {"RAY_AUTH_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} & set(values):
            assert set(values[name]["valueFrom"]) == {"secretKeyRef"}
        assert "RAY_AUTH_TOKEN" in values


def test_the_image_has_the_versions_that_were_tested() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{pinned('ray')}-py311" in text
    for source in re.findall(r"^COPY --\S+ (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
