"""The floors: imports only point down, and the light floors stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("storage", "scaling", "trainers", "cluster")  # bottom to top
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    modules = imported(path)
    packages = {module.removeprefix("saescale.").split(".")[0] for module in modules}
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    assert not packages & above
    if floor != "cluster":
        assert "ray" not in packages
    if floor in ("storage", "scaling"):
        assert not packages & {"torch", "lightning", "wandb", "transformers"}
    if floor == "trainers":
        from_scaling = {module for module in modules if module.startswith("saescale.scaling.")}
        assert all(module.startswith("saescale.scaling.compute") for module in from_scaling)
        if not path.name.startswith("wandb_"):
            assert "wandb" not in packages


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("storage.store storage.stream storage.rundir storage.checkpoint", "torch ray wandb lightning"),
        ("scaling.report.report scaling.tables scaling.laws.law", "torch ray wandb lightning"),
        ("trainers.training.train trainers.harvest.conduct trainers.subjects.subject", "ray"),
        ("cluster.cli", "torch ray wandb lightning numpy"),
    ],
)
def test_importing_stays_light(modules: str, unwanted: str) -> None:
    imported = ", ".join(f"saescale.{module}" for module in modules.split())
    code = f"import sys, {imported}; print([m for m in {unwanted.split()} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
