"""How a driver reaches a cluster or starts a Ray of its own: what is wrong is one line, and soon."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from saescale.cluster.crew import connect as joining
from saescale.cluster.crew import local_ray, probe
from saescale.cluster.crew.connect import connect, wanted_address
from saescale.cluster.crew.token import has_token, use_token
from saescale.cluster.jobs.address import reach
from saescale.cluster.jobs.last_words import reason
from saescale.storage.errors import SaescaleError, SaescaleWarning


@pytest.fixture
def silent() -> Any:
    """The address of something that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://head:8265", "saescale submit"),
        ("https://head", "saescale submit"),
        ("ray://head:10001", "saescale submit"),
        ("head", "HOST:PORT"),
        ("head:", "HOST:PORT"),
        ("head:six", "HOST:PORT"),
        ("127.0.0.1:99999", "HOST:PORT"),
        (f"{'x' * 70}.example:6379", "could not reach"),
    ],
)
def test_what_is_no_address_of_a_cluster(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    with pytest.raises(SaescaleError, match=said):
        connect(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SaescaleError, match="RAY_ADDRESS is"):
        connect(None)


def test_which_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert [wanted_address(given) for given in (None, "auto", "local")] == ["head:6379", "auto", None]
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert wanted_address(None) is None


def test_auto_after_the_cluster_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, silent: str) -> None:
    """A head that was killed leaves its address behind, at which Ray itself would try for minutes."""
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: frozenset({"127.0.0.1:1"}))
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    last = tmp_path / "ray" / "ray_current_cluster"
    for left, said in (
        (None, "no Ray cluster runs; start"),
        ("127.0.0.1:1", "at 127.0.0.1:1, does not answer any more"),
    ):
        if left:
            last.write_text(left)
        with pytest.raises(SaescaleError, match=said):
            connect("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = f"127.0.0.1:{server.getsockname()[1]}"
        running = frozenset({"127.0.0.1:1", silent})
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: running)
        assert joining._running_here() == silent
        running |= {other}
        with pytest.raises(SaescaleError, match="several"):
            joining._running_here()
        last.write_text(other)
        assert joining._running_here() == other


def test_what_answers_and_is_no_cluster(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setattr(probe, "PATIENCE_S", 0.2)
    with pytest.raises(SaescaleError, match=r"no answer of Ray within .*6379"):
        connect(silent)
    monkeypatch.setattr("saescale.cluster.jobs.address._CONNECT_S", 0.2)
    with pytest.raises(SaescaleError, match="no Ray dashboard"):
        reach(f"http://{silent}", f"http://{silent}")
    for verdict, said in (("token", "token"), ("elsewhere", "no node of"), ("other", "strange")):
        monkeypatch.setattr(joining, "ask", lambda address, v=verdict: probe.Answer(v, "strange"))
        with pytest.raises(SaescaleError, match=said):
            connect(silent)


def test_where_a_token_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert has_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # somebody chose
    use_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    (tmp_path / "empty").write_text(" \n")
    for path, said in (("no", "No such file"), (".ray", "directory"), ("empty", "is empty")):
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / path))
        with pytest.raises(SaescaleError, match=said):
            has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")  # goes before the file
    assert has_token()


# --- a Ray of one's own


def test_its_folder_is_short_and_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    for given in (str(long), str(tmp_path / "missing"), ""):
        monkeypatch.setenv("RAY_TMPDIR", given)
        folder = local_ray._new_folder()
        assert Path(folder).parent != long
        assert not os.listdir(folder)
        os.rmdir(folder)
    monkeypatch.setattr(local_ray, "_LONGEST", 20)
    with pytest.raises(SaescaleError, match=r"too long a name.*RAY_TMPDIR"):
        local_ray._new_folder()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], list[str]]:
    """Has Ray time out in its start, as it does on a busy machine; gives the folders of the attempts."""

    def fail(busy_s: float) -> list[str]:
        folders: list[str] = []

        def init(_temp_dir: str, **_: Any) -> None:
            folders.append(_temp_dir)
            raise Exception("The current node timed out during startup.\n\nMore.")

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(local_ray, "BUSY_S", busy_s)
        monkeypatch.setenv("RAY_TMPDIR", "/tmp")
        return folders

    return fail


def test_a_busy_machine_gets_a_second_try(
    failing: Callable[[float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {})
    folders = failing(0.0)
    with (
        pytest.warns(SaescaleWarning, match="trying it once more"),
        pytest.raises(
            SaescaleError, match=r"did not start .*second time.*timed out during startup. More.; try again when"
        ),
    ):
        local_ray.start({})
    assert [os.path.exists(folder) for folder in folders] == [False, True]  # the logs of the last one are named
    os.rmdir(folders[1])


def test_what_is_wrong_otherwise_is_said_at_once(
    failing: Callable[[float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {})
    folders = failing(60.0)
    with pytest.raises(SaescaleError, match="its logs are in /tmp/saescale-ray-"):
        local_ray.start({})
    (folder,) = folders
    os.rmdir(folder)


def test_nothing_of_it_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ours" / "session" / "logs").mkdir(parents=True)
    monkeypatch.setattr(local_ray, "_folder", str(tmp_path / "ours"))
    local_ray.remove_folder()
    local_ray.remove_folder()
    assert not (tmp_path / "ours").exists()


# --- a job's last words


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("error: a\nmore\nerror: the store is gone\n", "the store is gone"),
        ("unexpected KeyError: 'x' (traceback: ...)", "unexpected KeyError: 'x' (traceback: ...)"),
        ("Traceback ...\n  File\nModuleNotFoundError: No module named 'typer'\n", "python3 lacks the module typer;"),
        ("ModuleNotFoundError: No module named 'rich.console'", "lacks the module rich;"),
        ("sh: 1: exec: python3: not found", "cannot start python3"),
        ("failed with exit code 127, logs:\nRunning entrypoint for job a: exec python3 -P", "cannot start python3"),
        ("failed with exit code 1, logs:\nRunning entrypoint for job a: exec python3 -P", "failed with exit code 1"),
        ("Traceback\nRuntimeError: no room\n  at the end", "RuntimeError: no room"),
        ("Runtime env setup failed", "Runtime env setup failed"),
        ("", None),
    ],
)
def test_why_a_job_failed(log: str, said: str | None) -> None:
    found = reason(log, "python3")
    assert found is None if said is None else found is not None and said in found
