"""Whether a folder can be written to, and how much: asked before any work is done for what is to go there."""

import os
import shutil
import tempfile
import uuid

from saescale.storage import files
from saescale.storage.errors import SaescaleError, one_line


def require_lasting(url: str) -> None:
    """Raises SaescaleError for memory://, which is the memory of one process: of what a command writes there nothing is
    left when it has ended, and no other process sees it before."""
    if url.startswith("memory:"):
        raise SaescaleError(
            f"{url} is the memory of one process and ends with it; give a folder, or an object store (s3://...)"
        )


def require_writable(url: str) -> None:
    """Returns when files can be written into the folder `url`, there or not, and removed from it; leaves nothing there.

    Raises SaescaleError, which names the folder that refuses.
    """
    path = files.local_path(url)
    if path is None:
        probe = files.join(url, f".saescale-{uuid.uuid4().hex}")
        files.write_atomic(probe, b"")
        files.remove(probe)
        return
    try:
        folder = _nearest(path)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".saescale-") as file:
            file.write(b" ")
            file.flush()
    except OSError as error:
        where = "" if error.filename in (None, path) else f" ({error.filename})"
        raise SaescaleError(
            f"cannot write to {url}{where}: {one_line(error)}; give another folder, or the right to write there"
        ) from error


def free_bytes(url: str) -> int | None:
    """Of the disk on which the folder lies, or would be made; None where nobody can say (object stores)."""
    path = files.local_path(url)
    try:
        return None if path is None else shutil.disk_usage(_nearest(path)).free
    except OSError:
        return None


def _nearest(path: str) -> str:
    """The folder `path`, or that in which it would be made."""
    while True:
        try:
            os.scandir(path).close()
            return path
        except (FileNotFoundError, NotADirectoryError):
            if os.path.isfile(path):
                raise NotADirectoryError(20, "it is a file, not a folder", path) from None
            if os.path.islink(path):
                raise FileNotFoundError(2, "it is a link to nothing", path) from None
            path = os.path.dirname(path) or "."
