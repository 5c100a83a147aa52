"""What a wheel holds beside the code: a machine without the repository has the subjects that come with saescale."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_imports import ROOT


@pytest.mark.slow
def test_an_installed_wheel_has_the_shipped_subjects(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "saescale/shipped/synthsaebench-16k.yaml" in archive.namelist()
        archive.extractall(tmp_path / "site")
    code = (
        "import saescale, sys; assert saescale.__file__.startswith(sys.argv[1]), saescale.__file__; "
        "from saescale.trainers.subjects.subject import get_subject; print(get_subject('othello').score(50)['legal'])"
    )
    site = str(tmp_path / "site")
    # The path hook of an editable install would find the repository.
    without_hook = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
    found = subprocess.run(
        [sys.executable, "-c", without_hook + code, site],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": site}, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert float(found.stdout) > 0.85
    # In a checkout, whose own folder of that name Python finds first, the wheel's floors are found all the same.
    code = "import saescale, saescale.cluster.crew; print(saescale.__file__, saescale.cluster.__file__, sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", without_hook + code],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": site}, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert found.stdout.split() == [f"{ROOT}/saescale/__init__.py", f"{site}/saescale/cluster/__init__.py"]
