"""What is asked of a place before any work is done: is there a bucket, does it answer, may one write there."""

import os
import uuid
from pathlib import Path

import pytest

from saescale.storage import files
from saescale.storage.errors import SaescaleError, Unavailable
from saescale.storage.writable import require_lasting, require_writable


def test_what_can_be_written_to_is_left_as_it_was(any_url: str, tmp_path: Path) -> None:
    require_writable(files.join(any_url, "a", "b"))
    assert files.list_names(any_url) == []
    require_writable(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("file", "it is a file"),
        ("file/below/it", "it is a file"),
        ("link", "a link to nothing"),
        ("link/below", "a link to nothing"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(SaescaleError, match=f"cannot write to .*{said}"):
            require_writable(str(tmp_path / name))
    with pytest.raises(SaescaleError, match="cannot write to /proc/runs"):
        require_writable("/proc/runs")  # where not even root may


def test_the_memory_of_a_process_does_not_last(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"memory://x/y is the memory of one process and ends with it; give"):
        require_lasting("memory://x/y")
    for url in (str(tmp_path), "memory", f"file://{tmp_path}", "s3://bucket/x"):
        require_lasting(url)


def test_a_missing_bucket_is_called_one(s3_endpoint: str) -> None:
    for ask in (require_writable, files.exists, files.read_bytes, files.list_names):
        with pytest.raises(SaescaleError, match="there is no bucket no-such-bucket for s3://no-such-bucket/runs/x"):
            ask("s3://no-such-bucket/runs/x")


def test_an_endpoint_that_is_dead_is_not_asked_again_and_again(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for ask in (require_writable, files.exists):
        with pytest.raises(Unavailable, match=r"does not answer.*127.0.0.1:1.*AWS_ENDPOINT_URL"):
            ask(f"s3://bucket-{uuid.uuid4().hex}/x")
    assert not asked


def test_where_a_place_is_needs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep can be submitted from a machine that does not reach the cluster's object store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert files.local_path(f"s3://bucket-{uuid.uuid4().hex}/x") is None
