"""What lies on the disk below a folder, looked at after every single write of saescale's: in this process, and in the
workers of the tests' Ray cluster, which are told of it by a file.

Everything that storage/files.py writes on a local disk goes through one `open`, which is replaced.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saescale.storage import files

if TYPE_CHECKING:
    import pytest

NOTE = "SAESCALE_TEST_WATCH"  # in the environment of workers: the file that says what is watched, and where to tell it


class Watch:
    """The most bytes, and the most blocks, that ever lay below the folder; over how many writes of this process and,
    `of_workers`, of others."""

    def __init__(self, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._own, self._told = _Looks(folder), Path(f"{folder.rstrip('/')}-watched")
        monkeypatch.setattr(files, "open", _opened(lambda path: self._own if _below(path, folder) else None), False)
        if note := os.environ.get(NOTE):
            Path(note).write_text(f"{folder}\n{self._told}")

    @property
    def bytes(self) -> int:
        return max([self._own.bytes, *(each[0] for each in self._others())])

    @property
    def blocks(self) -> int:
        return max([self._own.blocks, *(each[1] for each in self._others())])

    @property
    def writes(self) -> int:
        return self._own.writes

    @property
    def of_workers(self) -> int:
        return len(self._others())

    def _others(self) -> list[tuple[int, int]]:
        lines = self._told.read_text().splitlines() if self._told.exists() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


class _Looks:
    def __init__(self, folder: str, told: Path | None = None) -> None:
        self.folder, self.told, self.bytes, self.blocks, self.writes = folder, told, 0, 0, 0
        self._lock = threading.Lock()

    def look(self) -> None:
        total = blocks = 0
        for path in Path(self.folder).rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
            blocks += "train-" in path.name
        with self._lock:
            self.bytes, self.blocks, self.writes = max(self.bytes, total), max(self.blocks, blocks), self.writes + 1
        if self.told is not None:
            with self.told.open("a") as file:  # appended whole
                file.write(f"{total} {blocks}\n")


class _File(io.FileIO):
    """Without a buffer: what was written is on the disk when it is looked at."""

    def __init__(self, path: str, looks: _Looks) -> None:
        super().__init__(path, "x")
        self._looks = looks

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._looks.look()
        return written


def _opened(looks: Callable[[str], _Looks | None]) -> Callable[..., Any]:
    """In place of `open` in files.py, which writes with the mode "xb" and no other."""

    def opened(path: str, mode: str) -> Any:
        assert mode == "xb"
        found = looks(path)
        return open(path, mode) if found is None else _File(path, found)

    return opened


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def watch_here() -> None:
    """In a worker, from now on: what the note says at each write."""

    def looks(path: str) -> _Looks | None:
        note = Path(os.environ.get(NOTE, "/nowhere"))
        if not note.exists():
            return None
        folder, told = note.read_text().split("\n")
        return _Looks(folder, Path(told)) if _below(path, folder) else None

    files.open = _opened(looks)  # type: ignore[attr-defined]
