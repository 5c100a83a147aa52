"""Files by fsspec URL: plain local paths, memory://, s3:// and whatever else fsspec knows. Writes are atomic.

Reading functions let `FileNotFoundError` through (absence is often an answer); every other failure becomes a
one-line `SaescaleError` that names the file, `Unavailable` where an object store did not answer after several tries.
"""

import errno
import glob
import io
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from saescale.storage.bucket import require_bucket
from saescale.storage.errors import SaescaleError, Unavailable, one_line
from saescale.storage.waiting import server, waiting

T = TypeVar("T")
_IN_MEMORY = threading.Lock()
Content = bytes | memoryview | Callable[[BinaryIO], None]

# A live writer touches its temporary file far more often than this; an older one belongs to a dead process.
ORPHAN_SECONDS = 900.0
_PAUSES_S = (0.5, 2.0)  # between tries; the libraries of object stores have tried several times by then
_PARTIAL = re.compile(r"^\.(.+)\.[0-9a-f]{32}\.partial$")


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url` and the path inside it; SaescaleError when nothing installed can open it, and where an
    object store does not answer or lacks the bucket."""
    fs, path = _named(url)
    if "://" in url:
        require_bucket(fs, path, url)
    return fs, path


def _named(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        # Listings are never cached: another process (a worker, a second driver) may write at any time.
        options = {"use_listings_cache": False} if "://" in url else {}
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise SaescaleError(
            f"cannot open {url}: {one_line(error)}; for s3:// run: pip install 'saescale[s3]'"
        ) from error
    except Exception as error:
        raise SaescaleError(f"cannot open {url}: {one_line(error)}; use a path or an fsspec URL") from error
    return fs, path


def local_path(url: str) -> str | None:
    """The path on this machine's disk, or None when `url` lies elsewhere."""
    fs, path = _named(url)  # nobody is asked
    return path if isinstance(fs, LocalFileSystem) else None


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it, whatever slashes either brings."""
    base = url if url.endswith("/") else url + "/"
    return base + "/".join(part.strip("/") for part in parts)


def exists(url: str) -> bool:
    """Whether a file or folder stands at `url`."""
    return _read(url, lambda fs, path: bool(fs.exists(path)))


def size(url: str) -> int:
    """Size of the file in bytes; FileNotFoundError when it is missing."""
    return _read(url, lambda fs, path: int(fs.size(path)))


def read_bytes(url: str) -> bytes:
    """The whole file; FileNotFoundError when it is missing."""
    return _read(url, lambda fs, path: bytes(fs.cat_file(path)))


@contextmanager
def reading(url: str) -> Iterator[None]:
    """For reads from what `open_input` gave: a failure becomes a SaescaleError that names the file.

    What was half read cannot be read again here, so an object store's failure is `Unavailable` at once.
    """
    try:
        yield
    except SaescaleError:
        raise
    except Exception as error:
        raise _read_error(url, error, tries=1) from error


def open_input(url: str, known_size: int | None = None) -> BinaryIO:
    """A seekable binary file; each read of a remote file is one ranged request (no read-ahead).

    `known_size` in bytes saves a remote file system the request that asks for it.
    """
    remote: dict[str, Any] = {}
    if not isinstance(filesystem(url)[0], LocalFileSystem):
        remote["cache_type"] = "none"
        if known_size is not None:
            remote["size"] = known_size
    return _read(url, lambda fs, path: cast(BinaryIO, fs.open(path, "rb", **remote)))


def list_names(url: str) -> list[str]:
    """Sorted base names in the folder, without temporaries of writers; [] when it is missing."""
    try:
        found = _read(url, lambda fs, path: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    own = filesystem(url)[1].rstrip("/")
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in found if entry.rstrip("/") != own}
    return sorted(name for name in names if not _PARTIAL.match(name))


def folders_like(pattern: str) -> list[str]:
    """The folders that `pattern` with its `*` matches, written as it is, in the order of the numbers in their names."""
    own = local_path(pattern)
    if own is not None:
        given = "*".join(glob.escape(part) for part in pattern.removeprefix("file://").split("*"))
        found = [path.rstrip("/") for path in glob.glob(given) if os.path.isdir(path)]
        return sorted(found, key=_by_numbers)
    entries = _read(pattern, lambda fs, path: fs.glob(path, detail=True))
    protocol = pattern[: pattern.index("://") + 3]
    found = [protocol + name.strip("/") for name, entry in entries.items() if entry["type"] == "directory"]
    return sorted(found, key=_by_numbers)


def _by_numbers(name: str) -> list[Any]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def sizes(url: str) -> dict[str, int]:
    """Bytes of the files in the folder by their base names, in one listing; {} where it cannot be listed."""
    try:
        found = _read(url, lambda fs, path: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"]
        for entry in found
        if entry["type"] == "file" and isinstance(entry["size"], int)
    }


def list_below(url: str) -> list[str]:
    """Paths of all files below the folder, relative to it, without temporaries of writers; [] when it is missing.

    One listing, also of an object store (a request for a thousand files); in no order.
    """
    fs, path = filesystem(url)
    own = len(path.rstrip("/")) + 1
    if isinstance(fs, LocalFileSystem):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    else:
        try:
            found = _read(url, lambda fs, path: list(fs.find(path)))
        except FileNotFoundError:
            return []
    return [name[own:] for name in found if not _PARTIAL.match(name.rsplit("/", 1)[-1])]


def remove(url: str) -> None:
    """Removes the file, or the folder with all below it; a missing one is fine."""

    def rm(fs: AbstractFileSystem, path: str) -> None:
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    _tried(url, rm, lambda error, tries: _error(url, "remove", error, tries, "check its permissions"))


def remove_partials(url: str, of: str | None = None) -> None:
    """Removes what killed writers left in a folder that nothing is written to any more, however new it is; `of`: of the
    file of that name alone, which nobody writes any more.

    Only local folders have such files: elsewhere a put that is cut short leaves nothing.
    """
    folder = local_path(url)
    if folder is not None and os.path.isdir(folder):
        _remove_partials(folder, 0.0, of)


def write_atomic(url: str, data: Content) -> int:
    """Writes the file whole or not at all, also when the process is killed; returns its size in bytes.

    `data` is the content, or a function that writes it to a binary file. Local: a temporary name in the same
    folder, fsync, rename. Elsewhere: one put. SaescaleError names the file when the disk is full or refuses.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return _write_local(url, path, data)
    if callable(data):
        buffer = io.BytesIO()
        data(buffer)
        data = buffer.getvalue()
    content = bytes(data)
    _tried(url, lambda fs, path: fs.pipe_file(path, content), lambda error, tries: _write_error(url, error, tries))
    return len(content)


def write_large(url: str, write: Callable[[BinaryIO], None]) -> None:
    """As `write_atomic`, of a file that may be larger than memory: `write` is given a file that sends on what it gets.

    An object store shows it when it is whole. `write` may be called again.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        _write_local(url, path, write)
        return

    def put(fs: AbstractFileSystem, path: str) -> None:
        with fs.open(path, "wb") as file:
            write(file)

    _tried(url, put, lambda error, tries: _write_error(url, error, tries))


def create(url: str, content: bytes) -> bool:
    """Writes the file, whole, unless there is one: of several that try at a time one succeeds. Whether it did.

    `content` has to be like no other's, since a put whose answer got lost is known again by it. Where a store has no
    conditional puts (fsspec's `mode="create"`), two that try within a moment are told apart by who wrote last.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return _create_local(url, path, content)
    if isinstance(fs, MemoryFileSystem):
        # Its own look and its write are two steps; it is of this process alone.
        with _IN_MEMORY:
            if fs.exists(path):
                return False
            fs.pipe_file(path, content)
            return True

    def put(fs: AbstractFileSystem, path: str) -> None:
        with suppress(FileExistsError):
            try:
                fs.pipe_file(path, content, mode="create")
            except (TypeError, ValueError, NotImplementedError):
                if not fs.exists(path):
                    fs.pipe_file(path, content)
            except OSError as error:
                if "PreconditionFailed" not in str(error) and "pre-condition" not in str(error).lower():
                    raise

    _tried(url, put, lambda error, tries: _write_error(url, error, tries))
    return read_bytes(url) == content


def _create_local(url: str, path: str, content: bytes) -> bool:
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}.partial")
    _write_local(url, temporary, content)
    try:
        os.link(temporary, path)
        _sync_folder(os.path.dirname(path))
    except FileExistsError:
        return False
    except OSError as error:
        raise _write_error(url, error) from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return True


def move(url: str, target: str) -> bool:
    """Gives a file another name in its store, in place of what has that name. False where there is no such file."""
    if (path := local_path(url)) is not None:
        try:
            os.replace(path, filesystem(target)[1])
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _write_error(target, error) from error
        return True

    def copy(fs: AbstractFileSystem, path: str) -> bool:
        if not fs.exists(path):
            return False
        fs.cp_file(path, filesystem(target)[1])
        return True

    found = _tried(url, copy, lambda error, tries: _write_error(target, error, tries))
    remove(url)
    return found


def _write_local(url: str, path: str, data: Content) -> int:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.partial")
    try:
        os.makedirs(folder, exist_ok=True)
        _remove_partials(folder, ORPHAN_SECONDS)
        with open(temporary, "xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written = os.fstat(file.fileno()).st_size
        os.replace(temporary, path)
        _sync_folder(folder)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise _write_error(url, error) from error
        raise
    return written


def _remove_partials(folder: str, older_s: float, of: str | None = None) -> None:
    """Frees what killed writers left behind in the folder: checkpoints, say, whose names do not come again."""
    for entry in os.listdir(folder):
        if (match := _PARTIAL.match(entry)) and of in (None, match[1]):
            partial = os.path.join(folder, entry)
            with suppress(OSError):
                if time.time() - os.path.getmtime(partial) >= older_s:
                    os.unlink(partial)


def _sync_folder(folder: str) -> None:
    # Makes the rename itself durable; some network file systems refuse this, and that is no failure.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_error(url: str, error: Exception, tries: int = 1) -> SaescaleError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SaescaleError(
            f"disk full while writing {url}: free space and run the same command again; nothing half-written is left"
        )
    advice = "check the address, permissions and credentials; nothing half-written is left"
    return _error(url, "write", error, tries, advice)


def _read_error(url: str, error: Exception, tries: int) -> SaescaleError:
    if isinstance(error, FileNotFoundError):
        raise error
    require_memory(url, error)
    if isinstance(error, NotADirectoryError):  # nothing lies below a file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    if isinstance(error, IsADirectoryError):
        return SaescaleError(f"cannot read {url}: it is a folder where a file should be; name the file")
    if isinstance(error, PermissionError) and local_path(url) is not None:
        return _error(url, "read", error, tries, "give this user the right to read it")
    return _error(url, "read", error, tries, "check the address, the network and the credentials")


def require_memory(url: str, error: Exception) -> None:
    """Raises MemoryError where that is what `error` of a read says: no file's fault, and others know what to do."""
    if lacks_memory(error):
        raise MemoryError(f"{url}: {error}") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether this process got no memory, for a thread's stack maybe, in the words of Python, Arrow or the system."""
    text = str(error)
    # Arrow's OSError has no number, and what it says of a thread is an error of no class of its own.
    of_a_thread = "thread" in text and os.strerror(errno.EAGAIN) in text
    of_python = isinstance(error, RuntimeError) and text.startswith("can't start new thread")
    of_the_system = isinstance(error, OSError) and os.strerror(errno.ENOMEM) in text
    return isinstance(error, MemoryError) or of_the_system or of_a_thread or of_python


def _error(url: str, verb: str, error: Exception, tries: int, advice: str) -> SaescaleError:
    kind = Unavailable if may_pass(url, error) else SaescaleError
    return kind(f"cannot {verb} {url}{f' ({tries} tries)' if tries > 1 else ''}: {one_line(error)}; {advice}")


def _read(url: str, action: Callable[[AbstractFileSystem, str], T]) -> T:
    return _tried(url, action, lambda error, tries: _read_error(url, error, tries))


def _tried(
    url: str,
    action: Callable[[AbstractFileSystem, str], T],
    explained: Callable[[Exception, int], SaescaleError],
) -> T:
    """What `action` gives; where an object store does not answer, after a pause, and another.

    The last failure becomes what `explained` makes of it.
    """
    fs, path = filesystem(url)
    with waiting(f"an answer of {server(url)}"):
        for tries, pause in enumerate((*_PAUSES_S, None), start=1):
            try:
                return action(fs, path)
            except Exception as error:  # object stores raise classes of their own (botocore's are no OSError)
                if pause is None or not may_pass(url, error):
                    raise explained(error, tries) from error
            # Not all at the same moment: it was perhaps the number of us that was too much.
            time.sleep(pause * random.uniform(0.5, 1.5))
    raise AssertionError("the last try returns or raises")


def may_pass(url: str, error: Exception) -> bool:
    """Whether the same may succeed later: an object store that fails for another reason than being asked wrongly."""
    asked_wrongly = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (*asked_wrongly, ValueError, TypeError, NotImplementedError)):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL):
        return False
    return local_path(url) is None and "credentials" not in type(error).__name__.lower()
