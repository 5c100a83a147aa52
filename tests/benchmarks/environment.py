"""The environment that the peers' libraries live in, apart from saescale's."""

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.harness import ROOT, BenchmarkError, console

REQUIREMENTS = Path(__file__).with_name("peers_requirements.txt")
VARIABLE = "SAESCALE_PEERS_VENV"


def peers_python(folder: Path | None = None) -> Path:
    """The peers' interpreter.

    That of `folder` or else of $SAESCALE_PEERS_VENV: an environment that somebody made, taken as it is. Without either
    that of .venv-peers at the root of the repository, which is made by venv and pip where it is absent, unfinished or
    of other requirements than today's.
    """
    given = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if given is None:
        return _own()
    python = _interpreter(given)
    if not python.exists():
        raise BenchmarkError(f"{given} holds no Python environment ({python} is missing)")
    return python


def _own() -> Path:
    folder = ROOT / ".venv-peers"
    python, stamp = _interpreter(folder), folder / "installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + platform.python_version().encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    console.print(
        f"installing the peers' libraries into {folder.name}: minutes, and about 2 GB with a CPU build of torch"
    )
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    # Keeps git from seeing the environment, whatever the repository's own list says.
    (folder / ".gitignore").write_text("*\n")
    _call([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)])
    # Has to come last: an installation that was cut off has no stamp and is done anew.
    stamp.write_text(wanted)
    return python


def _interpreter(folder: Path) -> Path:
    return folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{' '.join(command)} ended with status {error.returncode}") from None
