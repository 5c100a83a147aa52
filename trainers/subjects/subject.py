"""The door of subjects: the frozen models whose residual stream is decomposed.

A subject is a file of this folder that defines `load` at its top level: see README.md. Its name is the file's, with `-`
for `_`; what follows a colon is for the file to read (`hf:openai-community/gpt2`).
"""

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


class Sequence(NamedTuple):
    """One context as the subject reads it: `ids` int32 [length], and which positions are rows of a store."""

    ids: np.ndarray
    keep: np.ndarray  # bool [length]


class Run(NamedTuple):
    """What a forward pass gave: `resid` [batch, length, d_model] at each site that was asked for, in that order;
    `logits` [batch, length, vocabulary] where they were asked for."""

    resid: tuple[Tensor, ...]
    logits: Tensor | None


Patch = Callable[[Tensor], Tensor]  # resid at a site, [batch, length, d_model] -> what takes its place


class Subject(Protocol):
    """A frozen model. `fingerprint` identifies its weights whatever the arithmetic, `dtype` is that of its forward
    pass. `labels` are the ground truths that `label` recomputes from ids; a subject without any has none."""

    name: str
    fingerprint: str
    d_model: int
    n_layers: int
    dtype: torch.dtype
    labels: tuple[str, ...]

    def check_site(self, layer: int, length: int) -> None:
        """Raises SaescaleError unless it has block `layer` and takes contexts of `length` positions."""

    def run(
        self, ids: Tensor, sites: Iterable[Site], patch: Mapping[Site, Patch] | None = None, logits: bool = False
    ) -> Run:
        """One forward pass over `ids` [batch, length]. It ends at the last site unless `logits` are asked for."""

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Every label of `labels` for `ids` [batch, length]: {name: [batch, length, ...]}."""


@runtime_checkable
class ReadsText(Protocol):
    """A subject whose sequences are cut from a corpus (language models)."""

    bos_token_id: int | None
    eos_token_id: int | None

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens], without special tokens."""


@runtime_checkable
class Generates(Protocol):
    """A subject that makes its own sequences (games, mazes)."""

    def sequences(self, split: Split, seed: int) -> Iterator[Sequence]:
        """Without end, a pure function of (split, seed); no sequence of one split is one of the other."""
