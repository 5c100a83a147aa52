"""The registry of subjects: the frozen models whose residual stream is decomposed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from saescale.storage.cache import cache_folder
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.trainers.subjects.language_model import Subject

HUGGINGFACE_PREFIX = "hf:"
NAMES = ("smollm2-135m",)


def check_subject_name(name: str) -> None:
    """Raises SaescaleError with the nearest valid name when `name` names no subject. Loads nothing."""
    if name in NAMES or (name.startswith(HUGGINGFACE_PREFIX) and len(name) > len(HUGGINGFACE_PREFIX)):
        return
    close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    known = ", ".join(NAMES)
    raise SaescaleError(
        f"unknown subject {name!r}: {hint}known are {known}, hf:<org>/<name> (any Hugging Face causal "
        "language model) and hf:/path/to/folder"
    )


def get_subject(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    notify: Callable[[str], None] | None = None,
) -> Subject:
    """Loads a subject by its name.

    `cache` is the folder for downloads (default: `cache_folder()`); `dtype` the arithmetic of the forward
    pass ("auto", "float32", "bfloat16", see `huggingface.compute_dtype`); `notify` is told in words what
    takes long. Raises SaescaleError for an unknown name and when the model cannot be had or is not usable.
    """
    check_subject_name(name)
    # transformers takes seconds to import, and a mistyped name should not.
    if name.startswith(HUGGINGFACE_PREFIX):
        from saescale.trainers.subjects.language_model import load

        return load(name, name.removeprefix(HUGGINGFACE_PREFIX), dtype=dtype)
    from saescale.trainers.subjects.smollm2 import load_smollm2

    return load_smollm2(Path(cache) if cache else cache_folder(), dtype, notify or (lambda stage: None))
