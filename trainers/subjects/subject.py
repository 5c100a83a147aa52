"""The door of subjects: the frozen models whose residual stream is decomposed.

A subject is a file of this folder that defines `load` at its top level: see README.md. Its name is the file's, with `-`
for `_`; what follows a colon is for the file to read (`hf:openai-community/gpt2`).
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saescale.storage.cache import cache_folder
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site, Split
from saescale.storage.registry import Room

SUBJECTS = Room("saescale.trainers.subjects", "subject", marker="load")


class Sequence(NamedTuple):
    """One context as the subject reads it: `ids` int32 [length], none negative, and which positions are rows of a
    store."""

    ids: np.ndarray
    keep: np.ndarray  # bool [length]


class Run(NamedTuple):
    """What a forward pass gave: `resid` [batch, length, d_model] at each site that was asked for, in that order
    (patched where the site is); `logits` [batch, length, vocabulary] where they were asked for."""

    resid: tuple[Tensor, ...]
    logits: Tensor | None


Patch = Callable[[Tensor], Tensor]  # resid at a site, [batch, length, d_model] -> what takes its place


class Subject(Protocol):
    """A frozen model. `fingerprint` identifies its weights whatever the arithmetic, `dtype` is that of its forward
    pass. `labels` are the ground truths that `label` recomputes from ids; a subject without any has none.

    It is one of two kinds besides: it `ReadsText`, or it `Generates`.
    """

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
        """Without end, a pure function of (split, seed); no sequence of one split is one of the other, whatever the
        seeds (a hash of the sequence may decide where it belongs)."""


class SubjectFile(Protocol):
    """What the file of a subject defines at its top level."""

    def load(self, rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Subject:
        """The subject. `rest` is what follows the colon in its name ("" without one), `cache` a folder for downloads,
        `dtype` the arithmetic of the forward pass ("auto": its device's, "float32", "bfloat16"); `notify` is told
        in words what takes long. Raises SaescaleError where it cannot be had."""


def subject_names() -> tuple[str, ...]:
    """What can stand before a colon, or alone."""
    return tuple(name.replace("_", "-") for name in SUBJECTS.names())


def check_subject_name(name: str) -> None:
    """Raises SaescaleError with the nearest valid name when `name` names no subject. Loads nothing."""
    names = subject_names()
    file, colon, rest = name.partition(":")
    if file in names and bool(colon) == bool(rest):
        return
    close = difflib.get_close_matches(file, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close and close[0] != file else ""
    raise SaescaleError(
        f"unknown subject {name!r}: {hint}there are {', '.join(names)}; any Hugging Face causal language model is "
        "hf:<org>/<name> or hf:/path/to/folder"
    )


def get_subject(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    notify: Callable[[str], None] | None = None,
) -> Subject:
    """Loads a subject by its name; see SubjectFile for the rest (`cache`: `cache_folder()` unless given).

    Raises SaescaleError for an unknown name and when the model cannot be had or is not usable.
    """
    check_subject_name(name)
    file, _, rest = name.partition(":")
    found: SubjectFile = SUBJECTS.load(file)
    return found.load(rest, Path(cache) if cache else cache_folder(), dtype, notify or (lambda stage: None))


def name_for_other_processes(name: str) -> str:
    """The name with a relative path behind its colon made absolute, so that it means the same in every process."""
    file, _, rest = name.partition(":")
    if not rest.startswith((".", "~")):
        return name
    return f"{file}:{Path(rest).expanduser().absolute()}"


def surely_reads_text(name: str) -> bool:
    """Whether the subject's file says so (`READS_TEXT = True`) before anything is loaded; False where it is silent."""
    return bool(getattr(SUBJECTS.load(name.partition(":")[0]), "READS_TEXT", False))
