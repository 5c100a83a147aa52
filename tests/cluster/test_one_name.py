"""saescale works from a folder whose packages have the names of its floors: the real command, on a Ray of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.sweep.status import read_status
from tests.cluster.command import environment
from tests.cluster.shadows import FLOORS, cast_shadows

COMMAND = str(Path(sys.executable).with_name("saescale"))


def test_the_shadows_are_cast(tmp_path: Path) -> None:
    for name in FLOORS:
        result = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=cast_shadows(tmp_path / name), capture_output=True, text=True
        )
        assert f"this is the {name} of the user" in result.stderr


@pytest.mark.slow
def test_a_sweep_among_them(document: dict[str, Any], sweep_file: Callable[[Any], str], tmp_path: Path) -> None:
    """They are in the current folder, which Ray shows to the workers, and found before what is installed."""
    folder = cast_shadows(tmp_path / "shadows")
    document["grid"] = {"n_latents": [32], "k": [2]}
    result = subprocess.run(
        [COMMAND, "sweep", sweep_file(document), "--bootstraps", "0"],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_status(document["out"]).state == "finished"
