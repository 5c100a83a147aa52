"""Sweeps on somebody else's cluster: a real Ray head with a dashboard and token authentication."""

import contextlib
import json
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from saescale.cluster.jobs.address import resolve_address, shown
from saescale.cluster.jobs.package import EXTENSION, PACKAGES, write_code, write_sweep
from saescale.cluster.jobs.service import STOP_WAIT_S
from saescale.cluster.sweep.extend import extend, read_extension
from saescale.cluster.sweep.spec import parse_spec
from saescale.cluster.sweep.status import read_status
from saescale.storage import registry
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import Lease, newest_file
from saescale.trainers.architectures import ARCHITECTURES
from tests.cluster.command import ROOT, assert_one_line, environment, saescale, saescale_here
from tests.cluster.ray_head import Head, ray_head
from tests.cluster.shadows import cast_shadows

SECRETS = {
    "WANDB_API_KEY": "wandbmarker" + secrets.token_hex(15),
    "AWS_SECRET_ACCESS_KEY": "awsmarker" + secrets.token_hex(15),
}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Whoever runs the cluster may have packages with the names of saescale's floors.
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_head("tokenmarker" + secrets.token_hex(16), num_cpus=2, path=cast_shadows(Path(folder))) as started,
    ):
        yield started


@pytest.fixture
def client(head: Head, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`saescale` on a machine that knows the token and has secrets of its own; keywords change its environment."""

    here = cast_shadows(tmp_path / "shadows")

    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        known = SECRETS | {"RAY_AUTH_TOKEN": head.token, "RAY_API_SERVER_ADDRESS": head.url, "HOME": str(tmp_path)}
        return saescale(*arguments, cwd=here, **(known | {"RAY_AUTH_MODE": ""} | extra))

    return run


@pytest.fixture
def small(document: dict[str, Any]) -> dict[str, Any]:
    """A sweep of two cells."""
    return document | {"grid": {"n_latents": [32], "k": [2, 4]}, "resources": {"workers": 1, "checkpoint_every_s": 0.2}}


def answer(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def submitted(result: subprocess.CompletedProcess[str], status: int = 0) -> str:
    assert result.returncode == status, result.stdout + result.stderr
    found = re.search(r"submitted (\S+):", result.stdout)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_a_sweep_is_submitted_stopped_and_submitted_again(
    client: Callable[..., Any], head: Head, small: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    small["train"]["tokens"] = 262_144  # long enough to be interrupted on a fast machine
    run, file = Path(small["out"]), sweep_file(small)
    (Path(file).parent / ".env").write_text(f"KEY={SECRETS['WANDB_API_KEY']}")
    first = submitted(client("submit", file, "--bootstraps", "20"))
    assert re.fullmatch(r"small-[0-9a-f]{8}", first)
    wait_for(lambda: list(run.glob("cells/*/checkpoint/step-*.safetensors")))
    with workers_held_up(head, first):
        document = answer(client("status", first, "--json"))
        assert (document["job"]["id"], document["job"]["state"], document["counts"]["cells"]) == (first, "running", 2)
        stopping = client("stop", first)
    assert stopping.returncode == 0, stopping.stderr
    assert f"{first}: stopped; the checkpoints are in {run}" in stopping.stdout
    assert "interrupted; run the same command again" in client("logs", first, "-f").stdout  # it was not killed
    assert {cell.status for cell in read_status(str(run)).cells} <= {"started", "done"}

    followed = client("submit", file, "--bootstraps", "20", "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    second = submitted(followed)
    assert "all 2 cells trained" in followed.stdout
    assert followed.stdout.rstrip().endswith(f"{second}: succeeded")
    jobs = answer(client("list", "--json"))
    assert [(job["id"], job["state"], job["run"]) for job in jobs] == [
        (second, "succeeded", str(run)), (first, "stopped", str(run)),
    ]  # fmt: skip
    _assert_no_secret_went_along(head, second, run, followed.stdout + followed.stderr)

    # What lies here at the path of its run is not taken for it unless its driver says so: the cluster is asked.
    Path(newest_file(str(run))[0]).unlink(missing_ok=True)
    document = answer(client("status", second, "--json"))
    assert (document["sweep"], document["state"], document["counts"]["done"]) == ("small", "finished", 2)
    assert document["job"]["state"] == "succeeded"


def _assert_no_secret_went_along(head: Head, job: str, run: Path, printed: str) -> None:
    details = json.loads(_get(head, f"/api/jobs/{job}"))
    assert details["runtime_env"]["env_vars"] == {"SAESCALE_JOB": job, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    session = head.temporary / "session_latest"
    sweep, *modules = [
        session / "runtime_resources" / kind / uri.removeprefix("gcs://").removesuffix(".zip")
        for kind, uris in (
            ("working_dir_files", [details["runtime_env"]["working_dir"]]),
            ("py_modules_files", details["runtime_env"]["py_modules"]),
        )
        for uri in uris
    ]
    assert [path.name for path in _contents(sweep)] == ["sweep.yaml"]
    top = {path.name for module in modules for path in module.iterdir() if path.name != "__pycache__"}
    assert top == {"saescale", f"saescale-{version('saescale')}.dist-info"}
    uploaded = {path: content for folder in (sweep, *modules) for path, content in _contents(folder).items()}
    written = _contents(run)
    told = {Path("printed"): printed.encode(), Path("job"): json.dumps(details).encode(),
            Path("log"): _get(head, f"/api/jobs/{job}/logs")}  # fmt: skip
    for secret in (*SECRETS.values(), head.token):
        assert not [path for path, content in (uploaded | written | told).items() if secret.encode() in content]
    for secret in SECRETS.values():  # which the head was not started with, so that all its files can be searched
        assert not [path for path, content in _contents(session).items() if secret.encode() in content]


def _contents(folder: Path) -> dict[Path, bytes]:
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Ray removes some while they are read
            if path.is_file():
                found[path] = path.read_bytes()
    assert found
    return found


def _get(head: Head, path: str) -> bytes:
    request = urllib.request.Request(head.url + path, headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@contextlib.contextmanager
def workers_held_up(head: Head, job: str) -> Iterator[None]:
    """Stops the workers on the head until 4 s after their driver was told to end: Ray would kill it after 3."""
    workers = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if str((process.info["cmdline"] or [""])[0]).startswith("ray::Worker")
        and str(head.temporary) in str(process.info["environ"])
    ]
    assert workers
    for worker in workers:
        worker.suspend()
    log = head.temporary / "session_latest" / "logs" / f"job-driver-{job}.log"

    def resume() -> None:
        try:
            wait_for(lambda: "stopping: the workers save their checkpoints" in log.read_text())
            time.sleep(4)
        finally:
            for worker in workers:
                worker.resume()

    resuming = threading.Thread(target=resume)
    resuming.start()
    yield
    resuming.join()


@pytest.mark.slow
def test_what_a_failed_job_says(
    client: Callable[..., Any], small: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    small["store"] += "-missing"
    failed = client("submit", sweep_file(small), "-f")
    job = submitted(failed, status=1)
    document = answer(client("status", job, "--json"))
    assert (document["state"], document["counts"]["cells"]) == ("failed", 0)
    assert f"{small['store']}" in document["reason"]
    assert "\n" not in document["reason"]
    assert document["reason"] in failed.stdout
    assert "has ended already: failed" in client("stop", job).stdout
    listed = client("list", COLUMNS="40").stdout
    assert f"{job}  small" in listed
    # Nothing is cut where no terminal is.
    assert any(line.rstrip().endswith(small["out"]) for line in listed.splitlines())


@pytest.mark.slow
def test_a_sweep_of_ones_own_on_the_same_cluster(
    client: Callable[..., Any], head: Head, small: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    """Its address is named, and it asks for a token, as it does where nobody chose."""
    file = sweep_file(small)
    assert_one_line(client("sweep", file, "--address", head.gcs, RAY_AUTH_TOKEN="wrongmarker" * 4), "refuses this")
    assert_one_line(client("sweep", file, RAY_ADDRESS=head.gcs, RAY_AUTH_TOKEN=""), "asks for a token", "RAY_ADDRESS")
    done = client("sweep", file, "--address", head.gcs, "--bootstraps", "0")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = client("harvest", "no-subject", "--layer", "1", "--out", small["out"], "--address", head.gcs)
    assert_one_line(found, "unknown subject")  # after it has joined
    assert_one_line(client("list", "--address", f"http://{head.gcs}"), "no Ray dashboard", "8265")
    dashboard = head.url.removeprefix("http://")
    assert_one_line(client("sweep", sweep_file(small | {"out": small["out"] + "2"}), "--address", dashboard), "6379")


@pytest.mark.slow
def test_a_python_that_lacks_what_is_needed(
    client: Callable[..., Any], small: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "lean")], check=True)
    lean, gone = str(tmp_path / "lean" / "bin" / "python"), str(tmp_path / "gone" / "python")
    for python, said in ((lean, f"{lean} lacks the module "), (gone, f"cannot start {gone}")):
        job = submitted(client("submit", sweep_file(small), "--python", python, "-f"), status=1)
        document = answer(client("status", job, "--json"))
        assert said in document["reason"]
        assert "--python PATH" in document["reason"]


def test_who_may_not_or_asks_in_vain(
    client: Callable[..., Any], head: Head, small: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path
) -> None:
    file = sweep_file(small)
    for command in (("submit", file), ("list",)):
        wrong = client(*command, RAY_AUTH_TOKEN="wrongmarker" * 4)
        assert_one_line(wrong, "refuses this machine's token", "RAY_AUTH_TOKEN")
        assert "wrongmarker" not in wrong.stderr + wrong.stdout
    assert_one_line(client("submit", file, RAY_AUTH_TOKEN=""), "asks for a token and there is none")
    assert_one_line(
        client("list", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="/no/file"), "RAY_AUTH_TOKEN_PATH is /no/file"
    )
    written = tmp_path / "token"
    written.write_text(head.token + "\n")
    for command in (("status",), ("logs",), ("stop",)):
        from_file = client(*command, "small-12345678", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(written))
        assert_one_line(from_file, "no sweep small-12345678", "saescale list")
    assert not Path(small["out"]).exists()


def test_addresses_that_are_no_dashboard(client: Callable[..., Any], s3_endpoint: str) -> None:
    assert_one_line(client("list", "--address", "http://127.0.0.1:1"), "nothing answers at http://127.0.0.1:1")
    assert_one_line(client("list", "--address", s3_endpoint), "is no Ray dashboard")
    assert_one_line(saescale_here("list", "--address", "ray://127.0.0.1:10001"), "no address of a Ray dashboard")
    assert_one_line(saescale_here("list", RAY_API_SERVER_ADDRESS=""), "--address http://HEAD:8265")
    hidden = saescale_here("list", "--address", "http://me:passmarker@127.0.0.1:1")
    assert_one_line(hidden, "nothing answers at http://127.0.0.1:1")
    assert "passmarker" not in hidden.stderr


def test_which_address_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster's own, behind which no dashboard answers
    with pytest.raises(SaescaleError, match="--address"):
        resolve_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example")
    assert resolve_address(None) == "https://ray.example"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head:8265/")
    assert resolve_address(None) == "http://head:8265"
    assert resolve_address("http://other:1") == "http://other:1"
    assert shown("http://a:b@h:1/x?token=t") == "http://h:1/x"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": "stores/x"}, "store: stores/x would be another place on the cluster"),
        ({"store": ["/shared/x", "stores/x"]}, "store: stores/x would be another place on the cluster"),
        ({"out": "runs/x"}, "out: runs/x would be another place on the cluster"),
        ({"out": "memory://x"}, "out: memory://x would be another place on the cluster"),
        ({"grid": {"n_latents": [0], "k": [1]}}, "grid.n_latents.0"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    document: dict[str, Any], sweep_file: Callable[[Any], str], change: dict[str, Any], said: str
) -> None:
    file = sweep_file(document | change)
    assert_one_line(saescale_here("submit", file, "--address", "http://127.0.0.1:1"), said)


def test_a_run_that_is_driven_is_not_submitted_again(
    document: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    with Lease(document["out"], job="small-1a2b3c4d"):
        refused = saescale_here("submit", sweep_file(document), "--address", "http://127.0.0.1:1")
    assert_one_line(refused, "driven already", "saescale stop small-1a2b3c4d")


def test_what_goes_to_the_cluster(document: dict[str, Any], tmp_path: Path) -> None:
    spec = parse_spec(document | {"resources": {}}, "here")
    write_sweep(tmp_path / "sweep", spec, spec)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"sweep.yaml", "extension.yaml"}
    assert parse_spec(yaml.safe_load((tmp_path / "sweep" / "sweep.yaml").read_text()), "there") == spec
    code = tmp_path / "code"
    modules = write_code(code)
    assert {path.name for path in modules} == {"saescale", f"saescale-{version('saescale')}.dist-info"}
    assert sorted(modules) == sorted(code.iterdir())
    there = {str(path.relative_to(code / "saescale")) for path in code.rglob("saescale/**/*") if path.is_file()}
    floors = [package.removeprefix("saescale.") for package in PACKAGES[1:]]
    assert {str(path.relative_to(ROOT)) for name in floors for path in (ROOT / name).rglob("*.py")} <= there
    assert {"__init__.py", "scaling/report/report.html.j2", "scaling/data/chinchilla_points.csv"} <= there
    assert "shipped/othello-6x6/model.safetensors" in there
    asked = "import saescale.cluster as c, importlib.metadata as m; print(c.__file__, m.version('saescale'))"
    command = [sys.executable, "-c", asked]
    found = subprocess.run(command, env=environment(PYTHONPATH=str(code)), cwd="/", capture_output=True, text=True)
    assert found.stdout.split() == [str(code / "saescale" / "cluster" / "__init__.py"), version("saescale")], (
        found.stderr
    )


def test_architectures_of_ones_own_go_along(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That below SAESCALE_PATH, of the sweep, and the one that was given, of its extension; no other file."""
    monkeypatch.setattr(registry, "_GIVEN", {})
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "own"))
    page = (ROOT / "trainers" / "architectures" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for name in ("own/architectures/mine.py", "own/architectures/unused.py", "given.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(page)
    ARCHITECTURES.give(str(tmp_path / "given.py"))
    spec = parse_spec(document | {"grid": document["grid"] | {"architecture": ["topk", "mine"]}}, "here")
    (tmp_path / "more.yaml").write_text("grid: {n_latents: 64, k: 2, architecture: given}")
    extension = read_extension(spec, str(tmp_path / "more.yaml"))
    own = write_sweep(tmp_path / "package", spec, extension)
    assert sorted(own) == ["architectures/given.py", "architectures/mine.py"]
    there = {str(path.relative_to(tmp_path / "package")) for path in (tmp_path / "package").rglob("*.*")}
    assert there == {"sweep.yaml", "extension.yaml", *own}
    # There the job gives them to its command, in a folder without the user's own.
    command = ["sweep", "sweep.yaml", "--extend", "extension.yaml"]
    given = [word for path in own for word in ("--architecture-file", path)]
    for words, said in (([], "unknown architecture"), (given, "there is no cluster today")):
        done = subprocess.run(
            [sys.executable, "-c", _NO_CLUSTER, *command, *words], env=environment(SAESCALE_PATH=""),
            cwd=tmp_path / "package", capture_output=True, text=True,
        )  # fmt: skip
        assert said in done.stderr


_NO_CLUSTER = """
from saescale.cluster import cli
from saescale.cluster.sweep import driver
from saescale.storage.errors import SaescaleError
def run_sweep(*_, **__):
    raise SaescaleError("there is no cluster today")
driver.run_sweep = run_sweep
cli.command()
"""


def test_an_extension_goes_along(document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"grid": {"n_latents": [256], "k": [2]}}))
    spec = parse_spec(document, "here")
    extension = read_extension(spec, str(tmp_path / "more.yaml"))
    write_sweep(tmp_path / "package", spec, extension)
    again = extend(spec, str(tmp_path / "package" / EXTENSION))
    assert again.added == 1
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({"grid": {"n_latents": [256], "k": [2]}, "eval": {"tokens": 1}})
    )
    refused = saescale_here(
        "submit", sweep_file(document), "--extend", str(tmp_path / "other.yaml"), "--address", "http://x"
    )
    assert_one_line(refused, "eval.tokens is 1")


@pytest.mark.parametrize("place", ["store", "out"])
@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("s3://user:secretmarker@bucket/x", "before its @"),
        ("https://secretmarker@host/x", "before its @"),
        ("s3://bucket/x?token=secretmarker", "token="),
        ("s3://bucket/x?a=1&AWSAccessKeyId=secretmarker", "AWSAccessKeyId="),
        ("https://host/x?sig=secretmarker", "sig="),
    ],
)
def test_a_sweep_file_with_a_secret_is_refused_without_repeating_it(
    document: dict[str, Any], place: str, url: str, part: str
) -> None:
    with pytest.raises(SaescaleError, match=part) as refused:
        parse_spec(document | {place: url}, "sweep.yaml")
    chain = f"{refused.value} {refused.value.__cause__}"
    assert "environment variables" in chain
    assert "secretmarker" not in chain


def test_a_key_of_wandb_in_a_sweep_file(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    document |= {"wandb": {"mode": "off", "api_key": "secretmarker"}, "aws_secret_access_key": "secretmarker"}
    for command in ("sweep", "submit"):
        result = saescale_here("--debug", command, sweep_file(document), "--address", "http://127.0.0.1:1")
        assert "wandb.api_key is not a key; a sweep file is copied" in result.stderr
        assert "aws_secret_access_key is not a key; a sweep file is copied" in result.stderr
        assert "secretmarker" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "sftp://me@host/x",
        "/data/a=b",
        "s3://b/k=2",
    ],
)
def test_addresses_without_a_secret(document: dict[str, Any], url: str) -> None:
    assert parse_spec(document | {"store": url}, "sweep.yaml").store == url


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
