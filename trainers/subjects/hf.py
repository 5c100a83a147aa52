"""`hf:<org>/<name>` and `hf:/path/to/folder`: any Hugging Face causal language model that transformers loads."""

from collections.abc import Callable
from pathlib import Path

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject

READS_TEXT = True


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Subject:
    """The model `rest`, from the hub (its own cache) or a folder. Raises SaescaleError where it cannot be had."""
    if not rest:
        raise SaescaleError("the subject hf needs the name of a model: hf:<org>/<name> or hf:/path/to/folder")
    # transformers takes seconds to import, and a mistyped name should not.
    from saescale.trainers.subjects.language_model import load_model

    return load_model(f"hf:{rest}", rest, dtype=dtype)
