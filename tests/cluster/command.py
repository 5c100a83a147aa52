"""`saescale` as a user calls it: as a process of its own, or, where no process is what is tested, in this one."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

from saescale.cluster import cli
from saescale.cluster.front.console import console

ROOT = Path(__file__).parents[2]
SAESCALE = [sys.executable, "-m", "saescale.cluster.cli"]
_WIDTH = 200


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "COLUMNS": str(_WIDTH)} | extra


def interruptible() -> None:
    """For `preexec_fn`: what a shell started in the background, such as the tests, has been told to mind no SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def saescale(*arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; `extra` is put into its environment."""
    return subprocess.run(
        [*SAESCALE, *arguments], cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )


def saescale_here(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """The same without the seconds that a process takes to import: the entry point itself, with all that it does about
    errors. Where this process has joined a Ray cluster, that is the one that is used."""
    out, errors = io.StringIO(), io.StringIO()
    at_terminate, width, shown = signal.getsignal(signal.SIGTERM), console._width, warnings.showwarning
    code: object = 0
    console.width = _WIDTH
    try:
        with (
            mock.patch.dict(os.environ, environment(**extra)),
            mock.patch.object(sys, "argv", ["saescale", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            cli.command()
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, at_terminate)
        warnings.showwarning = shown
        console._width = width
    status = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess(["saescale", *arguments], status, out.getvalue(), errors.getvalue())


def assert_one_line(result: subprocess.CompletedProcess[str], *said: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for phrase in said:
        assert phrase in lines[0], lines[0]
