"""`hf:<org>/<name>`, `hf:<org>/<name>@<revision>` and `hf:/path/to/folder`: any Hugging Face causal language model that
transformers loads."""

from collections.abc import Callable
from pathlib import Path

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.hub import find_small_files, find_weights
from saescale.trainers.subjects.subject import Outline, Subject

READS_TEXT = True


def load(
    rest: str,
    cache: Path,
    dtype: str,
    notify: Callable[[str], None],
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> Subject:
    """The model `rest`, from the hub (its own cache) or a folder, over several devices with `device_map` (spread.py).
    Raises SaescaleError where it cannot be had."""
    _check_name(rest)
    found = find_weights(find_small_files(rest), notify)
    # transformers takes seconds to import, and a mistyped name should not.
    from saescale.trainers.subjects.language_model import load_model

    return load_model(
        found.name, found.folder, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map, notify=notify
    )


def outline(rest: str, cache: Path, notify: Callable[[str], None], trust_remote_code: bool = False) -> Outline:
    """What the configuration says, without the weights. Raises SaescaleError like `load`."""
    _check_name(rest)
    found = find_small_files(rest).checkpoint
    from saescale.trainers.subjects.language_model import read_outline

    return read_outline(found.name, found.folder, trust_remote_code)


def _check_name(rest: str) -> None:
    if not rest:
        raise SaescaleError("the subject hf needs the name of a model: hf:<org>/<name> or hf:/path/to/folder")
