"""Atomic files on every kind of file system: kills, full disks, refusals."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from tests.s3_faults import Faults


def test_a_file_comes_back_on_every_file_system(any_url: str) -> None:
    url = files.join(any_url, "a", "b.bin")
    assert not files.exists(url)
    assert files.list_names(files.join(any_url, "a")) == []
    with pytest.raises(FileNotFoundError):
        files.read_bytes(url)
    with pytest.raises(FileNotFoundError):
        files.size(url)

    assert files.write_atomic(url, b"first") == 5
    assert files.write_atomic(url, lambda file: file.write(b"second one") and None) == 10
    assert files.read_bytes(url) == b"second one"
    assert files.size(url) == 10
    assert files.exists(url)
    with files.open_input(url, known_size=10) as file:
        file.seek(7)
        assert file.read(3) == b"one"
        file.seek(0)
        assert file.read() == b"second one"

    files.write_atomic(files.join(any_url, "a", "c"), b"")
    files.write_atomic(files.join(any_url, "a", "deep", "d"), b"d")
    assert files.list_names(files.join(any_url, "a")) == ["b.bin", "c", "deep"]
    assert sorted(files.list_below(any_url)) == ["a/b.bin", "a/c", "a/deep/d"]
    assert files.list_below(files.join(any_url, "missing")) == []
    files.remove(url)
    assert files.list_names(files.join(any_url, "a")) == ["c", "deep"]
    files.remove(any_url)
    files.remove(any_url)
    assert files.list_names(any_url) == []


def test_join_minds_slashes() -> None:
    assert files.join("a/", "/b/", "c") == "a/b/c"
    assert files.join("memory://", "x") == "memory://x"
    assert files.join("/", "x") == "/x"


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://"])
def test_an_unusable_address_is_one_clear_line(url: str, s3_endpoint: str) -> None:
    with pytest.raises(SaescaleError) as caught:
        files.write_atomic(url, b"x")
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_bucket_is_one_clear_line(s3_endpoint: str) -> None:
    with pytest.raises(SaescaleError, match="s3://no-such-bucket/x"):
        files.write_atomic("s3://no-such-bucket/x", b"x")


def test_a_folder_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SaescaleError, match="cannot write"):
        files.write_atomic(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(SaescaleError, match="cannot write"):
        files.write_atomic(str(tmp_path), b"x")
    with pytest.raises(SaescaleError, match=r"cannot read .*: it is a folder where a file should be; name the file"):
        files.read_bytes(str(tmp_path))
    assert os.listdir(tmp_path) == ["file"]
    assert not list(tmp_path.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full while writing"),
        (OSError(errno.EIO, "Input/output error"), "cannot write"),
    ],
)
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path: Path, error: OSError, text: str) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(SaescaleError, match=text) as caught:
        files.write_atomic(str(target), fail)
    assert str(target) in str(caught.value)
    assert os.listdir(tmp_path) == ["x"]
    assert target.read_bytes() == b"old"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        url = str(tmp_path / "x")
        files.write_atomic(url, b"old")
        with pytest.raises(SaescaleError, match=r"disk full while writing .*x: free space"):
            files.write_atomic(url, bytes(1 << 20))
        assert os.listdir(tmp_path) == ["x"]
        assert files.read_bytes(url) == b"old"
        files.write_atomic(url, b"new")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_kill_in_the_middle_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x")
    files.write_atomic(url, b"old")
    program = (
        "import os, signal, sys\n"
        "from saescale.storage import files\n"
        "def half(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomic(sys.argv[1], half)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, url], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files.read_bytes(url) == b"old"
    assert len(os.listdir(tmp_path)) == 2
    assert files.list_names(str(tmp_path)) == ["x"]

    files.write_atomic(url, b"new")
    assert len(os.listdir(tmp_path)) == 2, "a fresh temporary may belong to a live writer"
    monkeypatch.setattr(files, "ORPHAN_SECONDS", -1.0)
    files.write_atomic(url, b"newer")
    assert os.listdir(tmp_path) == ["x"]
    assert files.read_bytes(url) == b"newer"


def test_of_those_that_create_a_file_at_a_time_one_succeeds(any_url: str) -> None:
    url = files.join(any_url, "turn.json")
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda number: files.create(url, b"by %d" % number), range(8)))
    assert sum(done) == 1
    assert files.read_bytes(url) == b"by %d" % done.index(True)
    assert not files.create(url, b"by another")
    assert files.list_names(any_url) == ["turn.json"]


def test_a_file_that_was_created_is_known_again_when_the_answer_got_lost(
    s3_url: str, s3_faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stores every put; a client that hears nothing asks again, and finds its own."""
    monkeypatch.setattr(files, "_PAUSES_S", (0.01, 0.02))
    with s3_faults.injected(0.4, slow_s=0):
        done = [files.create(f"{s3_url}/{number}", b"by me") for number in range(5)]
    assert all(done)
    assert len(s3_faults.met) > 1


def test_a_file_that_is_moved_replaces_what_was_there(any_url: str) -> None:
    old, new = files.join(any_url, "old"), files.join(any_url, "new")
    files.write_atomic(old, b"1")
    files.write_atomic(new, b"2")
    assert files.move(old, new)
    assert (files.list_names(any_url), files.read_bytes(new)) == (["new"], b"1")
    assert not files.move(old, new)
    assert files.read_bytes(new) == b"1"


def test_folders_are_found_by_a_pattern_in_the_order_of_their_numbers(any_url: str) -> None:
    for name in ("toy-l10/manifest.json", "toy-l9/manifest.json", "toy-l11.txt", "other/manifest.json"):
        files.write_atomic(files.join(any_url, name), b"{}")
    assert files.folders_like(files.join(any_url, "toy-l*")) == [files.join(any_url, f"toy-l{n}") for n in (9, 10)]
    assert files.folders_like(files.join(any_url, "nothing-*")) == []
