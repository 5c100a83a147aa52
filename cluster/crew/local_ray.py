"""A Ray of this process's own on this machine: where its files lie, how long it may take to start, and its end."""

import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from saescale.cluster.crew.token import has_token, home_token
from saescale.storage import watched
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line

START_S = 120.0  # for Ray's processes to come up
BUSY_S = 20.0  # a start that fails later than this failed because the machine is busy
_PREFIX = "saescale-ray-"
# What Ray puts below its folder: a session of the longest name, and the longest socket in it, of which there may be
# several.
_SOCKET = "x" * 8 + "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store.99"
_LONGEST = (104 if sys.platform == "darwin" else 108) - 1  # bytes in the path of a Unix socket
# How long Ray's own processes wait for one another.
_LIMITS = {
    "RAY_raylet_start_wait_time_s": START_S,
    "RAY_gcs_server_port_wait_time_s": START_S,
    "RAY_worker_register_timeout_seconds": START_S,
    "RAY_agent_register_timeout_ms": 1000 * START_S,
}

_folder: str | None = None  # of the one that runs


def start(options: dict[str, Any]) -> None:
    """Starts it, and joins it; on a busy machine in a second attempt. `options`: of `ray.init`.

    Raises SaescaleError where it does not start, which names Ray's logs.
    """
    _prepare()
    for again in (False, True):
        folder, began = _new_folder(), time.monotonic()
        watched.tell(ray_folder=folder)  # which removes it where this process no longer can
        try:
            with _patience(folder):
                # Without an address Ray would join any cluster that happens to run on this machine.
                ray.init(address="local", _temp_dir=folder, **options)
        except Exception as error:  # Ray raises bare ones
            _clear(folder)
            took = time.monotonic() - began
            if took < BUSY_S or again:
                raise SaescaleError(
                    f"a local Ray did not start ({took:.0f} s{', the second time' if again else ''}): "
                    f"{one_line(error)[:300]}; {_advice(took)}its logs are in {folder}/session_latest/logs"
                ) from error
            shutil.rmtree(folder, ignore_errors=True)
            warnings.warn(
                f"a local Ray did not start within {took:.0f} s, as happens on a machine that is busy; trying it once "
                "more",
                SaescaleWarning,
                stacklevel=3,
            )
        except BaseException:
            _clear(folder)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        else:
            global _folder
            _folder = folder
            return


def remove_folder() -> None:
    """Removes what the local Ray, which has ended, left behind."""
    global _folder
    if _folder is not None:
        for _ in range(10):  # its processes may still write while they end
            shutil.rmtree(_folder, ignore_errors=True)
            if not os.path.exists(_folder):
                break
            time.sleep(0.1)
        _folder = None
        watched.tell(ray_folder=None)


def _prepare() -> None:
    """The environment of its processes."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, f"{value:.0f}")
    # What saescale writes is not only ASCII, whatever the locale of this machine is.
    os.environ["PYTHONUTF8"] = "1"
    os.environ.pop("PYTHONIOENCODING", None)
    home = home_token()
    if not has_token() and not (home is not None and _may_be_made(home.parent)):
        # Ray would put one there.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _may_be_made(folder: os.PathLike[str]) -> bool:
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def _new_folder() -> str:
    """A folder of its own, where the paths of Ray's sockets are not too long, as below the temporary folder of a batch
    job they may be; in Ray's own, /tmp/ray, another user's session may stand in the way."""
    tried = []
    for base in dict.fromkeys((os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        if not base:
            continue
        if len(os.fsencode(os.path.join(os.path.abspath(base), _PREFIX + _SOCKET))) > _LONGEST:
            tried.append(f"{base} has too long a name")
            continue
        try:
            return tempfile.mkdtemp(prefix=_PREFIX, dir=os.path.abspath(base))
        except OSError as error:
            tried.append(f"{base}: {one_line(error)}")
    raise SaescaleError(
        f"there is no folder for a local Ray ({'; '.join(tried)}); name a short one that can be written to: RAY_TMPDIR"
    )


@contextmanager
def _patience(folder: str) -> Iterator[None]:
    """Ray gives its node 30 s, which no option changes: here it has START_S, as long as it lives."""
    from ray._private import services

    asked, until = services.get_node, time.monotonic() + START_S

    def get_node(*arguments: Any, **named: Any) -> Any:
        while True:
            try:
                return asked(*arguments, **named)
            except RuntimeError:
                if time.monotonic() > until or not any("raylet" in name for name in _processes(folder).values()):
                    raise
                time.sleep(0.5)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = asked


def _clear(folder: str) -> None:
    """Ends what a failed start has left running."""
    with suppress(Exception):
        ray.shutdown()
    for pid in _processes(folder):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _processes(folder: str) -> dict[int, str]:
    """The names of this process's children that work in `folder`, by their ids."""
    import psutil  # type: ignore[import-untyped]  # Ray brings it along

    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                found[process.pid] = process.name()
    return found


def _advice(took: float) -> str:
    return "" if took < BUSY_S else "try again when this machine has less to do; "
