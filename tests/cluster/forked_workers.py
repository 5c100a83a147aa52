"""Worker processes of the tests' Ray cluster that need not import torch and Lightning each for itself.

One process imports what `trainers/` needs, without Ray, and is forked whenever a node starts a worker: the child is
given the command, environment, folder and outputs that the worker would have had, and runs Ray's own program for
workers. Clusters that are not the tests' own start theirs as ever.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "SAESCALE_TEST_FORKS"  # in the environment: the socket of the process that is forked
NOTE = "SAESCALE_TEST_WATCH"  # in the environment of workers: the file that says which disk is watched
_CONTEXT = "--serialized-runtime-env-context="


@contextlib.contextmanager
def forked_workers() -> Iterator[dict[str, Any]]:
    """What `Cluster.add_node` takes so that the workers of a node are forked, while this lasts."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder, ours:
        os.environ[ADDRESS] = str(Path(folder) / "forks")
        os.environ[NOTE] = str(Path(folder) / "watched")
        with theirs:
            command = [sys.executable, "-P", __file__, "serve", str(theirs.fileno())]
            environment = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        try:
            if ours.recv(1) == b"1":
                yield {"setup_worker_path": __file__}
            else:
                warnings.warn("no process can be forked for workers here: each imports torch for itself", stacklevel=1)
                yield {}
        finally:
            del os.environ[ADDRESS], os.environ[NOTE]
            server.terminate()
            server.wait()


# --- in place of Ray's own setup_worker.py


def hand_over(arguments: list[str]) -> None:
    """Has a child made that does what this process is asked for."""
    context = next((each for each in arguments if each.startswith(_CONTEXT)), _CONTEXT)
    asked = {name: value for name, value in json.loads(context[len(_CONTEXT) :] or "{}").items() if value}
    environment = os.environ | asked.pop("env_vars", {})
    assert asked.pop("py_executable", sys.executable) == sys.executable
    assert not asked, f"a child cannot be given {asked}"
    command = [each for each in arguments if not each.startswith((_CONTEXT, "--language=", "-S", "-s"))]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        socket.send_fds(server, [b"0"], [1, 2])
        server.sendall(json.dumps([command, environment, os.getcwd()]).encode())
        server.shutdown(socket.SHUT_WR)
        server.recv(1)  # nothing, when it is done


# --- the process that is forked


def serve(starter: socket.socket) -> None:
    """Until the tests that started it are gone."""
    import saescale.trainers.evals.bench
    import saescale.trainers.harvest.make_shard
    import saescale.trainers.training.train  # noqa: F401

    runpy.run_path(str(Path(__file__).parents[1] / "watched_disk.py"))["watch_here"]()
    # What another thread has locked at the time stays locked in a child for ever.
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a child ended
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.environ[ADDRESS])
        server.listen(64)
        starter.send(b"1")
        while starter not in select.select([starter, server], [], [])[0]:
            asking, _ = server.accept()
            with asking:
                if os.fork() == 0:
                    starter.close()
                    server.close()
                    become(asking)


def become(asking: socket.socket) -> NoReturn:
    """Does what is asked for: runs the program that a command begins with, as `python` would."""
    os.setpgid(0, 0)  # a node ends the group of a worker after it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with asking:
        _, outputs, _, _ = socket.recv_fds(asking, 1, 2)
        message = b"".join(iter(lambda: asking.recv(2**16), b""))
    command, environment, folder = json.loads(message)
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[:0] = command, [str(Path(command[0]).parent)]
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        hand_over(sys.argv[1:])
