"""The examples of clusters: they parse, follow the schemas of what reads them, ask for a token, and hold no secret.
Nothing here starts one."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.command import ROOT

DEPLOY = ROOT / "deploy"
KEYS = {"WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"}


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


def strict(schema: Any) -> Any:
    """As the API server takes it: it drops keys that it does not know, which are mistakes here."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize(("file", "kind"), [("kuberay.yaml", "RayCluster"), ("kuberay-job.yaml", "RayJob")])
def test_manifests_follow_the_schema_of_kuberay(file: str, kind: str) -> None:
    import jsonschema

    schemas = json.loads((ROOT / "tests" / "data" / "kuberay.json").read_text())
    schema, document = strict(schemas[kind]), load(file)
    schema["properties"]["metadata"] = {}
    jsonschema.validate(document, schema)
    cluster = document["spec"] if kind == "RayCluster" else document["spec"]["rayClusterSpec"]
    # The schema that is held to would notice a slip, in the pods too.
    for path, name in ((cluster, "rayVersions"), (cluster["workerGroupSpecs"][0]["template"]["spec"], "container")):
        path[name] = "2"
        with pytest.raises(jsonschema.ValidationError, match="unexpected"):
            jsonschema.validate(document, schema)
        del path[name]


def containers(found: Any) -> Iterator[dict[str, Any]]:
    """All of a manifest, wherever they stand."""
    if isinstance(found, dict):
        yield from found.get("containers", ())
        for value in found.values():
            yield from containers(value)
    elif isinstance(found, list):
        for value in found:
            yield from containers(value)


@pytest.mark.parametrize("file", ["kuberay.yaml", "kuberay-job.yaml"])
def test_the_clusters_of_kuberay(file: str) -> None:
    document = load(file)
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["enableInTreeAutoscaling"] is True
    # Said to the operator, and not with the containers' environment alone: it would ask the dashboard without a token,
    # and take no job for done.
    assert cluster["authOptions"] == {"mode": "token", "secretName": "saescale-ray"}
    for container in containers(document):
        values = {entry["name"]: entry for entry in container.get("env", ())}
        assert not {name for name in values if name.startswith("RAY_AUTH")}
        for name in KEYS & set(values):
            assert set(values[name]["valueFrom"]) == {"secretKeyRef"}
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["resources"]["limits"] == container["resources"]["requests"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == 0 < workers["maxReplicas"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {entry["name"] for entry in worker["env"]} >= KEYS


def test_a_job_runs_the_sweep_that_is_mounted() -> None:
    job = load("kuberay-job.yaml")["spec"]
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert {mount["name"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["entrypoint"].split()[:2] == ["saescale", "sweep"]
    assert job["entrypoint"].split()[2].startswith(mount["mountPath"])


def copied() -> list[tuple[list[str], str]]:
    """What the Dockerfile copies, and where it lies below /tmp/saescale then."""
    lines = re.findall(r"^COPY --\S+ (.+) (/tmp/saescale\S*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    return [(sources.split(), target.removeprefix("/tmp/saescale").strip("/")) for sources, target in lines]


def test_the_image_has_the_versions_that_were_tested() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{pinned('ray')}-py311-${{DEVICE}}" in text
    # An argument before FROM is not known after it unless it is said again.
    assert re.findall(r"^(ARG|FROM|USER) ?(\S+)", text, re.MULTILINE)[0] == ("ARG", "DEVICE=gpu")
    assert "\nARG DEVICE\n" in text.split("FROM")[1]
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users == ["ray"]
    assert "--constraint /tmp/saescale/constraints.txt" in text


@pytest.mark.slow
def test_what_the_image_copies_is_enough_to_build_from(tmp_path: Path) -> None:
    """The steps of the Dockerfile in a clean folder, but for the dependencies, which this environment has."""
    folder = tmp_path / "saescale"
    assert copied()
    for sources, target in copied():
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, folder / target, ignore=ignored)
            else:
                (folder / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, folder / target)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(folder)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    # All modules of the repository, and the data beside them.
    for top in ("storage", "scaling", "trainers", "cluster"):
        own = {f"saescale/{path.relative_to(ROOT)}" for path in (ROOT / top).rglob("*.py")}
        assert own <= names
    assert "saescale/shipped/synthsaebench-16k.yaml" in names
    assert any(name.startswith("saescale/scaling/data/") for name in names)


def test_commands_of_the_page_exist() -> None:
    """With their options, and with files that are there."""
    import typer

    from saescale.cluster.cli import app

    known: Any = typer.main.get_command(app)
    text = (DEPLOY / "OPERATE.md").read_text()
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("    ")]
    called = re.findall(r"saescale ([a-z]+)(?!\S)([^\n]*)", "\n".join([*lines, (DEPLOY / "slurm.sh").read_text()]))
    assert {"harvest", "sweep", "report", "plan", "submit", "status"} <= {name for name, _ in called}
    for name, rest in called:
        options = {option for parameter in known.commands[name].params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest.split() if word.startswith("--")} <= options, (name, rest)
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (DEPLOY / path).exists(), path
    for path in re.findall(r"\b(deploy/[\w./-]+\.(?:yaml|sh|md))", text):
        assert (ROOT / path).exists(), path
