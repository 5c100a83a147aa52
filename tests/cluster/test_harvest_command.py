"""`saescale harvest`: its options reach the notes, and what is wrong with what was asked is one line at once."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.sweep.spec import load_spec
from saescale.cluster.sweep.stores import open_stores
from saescale.storage.store import ActivationStore
from tests.cluster.command import assert_one_line, saescale_here

SIZES = ["--tokens", "640", "--heldout-tokens", "128", "--context-length", "16"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> Any:
        if "forbidden" in self.path:
            return self.send_error(403)
        return super().send_head()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that gives the files of tmp_path / "web"."""
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_options_reach_the_notes(tiny_subject: str, tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"{number} words are here. " * 4}) for number in range(90)]
    (tmp_path / "Corpus [1].JSONL").write_text("\n".join([*lines, '{"body": null}']))
    command = ["harvest", tiny_subject, "--layer", "1", *SIZES, "--corpus", f"{tmp_path}/Corpus [1].JSONL"]
    command += ["--out", f"{tmp_path}/store", "--text-column", "body", "--cut-documents", "60", "--shard-rows", "320"]
    command += ["--batch-contexts", "7", "--compute-dtype", "float32"]
    done = saescale_here(*command)
    assert done.returncode == 0, done.stderr
    manifest = ActivationStore.open(f"{tmp_path}/store").manifest
    assert (manifest.text_column, manifest.documents_cut) == ("body", 60)
    assert manifest.created_with["computed_in"] == "float32"
    assert [shard.rows for shard in manifest.shards] == [320, 320, 128]
    plan = json.loads((tmp_path / "store" / "harvest.json").read_text())
    told = ("text_column", "cut_documents", "shard_rows", "batch_contexts", "compute_dtype")
    assert [plan[name] for name in told] == ["body", 60, 320, 7, "float32"]
    shown = saescale_here("inspect", f"{tmp_path}/store").stdout
    assert "column body, documents cut at 60 characters" in " ".join(shown.split())
    # A note of a version that knew no such options is one of a harvest without them.
    (tmp_path / "store" / "manifest.json").unlink()
    old = {name: value for name, value in plan.items() if name not in ("text_column", "cut_documents")}
    (tmp_path / "store" / "harvest.json").write_text(json.dumps(old))
    again = saescale_here(*command)
    assert "text_column is 'text' there, 'body' here; cut_documents is None there, 60 here" in again.stderr


def test_layers_of_one_pass_are_the_stores_of_a_sweep(
    tiny_subject: str, tiny_corpus: str, tmp_path: Path, document: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    command = ["harvest", tiny_subject, *SIZES, "--corpus", tiny_corpus, "--out", f"{tmp_path}/tiny", "--layers"]
    done = saescale_here(*command, "all")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "4 stores (layers 0-3) of 768 rows: " in said
    assert f"{tmp_path}/tiny/resid_post.3: 768 rows of {tiny_subject}, resid_post of layer 3, d_model 32" in said
    assert f"A sweep over all of them has `store: {tmp_path}/tiny/resid_post.*`" in said
    sweep = load_spec(sweep_file(document | {"store": f"{tmp_path}/tiny/resid_post.*"}))
    assert [store.site.layer for store in open_stores(sweep)] == [0, 1, 2, 3]
    # A layer is added without touching the others, whose own command finds them finished.
    assert saescale_here(*command, "2").returncode == 0
    alone = saescale_here(*command[:-1], "--layer", "2", "--out", f"{tmp_path}/tiny/resid_post.2")
    assert alone.returncode == 0, alone.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give --layer with one layer, or --layers with several"),
        (["--layer", "1", "--layers", "0-3"], "give --layer with one layer, or --layers with several"),
        (["--layers", "0-7"], "has no layer 4: its 4 layers are 0 to 3"),
        (["--layers", "0..3"], "--layers must be numbers and ranges (0-11, or 0,4,8) or all, not '0..3'"),
    ],
)
def test_layers_that_cannot_be_harvested_are_one_line(
    tiny_subject: str, tiny_corpus: str, tmp_path: Path, given: list[str], said: str
) -> None:
    done = saescale_here("harvest", tiny_subject, *SIZES, "--corpus", tiny_corpus, "--out", f"{tmp_path}/tiny", *given)
    assert_one_line(done, said)
    assert not (tmp_path / "tiny").exists()


def test_a_token_in_the_address_of_a_corpus_is_nowhere_afterwards(
    tiny_subject: str, tmp_path: Path, served: str
) -> None:
    lines = [json.dumps({"text": f"{number} words are here. " * 4}) for number in range(60)]
    (tmp_path / "web" / "x.jsonl").write_text("\n".join(['{"text": null}', *lines]))
    (tmp_path / "web" / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    command = ["harvest", tiny_subject, "--layer", "1", "--out", f"{tmp_path}/store", *SIZES, "--corpus"]
    done = saescale_here(*command, f"{served}/x.jsonl?token=HUSH&v=1")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "texts that are null, passed over: 1" in said
    for name, expected in (
        ("bad.jsonl", "bad.jsonl?token=***, line 2: the field 'text' holds a number"),
        ("none.jsonl", "cannot look for the corpus http"),
        ("none.jsonl", "404"),
        ("forbidden.jsonl", "403"),
        ("x.jsonl", "is too short"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        more = [*command[:5], f"{tmp_path}/other", *SIZES, "--tokens", "16000", "--corpus"]
        failed = saescale_here(*more, f"{served}/{name}?token=HUSH")
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1
        assert expected in failed.stderr
        said += failed.stdout + failed.stderr
    assert "HUSH" not in said
    written = [path.read_bytes() for path in tmp_path.rglob("*.json")]
    assert len(written) == 2
    assert not [content for content in written if b"HUSH" in content]
    assert ActivationStore.open(f"{tmp_path}/store").manifest.corpus == f"{served}/x.jsonl?token=***&v=1"
    # A signature is another one every time: the same command goes on all the same.
    (tmp_path / "store" / "manifest.json").unlink()
    assert saescale_here(*command, f"{served}/x.jsonl?token=HUSH2&v=1").returncode == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tokens", "100"], "--tokens must be a multiple of --context-length 64, not 100"),
        (["--batch-contexts", "0"], "--batch-contexts must be at least 1, not 0"),
        (["--cut-documents", "0"], "--cut-documents must be at least 1, not 0"),
        (["--shard-rows", "100", "--context-length", "64"], "--shard-rows must be a multiple of --context-length 64"),
        (["--compute-dtype", "float64"], "--compute-dtype: input should be 'auto', 'float32' or 'bfloat16'"),
        (["--dtype", "fp16"], "--dtype: input should be 'float16' or 'bfloat16' (given: 'fp16')"),
        (["--seed", str(2**64)], "--seed must be at most"),
        (["--corpus", ""], "--corpus is empty"),
        (["--corpus", "no/such*.txt"], "no text file matches the corpus 'no/such*.txt'"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_subject_is_loaded(tmp_path: Path, given: list[str], said: str) -> None:
    done = saescale_here("harvest", "hf:/no/such/folder", "--layer", "1", "--out", f"{tmp_path}/store", *given)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()
