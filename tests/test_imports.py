"""The house: imports only point down, between floors and between their rooms; no circles; light floors stay light."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Bottom to top, and in each floor its rooms (and files beside them) bottom to top. What stands in one group knows
# nothing of the others there; every room may import the groups below it, and every floor the floors below.
ROOMS = {
    "storage": (
        ("secrets", "cache", "watched", "columns"),
        ("errors", "waiting", "mistakes"),
        ("bucket", "registry"),
        ("files",),
        ("documents", "writable"),
        ("tensors", "manifest", "lease", "versions"),
        ("sharded", "checkpoint", "rows"),
        ("source", "rundir"),
        ("stream",),
        ("store",),
        ("live",),
        ("recorded",),
    ),
    "scaling": (
        ("compute", "metrics", "order", "words", "values"),
        ("headers",),
        ("reading",),
        ("tables",),
        ("kinds", "where"),
        ("repeats", "levels"),
        ("sources",),
        ("laws",),
        ("comparison",),
        ("figures", "planning", "reproduce", "fit_sources"),
        ("report",),
    ),
    "trainers": (
        ("precision", "preprocess"),
        ("device",),
        ("kernels",),
        ("mesh",),
        ("architectures",),
        ("cell",),
        ("exchange", "subjects", "loggers"),
        ("harvest", "tasks"),
        ("evals",),
        ("training",),
    ),
    "cluster": (("crew",), ("sweep",), ("jobs",), ("front",), ("cli",)),
}
FLOORS = tuple(ROOMS)
SHIPPED = "saescale.shipped"  # weights of subjects; what of it is installed, tests/test_wheel.py says
HEAVY = {"torch", "lightning", "wandb", "transformers"}
# Tests of what is no file of its own: behaviour of the whole, at the boundary with another program.
BEHAVIOUR = {"scaling": {"page", "independent"}}


def sources() -> dict[str, Path]:
    """Every file of the floors, by the name it is imported by."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("saescale", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = sources()


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports, wherever in it, but for the eyes of type checkers alone."""
    modules: set[str] = set()
    tree = ast.parse(path.read_text())
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(modules)


def floor_and_room(module: str) -> tuple[str, str]:
    """Of a file beside the rooms, its own name is the room."""
    _, floor, *rest = module.split(".")
    return floor, rest[0] if rest else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    floor, room = floor_and_room(module)
    found = imported(MODULES[module])
    packages = {name.split(".")[0] for name in found}
    if floor != "cluster":
        assert "ray" not in packages
    if floor in ("storage", "scaling"):
        assert not packages & HEAVY
    if floor == "trainers" and room != "loggers":
        assert "wandb" not in packages
    levels = {name: level for level, names in enumerate(ROOMS[floor]) for name in names}
    for name in found & MODULES.keys():
        other, place = floor_and_room(name)
        assert FLOORS.index(other) <= FLOORS.index(floor), f"{module} imports {name}, a floor above"
        if floor == "trainers" and other == "scaling" and MODULES[name].stem != "__init__":
            # What training costs, what metrics are, and rows by what their columns say.
            assert MODULES[name].stem in ("compute", "metrics", "tables", "where"), f"{module} imports {name}"
        if other == floor and room and place and place != room:
            assert levels[place] < levels[room], f"{module} imports {name}, which is not below it"


def test_every_room_has_its_place() -> None:
    for floor, levels in ROOMS.items():
        there = {floor_and_room(module)[1] for module in MODULES if floor_and_room(module)[0] == floor} - {""}
        assert there == {room for level in levels for room in level}


def test_no_circle() -> None:
    """Not through functions' own imports either: what is imported late is a circle all the same."""
    below = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(below[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_folder_is_installed() -> None:
    """An installed saescale has every room, for users and for Ray's workers."""
    folders = {
        ".".join(("saescale", *path.parent.relative_to(ROOT).parts)) for path in MODULES.values()
    }  # fmt: skip
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({"saescale", *folders, SHIPPED})
    for folder in folders:
        path = ROOT.joinpath(*folder.split(".")[1:])
        assert (path / "__init__.py").is_file(), f"{path} is no package"


@pytest.mark.parametrize("floor", ["storage", "scaling"])
def test_tests_are_called_as_what_they_test(floor: str) -> None:
    files = {path.stem for name, path in MODULES.items() if floor_and_room(name)[0] == floor}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / floor).rglob("test_*.py")}
    assert tests - files == BEHAVIOUR.get(floor, set())


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (
            "storage.store storage.stream storage.rundir storage.checkpoint",
            "torch ray wandb lightning",
        ),
        ("scaling.report.report scaling.tables scaling.laws.law", "torch ray wandb lightning"),
        ("scaling.laws.settings", "torch ray wandb lightning numpy pyarrow"),
        ("trainers.training.train trainers.harvest.conduct trainers.subjects.subject", "ray"),
        # What hands work out and measures, and knows the class of those that train.
        ("cluster.sweep.driver cluster.sweep.execute cluster.crew.train_worker trainers.evals.bench", "lightning"),
        ("cluster.cli", "torch ray wandb lightning numpy"),
    ],
)
def test_importing_stays_light(modules: str, unwanted: str) -> None:
    imported = ", ".join(f"saescale.{module}" for module in modules.split())
    code = f"import sys, {imported}; print([m for m in {unwanted.split()} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
