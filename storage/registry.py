"""What stands in a room behind its door, found by its file name.

    ARCHITECTURES = Room("saescale.trainers.architectures", "architecture", marker="forward")
    ARCHITECTURES.names()          # ("batchtopk", "topk", ...), nothing imported
    ARCHITECTURES.load("topk")     # the module, imported now

A file of the room belongs to it when it defines the room's `marker` at its top level; door and helpers do not. Folders
named in SAESCALE_PATH (separated like PATH) are rooms of the user's own: `$SAESCALE_PATH/architectures/mine.py` is an
architecture `mine`. They have to be there on every machine that works on a sweep.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from saescale.storage.errors import SaescaleError, one_line

PATH = "SAESCALE_PATH"
# The product's own that were loaded, by package and stem: no user's file takes their place, and plans of thousands of
# cells ask for the same a hundred thousand times.
_OWN: dict[tuple[str, str], ModuleType] = {}


class Room(NamedTuple):
    """`package`: where its files are; `what`: what one of them is, in words; `marker`: the name that each defines;
    `folder`: what the user's own is called (the last part of `package`)."""

    package: str
    what: str
    marker: str
    folder: str = ""

    def names(self) -> tuple[str, ...]:
        """All that can be asked for, in the order of the alphabet. Imports none of them."""
        return tuple(sorted(self._files()))

    def check(self, name: str) -> None:
        """Raises SaescaleError with the nearest name where there is none of that name. Imports nothing."""
        files = self._files()
        if _stem(name) not in files:
            self._explain(name)
            close = difflib.get_close_matches(_stem(name), files, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise SaescaleError(f"unknown {self.what} {name!r}: {hint}there are {', '.join(sorted(files))}")

    def _explain(self, name: str) -> None:
        """Raises SaescaleError where the user has a file of that name that is none of the room's."""
        for folder in self._own_folders():
            path = folder / f"{_stem(name)}.py"
            if path.is_file():
                try:
                    ast.parse(path.read_bytes())
                except (SyntaxError, ValueError) as error:
                    raise SaescaleError(f"{path} ({self.what}) is no Python: {one_line(error)}") from error
                raise SaescaleError(f"{path} is no {self.what}: it defines no `{self.marker}` at its top level")

    def load(self, name: str) -> ModuleType:
        """The module of that name. Raises SaescaleError for an unknown one, and for a file of the user's that fails."""
        if (known := _OWN.get((self.package, _stem(name)))) is not None:
            return known
        self.check(name)
        path = self._files()[_stem(name)]
        if path.parent != self._folder():
            return load_file(path, self.what)
        module = importlib.import_module(f"{self.package}.{path.stem}")
        return _OWN.setdefault((self.package, path.stem), module)

    def _folder(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        return Path(next(iter(spec.submodule_search_locations)))

    def _own_folders(self) -> list[Path]:
        """Where files of the user's own are looked for."""
        room = self.folder or self.package.rpartition(".")[2]
        return [Path(folder) / room for folder in os.environ.get(PATH, "").split(os.pathsep) if folder]

    def _files(self) -> dict[str, Path]:
        # The product's own last: a user's file never takes the place of one of them.
        return {
            path.stem: path
            for folder in (*self._own_folders(), self._folder())
            for path in sorted(folder.glob("*.py"))
            if self.marker in _defined(str(path), path.stat().st_mtime_ns)
        }


def load_file(path: Path, what: str) -> ModuleType:
    """Runs a file of the user's as a module of its own, once in a process. Raises SaescaleError where it fails."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"saescale_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, SaescaleError):
            raise
        raise SaescaleError(f"{path} ({what}) fails with {type(error).__name__}: {one_line(error)}; correct it") from (
            error
        )
    return module


def _stem(name: str) -> str:
    return name.replace("-", "_")


@lru_cache(maxsize=1024)
def _defined(path: str, changed: int) -> frozenset[str]:
    """The names that a file defines at its top level; none where it is no Python. `changed`: when it was."""
    try:
        body = ast.parse(Path(path).read_bytes()).body
    except (SyntaxError, ValueError, OSError):
        return frozenset()
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return frozenset(names)
