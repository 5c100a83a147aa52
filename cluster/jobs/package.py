"""What a submitted job brings along: its sweep file, the user's files of the architectures that this names, saescale's
own code, and nothing else of the user's disk."""

import importlib.util
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from saescale.cluster.sweep.spec import SweepSpec
from saescale.storage.documents import yaml_text
from saescale.trainers.architectures.own import own_files

PACKAGES = (
    "saescale", "saescale.storage", "saescale.scaling", "saescale.trainers", "saescale.cluster", "saescale.shipped",
)  # fmt: skip
SWEEP, EXTENSION = "sweep.yaml", "extension.yaml"
_ARCHITECTURES = "architectures"
_SUFFIXES = (".py", ".j2", ".css", ".js", ".csv", ".md", ".json", ".safetensors")


def write_sweep(folder: Path, spec: SweepSpec, extension: SweepSpec | None = None) -> list[str]:
    """Writes sweep.yaml, and extension.yaml where there is one, as they were understood (comments are gone), and the
    files of their architectures that are the user's own, whose paths in `folder` are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in ((SWEEP, spec), (EXTENSION, extension)):
        if document is not None:
            (folder / name).write_text(yaml_text(document.model_dump(mode="json")), encoding="utf-8")
    asked = [*spec.grid.architectures, *(extension.grid.architectures if extension else ())]
    own = own_files(dict.fromkeys(asked))
    for name, text in own.items():
        (folder / _ARCHITECTURES).mkdir(exist_ok=True)
        (folder / _ARCHITECTURES / f"{name}.py").write_text(text, encoding="utf-8")
    return [f"{_ARCHITECTURES}/{name}.py" for name in own]


def write_code(folder: Path) -> list[Path]:
    """Copies saescale's sources, and returns what to put on the cluster's path: the one package, and its version.

    Files are chosen one by one, so that no .env, key or notebook that lies among them can go with them.
    """
    for package in PACKAGES:
        for source, relative in _sources(package):
            target = folder.joinpath(*package.split("."), relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    # A run records the version that trained it: this one, whatever is installed on the cluster.
    info = folder / f"saescale-{version('saescale')}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: saescale\nVersion: {version('saescale')}\n")
    return [folder / "saescale", info]


def _sources(package: str) -> Iterator[tuple[Path, Path]]:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for source in sorted(root.rglob("*")):
        relative = source.relative_to(root)
        if source.suffix in _SUFFIXES and not any(part.startswith((".", "__pycache__")) for part in relative.parts):
            yield source, relative
