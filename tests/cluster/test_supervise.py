"""The process beside one that holds Ray: how that ends without a word, and what is said of it. Without Ray, whose way
to end a process (status 1 where it stands, a C++ stack on stderr) is played; with it: test_head_lost.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest

from saescale.cluster.cli import COMMANDS, WATCHED
from saescale.cluster.front.console import Actors, Address
from saescale.storage.lease import read_driver
from tests.cluster.command import environment, interruptible

PLAY = """
import os, signal, sys, tempfile, time
from saescale.cluster.front import supervise as module
from saescale.storage import watched
from saescale.storage.errors import SaescaleError
module.LEAVE_S = 0.5

def work():
    what, run = sys.argv[1], sys.argv[2]
    if what != "stops":
        print("began", os.getpid(), flush=True)
    if what.startswith("lease"):
        from saescale.storage.lease import Lease
        watched.tell(cluster="10.0.0.1:6379" if "cluster" in what else "")
        Lease(run)
        os.write(2, b"*** StackTrace Information ***\\n_raylet.so(+0x1812b9a)\\n")
        os._exit(1)
    if what == "abort":
        watched.tell(cluster="10.0.0.1:6379")
        os.write(2, b"[E] gcs_client.cc: WrongClusterID\\n    @     0x7fe97a85a050 (unknown)\\n")
        os.abort()
    if what == "corrupt":
        folder = tempfile.mkdtemp()
        watched.tell(cluster="", ray_folder=folder)
        print(folder, flush=True)
        os.write(2, b"free(): invalid pointer\\n")
        os.abort()
    if what == "killed":
        os.write(2, b"libsomething: cannot allocate\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "says":
        print("error: disk full", file=sys.stderr)
        sys.exit(2)
    if what == "hangs":
        import atexit
        atexit.register(time.sleep, 600)
        sys.exit(3)
    if what == "stops":
        try:
            print("began", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            print("saving", flush=True)
            time.sleep(float(run))
            sys.exit(130)
    if what == "lost to a signal":
        time.sleep(600)

module.supervise(work)
"""


def play(what: str, run: object = "-", debug: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PLAY, what, str(run), *(["--debug"] if debug else [])],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
        start_new_session=True,
    )  # fmt: skip


def test_a_head_that_is_gone_is_one_line_and_a_state_of_the_run(tmp_path: Path) -> None:
    process = play("lease on a cluster", tmp_path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: the head of the Ray cluster at 10.0.0.1:6379 is gone, or was started anew; ")
    assert len(errors.splitlines()) == 1
    driver = read_driver(str(tmp_path))
    assert driver is not None
    assert (driver.state, driver.pid) == ("lost", int(out.split()[1]))
    assert driver.error is not None
    assert "run the same command again" in driver.error


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("lease", 2, "error: the local Ray is gone; run the same command again"),
        ("abort", 2, "error: the head of the Ray cluster at 10.0.0.1:6379 is gone"),
        ("corrupt", 2, "error: the process that worked was killed (SIGABRT); it last said: free(): invalid pointer; "),
        ("killed", 2, "was killed (SIGKILL), maybe since memory ran out; it last said: libsomething: cannot allocate"),
        ("says", 2, "error: disk full"),
        ("hangs", 3, ""),
        ("nothing", 0, ""),
    ],
)
def test_how_a_process_ended(what: str, status: int, said: str, tmp_path: Path) -> None:
    process = play(what, tmp_path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert said in errors
    assert len(errors.splitlines()) == bool(said)
    if what == "corrupt":  # what a local Ray left behind
        assert not Path(out.splitlines()[-1]).exists()


def test_with_debug_nothing_is_kept_back(tmp_path: Path) -> None:
    _, errors = play("lease", tmp_path, debug=True).communicate(timeout=60)
    assert "StackTrace" in errors


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_it_ends_once(number: signal.Signals, whole_group: bool) -> None:
    """A terminal and a batch system tell the whole group: what comes twice at a time is not a second time."""
    process = play("stops", 0.3)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "saving\n", "")


def test_told_again_it_ends_at_once() -> None:
    process = play("stops", 600)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("ended at once; run the same command again")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell a process that its parent died")
def test_who_kills_it_kills_the_work() -> None:
    process = play("lost to a signal")
    assert process.stdout is not None
    work = int(process.stdout.readline().split()[1])
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{work}").exists() and Path(f"/proc/{work}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_command_that_may_join_ray_is_watched() -> None:
    """A lost head, which ends the process that has joined it, is explained to all of them."""
    of_ray = {
        name
        for name, command in COMMANDS.items()
        if any(hint in (Address, Actors) for hint in get_type_hints(command, include_extras=True).values())
    }
    assert of_ray == {"harvest", "sweep", "eval"}
    assert of_ray < {*WATCHED}
