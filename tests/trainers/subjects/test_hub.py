"""Names on the Hugging Face hub: revisions, what the hub answers, and none at all. The hub is a server on loopback."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import GPT2Config

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import at_revision, check_sites_before_loading, check_subject_name, get_subject

COMMITS = {"main": "a" * 40, "step1000": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Holds org/model at two revisions in folders; `asked` are the paths that were asked for, `status` what it answers
    to all."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folders = {COMMITS[name]: folder for name, folder in folders.items()}
        self.asked: list[str] = []
        self.status: int | None = None


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        parts = path.strip("/").split("/")
        if self.server.status:
            return self._say(self.server.status, b"", **{"X-Error-Code": "GatedRepo"})
        if "org/model" not in path:
            return self._say(404, b"", **{"X-Error-Code": "RepoNotFound"})
        if parts[-1] == "refs":
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in COMMITS.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        revision = "main" if len(parts) == 4 else parts[-1] if parts[0] == "api" else parts[3]
        commit = COMMITS.get(revision, revision)
        if commit not in self.server.folders:
            return self._say(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        folder = self.server.folders[commit]
        if "revision" in parts or len(parts) == 4:
            return self._json({"id": "org/model", "sha": commit, "siblings": []})
        if "tree" in parts:
            files = sorted(path for path in folder.iterdir())
            return self._json(
                [{"type": "file", "oid": path.name, "size": path.stat().st_size, "path": path.name} for path in files]
            )
        content = (folder / parts[-1]).read_bytes()
        return self._say(200, content, ETag=f'"{commit[0]}{parts[-1]}"', **{"X-Repo-Commit": commit})

    def _json(self, value: object) -> None:
        self._say(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _say(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture(scope="session")
def revisions(save_subject: Callable[..., str]) -> dict[str, Path]:
    """A model with one layer, and with two at step1000."""
    shape = {"vocab_size": 512, "n_embd": 16, "n_head": 2, "n_positions": 32}
    names = {name: save_subject(name, GPT2Config(**shape, n_layer=1 + (name != "main"))) for name in COMMITS}
    return {name: Path(found.removeprefix("hf:")) for name, found in names.items()}


def lies_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(revisions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(revisions)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    lies_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_a_revision_is_part_of_the_name(hub: Hub, revisions: dict[str, Path]) -> None:
    main, step = get_subject("hf:org/model"), get_subject("hf:org/model@step1000")
    assert (main.name, main.n_layers) == ("hf:org/model", 1)
    assert (step.name, step.n_layers) == ("hf:org/model@step1000", 2)
    assert step.fingerprint == get_subject(f"hf:{revisions['step1000']}").fingerprint != main.fingerprint
    assert get_subject(f"hf:org/model@{COMMITS['step1000']}").fingerprint == step.fingerprint
    assert at_revision("hf:org/model", "step1000") == at_revision(step.name, "step1000") == step.name
    assert at_revision("smollm2-135m", None) == "smollm2-135m"
    for name, revision in (("smollm2-135m", "main"), ("hf:org/model@main", "step1000")):
        with pytest.raises(SaescaleError, match=r"has no revisions|names its revision already"):
            at_revision(name, revision)


def test_what_the_cache_holds_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = get_subject("hf:org/model@step1000", notify=said.append)
    assert said == ["downloading hf:org/model@step1000 (once)"]
    lies_at(monkeypatch, "http://127.0.0.1:9")
    said.clear()
    assert get_subject("hf:org/model@step1000", notify=said.append).fingerprint == first.fingerprint
    assert said == []


def test_a_layer_too_high_costs_no_weights(hub: Hub) -> None:
    with pytest.raises(SaescaleError, match="hf:org/model has no layer 1"):
        check_sites_before_loading("hf:org/model", [1], 8)
    assert any(path.endswith("config.json") for path in hub.asked)
    assert not any(path.endswith("model.safetensors") for path in hub.asked)


def test_a_repository_of_pickles_is_read_as_well(hub: Hub, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    wanted = get_subject("hf:org/model").fingerprint
    folder = shutil.copytree(hub.folders[COMMITS["main"]], tmp_path / "pickles")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.folders[COMMITS["step1000"]] = folder
    assert get_subject("hf:org/model@step1000").fingerprint == wanted


def refusal(name: str) -> str:
    with pytest.raises(SaescaleError) as caught:
        get_subject(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no revision 'step100'; it has 2, such as step1000" in refusal("hf:org/model@step100")
    assert "the hub has no model org/other, or it is private" in refusal("hf:org/other")
    monkeypatch.chdir(tmp_path)
    Path("org/other").mkdir(parents=True)
    assert refusal("hf:org/other").endswith("there is a folder of that name here: hf:./org/other")
    for name in ("hf:org/model/tree", "hf:a b", "hf:org/"):
        assert "cannot be a name on the Hugging Face hub" in refusal(name)
    assert "has to stand behind the @" in refusal("hf:org/model@")
    hub.status = 403
    assert "is gated: ask for access" in refusal("hf:org/model")


def test_without_a_hub_one_look_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sites_before_loading("hf:org/model", [0], 8)  # the small files lie in the cache now
    lies_at(monkeypatch, "http://127.0.0.1:9")
    looks: list[object] = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda to, *more, **also: looks.append(to) or connect(to, *more))
    for name in ("hf:org/model", "hf:org/model@step1000"):
        looks.clear()
        assert "the Hugging Face hub does not give it ([Errno 111] Connection refused), and its cache" in refusal(name)
        assert len(looks) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal("hf:org/model@step1000")
    assert "(HF_HUB_OFFLINE is set), and its cache on this machine holds no whole org/model at step1000" in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("openai-community/gpt2", "hf:openai-community/gpt2"),
        ("EleutherAI/pythia-14m@step1000", "hf:EleutherAI/pythia-14m@step1000"),
        ("https://huggingface.co/openai-community/gpt2", "hf:openai-community/gpt2"),
        ("hf://openai-community/gpt2", "hf:openai-community/gpt2"),
        ("./mine", "hf:./mine"),
        ("/models/mine", "hf:/models/mine"),
    ],
)
def test_a_name_without_hf_gets_a_hint(given: str, meant: str) -> None:
    with pytest.raises(SaescaleError, match=f"unknown subject '{given}': did you mean '{meant}'"):
        check_subject_name(given)
