"""Architectures of the user's own in a sweep: the files that go with it to other machines, and whether they changed."""

import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import xxhash

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.architectures import ARCHITECTURES


def own_files(names: Iterable[str]) -> dict[str, str]:
    """The text of each of the named architectures that is a file of the user's, by its name.

    Raises SaescaleError for one that there is not, or that cannot be read.
    """
    paths = {name: ARCHITECTURES.own(name) for name in names}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise SaescaleError(f"a file of an architecture cannot be read: {one_line(error)}") from error


def digests(files: Mapping[str, str]) -> dict[str, str]:
    """What a run records of them: the XXH3-64 of each, in hex."""
    return {name: xxhash.xxh3_64_hexdigest(text.encode()) for name, text in sorted(files.items())}


def require_same(recorded: Mapping[str, str], here: Mapping[str, str], run: str) -> None:
    """Raises SaescaleError where a digest is not the one that the run `recorded`: its cells would not be alike."""
    for name, digest in here.items():
        if recorded.get(name, digest) != digest:
            raise SaescaleError(
                f"the file of the architecture {name} has changed since {run} was begun; give the one that it keeps "
                f"({kept(run, name)}), or begin in another run directory"
            )


def kept(run: str, name: str) -> str:
    """Where a run keeps the file of an architecture."""
    return f"{run.rstrip('/')}/architectures/{name}.py"


def not_here(run: str, name: str) -> SaescaleError:
    """What is said where a run has an architecture whose file this process was not given."""
    return SaescaleError(
        f"{name} is an architecture of your own, whose file is not here: give it with --architecture-file (the run "
        f"keeps a copy, {kept(run, name)})"
    )


def take(files: Mapping[str, str]) -> None:
    """Makes files that came from another machine architectures of this process."""
    for name, text in files.items():
        if name in ARCHITECTURES.names() and own_files([name]) == {name: text}:
            continue
        path = Path(_folder().name) / digests({name: text})[name] / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        ARCHITECTURES.give(str(path))


@lru_cache(maxsize=1)
def _folder() -> "tempfile.TemporaryDirectory[str]":
    """Goes with the process."""
    return tempfile.TemporaryDirectory(prefix="saescale-architectures-")
