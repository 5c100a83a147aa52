"""Where the model of a name lies: a folder of this machine, or one of the Hugging Face hub's cache that is filled from
the hub. One look at the hub decides whether it is in reach; without it, what the cache holds is taken."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.subjects.checkpoint import SMALL_FILES, WEIGHTS, Checkpoint

Notify = Callable[[str], None]
LOOK_S = 10.0  # a hub that does not answer in that time is out of reach


class HubName(NamedTuple):
    """`<org>/<name>`, and behind an `@` the branch, tag or commit."""

    model: str
    revision: str | None


class Found(NamedTuple):
    """A checkpoint, of which weights may be missing yet; `of` is its name on the hub at a commit, `unreachable` why the
    hub cannot be asked for them. Both None: a folder."""

    checkpoint: Checkpoint
    of: HubName | None
    unreachable: Exception | None


def find_small_files(rest: str) -> Found:
    """The checkpoint that `hf:rest` means: its configuration and tokenizer are there, of the hub nothing else yet.

    Raises SaescaleError where there is no such folder or model, the hub is out of reach and its cache lacks the model,
    and for what `check_small_files` raises.
    """
    name = f"hf:{rest}"
    if is_path(rest):
        found = Found(Checkpoint(name, _local_folder(name, rest)), None, None)
    else:
        wanted = hub_name(rest)
        unreachable = _look(name, wanted)
        folder = _fetch(name, wanted, SMALL_FILES, unreachable)
        found = Found(Checkpoint(name, folder), HubName(wanted.model, folder.name), unreachable)
    found.checkpoint.check_small_files()
    return found


def find_weights(found: Found, notify: Notify) -> Checkpoint:
    """The checkpoint with its weights, fetched where they are on the hub alone; raises what `check_weights` and the hub
    raise."""
    for name in WEIGHTS if found.of else ():
        _fetch_missing(found, [name], notify)
        if (found.checkpoint.folder / name).is_file():
            _fetch_missing(found, found.checkpoint.weight_files(), notify)
            break
    found.checkpoint.check_weights()
    return found.checkpoint


def is_path(rest: str) -> bool:
    """Whether a folder is meant and not a name on the hub."""
    return rest.startswith(("/", ".", "~"))


def hub_name(rest: str) -> HubName:
    """Raises SaescaleError for what cannot be a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    model, at, revision = rest.partition("@")
    if at and not revision:
        raise SaescaleError(f"hf:{rest}: a branch, tag or commit has to stand behind the @, as in hf:{model}@main")
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise SaescaleError(
            f"hf:{rest}: {model!r} cannot be a name on the Hugging Face hub, which is <org>/<name>; "
            "a folder is written hf:/path/to/folder or hf:./folder"
        ) from error
    return HubName(model, revision or None)


def _local_folder(name: str, rest: str) -> Path:
    before, at, revision = rest.rpartition("@")
    try:
        folder = Path(rest).expanduser()
        if folder.is_dir():
            return folder
        if at and Path(before).expanduser().is_dir():
            raise SaescaleError(
                f"subject {name}: a folder has no revisions, so {revision!r} cannot be taken from {before}; "
                "check it out there, or name the model on the hub"
            )
        is_file = folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name, no such user
        raise SaescaleError(f"subject {name}: there is no such folder ({one_line(error)})") from error
    if is_file:
        raise SaescaleError(f"subject {name}: {folder} is a file; give the folder that holds it with its config.json")
    raise SaescaleError(f"subject {name}: there is no folder {folder}")


def _look(name: str, wanted: HubName) -> Exception | None:
    """Asks the hub for the model, once; the reason where it does not answer. SaescaleError where there is no such
    revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        with _quiet_hub():
            HfApi().model_info(wanted.model, revision=wanted.revision, timeout=LOOK_S)
        return None
    except RevisionNotFoundError as error:
        raise SaescaleError(f"cannot load the subject {name}: {_reason(wanted, error)}") from error
    except Exception as error:  # httpx, OSError and hub errors share no base class
        return error


def _fetch_missing(found: Found, files: list[str], notify: Notify) -> None:
    assert found.of is not None
    if not all((found.checkpoint.folder / file).is_file() for file in files):
        notify(f"downloading {found.checkpoint.name} (once)")
        _fetch(found.checkpoint.name, found.of, files, found.unreachable)


def _fetch(name: str, wanted: HubName, patterns: Iterable[str], unreachable: Exception | None) -> Path:
    """The folder of the hub's cache that now holds the files of that revision that match a pattern."""
    from huggingface_hub import HfApi

    try:
        # Files in folders are other formats (onnx/, original/).
        with _quiet_hub():
            folder = HfApi().snapshot_download(
                wanted.model,
                revision=wanted.revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_files_only=unreachable is not None,
            )
    except Exception as error:  # as above
        raise SaescaleError(f"cannot load the subject {name}: {_reason(wanted, unreachable or error)}") from error
    return Path(folder)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps progress bars and advice off a terminal on which a progress display may stand."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _reason(wanted: HubName, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{wanted.model} is gated: ask for access at https://huggingface.co/{wanted.model} and log in here "
            "(hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{wanted.model} has no revision {wanted.revision!r}{_nearest_revisions(wanted)}"
    here = f"; there is a folder of that name here: hf:./{wanted.model}" if Path(wanted.model).is_dir() else ""
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no model {wanted.model}, or it is private and this machine is not logged in "
            f"(hf auth login, or HF_TOKEN); check the name{here}"
        )
    why = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else one_line(error)
    at = f" at {wanted.revision}" if wanted.revision else ""
    return (
        f"the Hugging Face hub does not give it ({why}), and its cache on this machine holds no whole "
        f"{wanted.model}{at}; run again with the hub in reach, or give a local folder as hf:/path/to/folder{here}"
    )


def _nearest_revisions(wanted: HubName) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(wanted.model)
    except Exception:  # only a hint
        return ""
    there = [ref.name for ref in (*refs.branches, *refs.tags)]
    close = difflib.get_close_matches(wanted.revision or "", there, n=3, cutoff=0.5) or there[:3]
    return f"; it has {len(there)}, such as {', '.join(close)}" if there else ""
