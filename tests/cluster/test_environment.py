"""Commands do not depend on what a shell, a batch system, a notebook or a locale hands to them."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from saescale.cluster.front.console import command
from saescale.cluster.front.environment import _spell, prepare
from saescale.cluster.sweep.status import read_status
from tests.cluster.command import ROOT, SAESCALE, environment, saescale_here

RUN = str(ROOT / "tests" / "data" / "run-0.1.0")
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    program = " ".join(SAESCALE)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.format(program)], env=environment(**extra), capture_output=True
    )


def test_letters_that_a_terminal_lacks() -> None:
    text = "· N^−0.5 ± 2×10³ ≥ \N{GREEK SMALL LETTER ALPHA} \ud800 漢"
    assert _spell(UnicodeEncodeError("ascii", text, 0, len(text), ""))[0] == "- N^-0.5 +/- 2x103 >= alpha ? ?"


def test_a_terminal_without_utf8(tmp_path: Path) -> None:
    run = tmp_path / "läufe"
    shutil.copytree(RUN, run)
    for settings in (NO_UTF8, {"PYTHONIOENCODING": "ascii", "TERM": "dumb"}):
        shown = shell(f"{{}} status '{run}'", **settings)
        assert (shown.returncode, shown.stderr) == (0, b"")
        assert shown.stdout.isascii()
        assert b"6 of 6 cells done" in shown.stdout


@pytest.mark.parametrize("line", ["{} status " + RUN + " --cells | true", "{} status " + RUN + " --json | true"])
def test_nobody_who_reads_on_is_no_news(line: str) -> None:
    assert shell(line).stderr == b""


@pytest.mark.parametrize("line", ["{} status " + RUN + " >&-", "{} status " + RUN + " <&- >&- 2>&-"])
def test_closed_streams(line: str) -> None:
    ended = shell(line)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_full_disk_behind_the_output() -> None:
    ended = shell("{} status " + RUN + " > /dev/full")
    assert ended.returncode == 2
    assert ended.stderr.decode().startswith("error: ")
    assert ended.stderr.count(b"\n") == 1


def test_a_notebooks_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which matplotlib refuses where it is not installed, when it is imported."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    prepare()
    assert os.environ["MPLBACKEND"] == "agg"


def test_what_is_said_to_be_next_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "[/b] it's $HOME"
    shutil.copytree(RUN, run)
    shown = saescale_here("status", str(run))
    assert shown.returncode == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("Next: ")]
    words = subprocess.run(
        ["bash", "-c", f"saescale() {{ printf '%s\\0' \"$@\"; }}; {line.removeprefix('Next: ')}"], capture_output=True
    )
    assert words.stdout.decode().split("\0")[:-1] == ["fit", str(run)]
    assert command("fit", "a b") == "saescale fit 'a b'"
    fitted = saescale_here("fit", str(run), "--bootstraps", "0", "--out", str(tmp_path / "[/x] y"))
    assert fitted.returncode == 0, fitted.stderr
    assert f"wrote {tmp_path}/[/x] y/fits.json" in fitted.stdout


@pytest.mark.slow
def test_a_sweep_where_nothing_is_as_it_should_be(
    document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path
) -> None:
    """On a Ray of its own, of which nothing stays behind."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    document |= {"grid": {"n_latents": [32], "k": [2, 4]}, "resources": {"workers": 1}}
    hostile = NO_UTF8 | {"TMPDIR": str(long), "RAY_TMPDIR": str(long), "HOME": "/proc/no-home", "COLUMNS": "5"}
    hostile |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TERM": "dumb", "RAY_AUTH_MODE": ""}
    before = folders_of_ray()
    done = shell(f"{{}} sweep '{sweep_file(document)}' --bootstraps 0", **hostile)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout + done.stderr
    assert read_status(document["out"]).state == "finished"
    deadline = time.monotonic() + 60
    while left := folders_of_ray() - before - folders_in_use(str(long)):  # another test's may just begin or end
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def folders_of_ray() -> set[str]:
    return {name for name in os.listdir("/tmp") if name.startswith("saescale-ray-")}


def folders_in_use(but_for: str) -> set[str]:
    """Those of processes with another temporary folder: other tests run beside this one."""
    used = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") != but_for:
                used |= set(re.findall(r"/tmp/(saescale-ray-\w+)", " ".join(process.cmdline())))
    return used
