"""Folders of a user's that have the names of saescale's floors, or its own."""

from pathlib import Path

FLOORS = ("storage", "scaling", "trainers", "cluster")


def cast_shadows(folder: Path) -> Path:
    """Packages that fail when they are imported, and a folder `saescale` with a run in it; returns `folder`."""
    for name in FLOORS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('this is the {name} of the user')\n")
    (folder / "saescale" / "runs").mkdir(parents=True)
    return folder
