"""What stands in a room behind its door, found by its file name.

    ARCHITECTURES = Room("saescale.trainers.architectures", "architecture", marker="forward")
    ARCHITECTURES.names()          # ("batchtopk", "topk", ...), nothing imported
    ARCHITECTURES.load("topk")     # the module, imported now
    ARCHITECTURES.give("my/toy.py")  # from now on "toy" is one of them

A file of the room, or of a room within it, belongs to it when it defines the room's `marker` at its top level; door and
helpers do not. Folders named in SAESCALE_PATH (separated like PATH) are rooms of the user's own:
`$SAESCALE_PATH/architectures/mine.py` is an architecture `mine`.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from saescale.storage.errors import SaescaleError, one_line

PATH = "SAESCALE_PATH"
# The product's own that were loaded, by package and stem: no user's file takes their place, and plans of thousands of
# cells ask for the same a hundred thousand times.
_OWN: dict[tuple[str, str], ModuleType] = {}
# Files of the user's that this process was given, by package and stem.
_GIVEN: dict[tuple[str, str], Path] = {}


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
                self._require(path)

    def _require(self, path: Path) -> None:
        """Raises SaescaleError where a file of the user's is none of the room's."""
        try:
            ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise SaescaleError(f"{path} ({self.what}) is no Python: {one_line(error)}") from error
        if self.marker not in _defined(str(path), path.stat().st_mtime_ns):
            raise SaescaleError(f"{path} is no {self.what}: it defines no `{self.marker}` at its top level")

    def give(self, path: str) -> str:
        """Makes a file of the user's one of the room, in this process, and returns its name, which is the file's.

        It goes before those of SAESCALE_PATH. Raises SaescaleError where it cannot be one.
        """
        where = Path(path).expanduser()
        if not where.is_file():
            raise SaescaleError(f"there is no {self.what} file at {path}; it is Python that defines `{self.marker}`")
        where, name = where.resolve(), _stem(Path(path).stem)
        if where.suffix != ".py" or not name.isidentifier():
            raise SaescaleError(
                f"{path} is not called as a file of Python that is an {self.what}, such as my_{self.what}.py"
            )
        self._require(where)
        before = _GIVEN.get((self.package, name), where)
        if name in self._files() and self.own(name) is None:
            raise SaescaleError(f"{path}: {name} is the name of an {self.what} of saescale; call the file otherwise")
        if before != where:
            raise SaescaleError(f"{path}: {before} is the {self.what} {name} already; call one of them otherwise")
        _GIVEN[self.package, name] = where
        return name

    def defines(self, name: str, what: str) -> bool:
        """Whether the file of that name defines `what` at its top level. Raises SaescaleError as `check` does, and
        imports nothing."""
        self.check(name)
        path = self._files()[_stem(name)]
        return what in _defined(str(path), path.stat().st_mtime_ns)

    def own(self, name: str) -> Path | None:
        """The user's file of that name; None where it is one of the product's. Raises SaescaleError as `check` does."""
        self.check(name)
        path = self._files()[_stem(name)]
        return None if path.is_relative_to(self._folder()) else path

    def about(self, name: str) -> str:
        """The first paragraph of what its file says of itself, as one line. Imports nothing."""
        self.check(name)
        said = ast.get_docstring(ast.parse(self._files()[_stem(name)].read_bytes())) or ""
        return " ".join(said.partition("\n\n")[0].split())

    def load(self, name: str) -> ModuleType:
        """The module of that name. Raises SaescaleError for an unknown one, and for a file of the user's that fails."""
        if (known := _OWN.get((self.package, _stem(name)))) is not None:
            return known
        self.check(name)
        path = self._files()[_stem(name)]
        if not path.is_relative_to(self._folder()):
            return load_file(path, self.what)
        inside = path.relative_to(self._folder()).with_suffix("").parts
        module = importlib.import_module(".".join((self.package, *inside)))
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
        found: dict[str, Path] = {}
        for folder in self._own_folders():
            found |= self._of(folder.glob("*.py"))
        found |= {stem: path for (package, stem), path in _GIVEN.items() if package == self.package}
        return found | self._of(self._folder().rglob("*.py"))

    def _of(self, paths: Iterable[Path]) -> dict[str, Path]:
        marked = (path for path in sorted(paths) if self.marker in _defined(str(path), path.stat().st_mtime_ns))
        return {path.stem: path for path in marked}


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
    except (Exception, SystemExit) as error:
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
