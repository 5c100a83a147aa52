"""The door of subjects: the frozen models whose residual stream is decomposed.

A subject is a file of this folder, or of a room in it, that defines `load` at its top level: see README.md. Its name is
the file's, with `-` for `_`; what follows a colon is for the file to read (`hf:openai-community/gpt2`).
"""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saescale.storage.cache import cache_folder
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site, Split
from saescale.storage.registry import Room
from saescale.storage.secrets import secret_in_url

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


class Outline(NamedTuple):
    """What can be told of a language model before its weights are read; `max_positions` None: no limit known."""

    name: str
    n_layers: int
    max_positions: int | None

    def check_site(self, layer: int, length: int) -> None:
        """Raises SaescaleError unless it has block `layer` and takes contexts of `length` tokens."""
        if not 0 <= layer < self.n_layers:
            raise SaescaleError(
                f"{self.name} has no layer {layer}: its {self.n_layers} layers are 0 to {self.n_layers - 1}"
            )
        if self.max_positions is not None and length > self.max_positions:
            raise SaescaleError(
                f"{self.name} takes contexts of at most {self.max_positions} tokens, not {length}: "
                "use a smaller --context-length"
            )


class Subject(Protocol):
    """A frozen model. `fingerprint` identifies its weights whatever the arithmetic, `dtype` is that of its forward
    pass. `labels` are the ground truths that `label` recomputes from ids; a subject without any has none.

    It is one of two kinds besides: it `ReadsText`, or it `Generates`. It may be one that `Resumes`, or is `Composed`.
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
class Resumes(Protocol):
    """A subject that can go on from a residual stream without what comes before it."""

    def resume(self, ids: Tensor, site: Site, resid: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of `run` on `ids` with `resid` [batch, length, d_model] at the site."""


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


NO_TARGET = -100
NO_BRANCH = -1


class Lesson(NamedTuple):
    """What a subject learns from at a step: `ids` and `targets` int64 [batch, length], where NO_TARGET does not count;
    `next` is the number of the sequence with which the next lesson begins. Where one beginning has several
    continuations, `branch` int64 [batch, length] numbers them: 0 is what all of them see, and the tokens of a branch
    see no other one, as if each stood alone behind the beginning. NO_BRANCH is what fills up."""

    ids: Tensor
    targets: Tensor
    next: int
    branch: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """What a model of transformers takes: ids and, where they branch, positions as of each branch alone and what
        each token sees, float32 [batch, 1, length, length], 0 or -inf."""
        if self.branch is None:
            return {"input_ids": self.ids}
        shared = self.branch == 0
        begun = self.branch[:, :, None] == self.branch[:, None, :]
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        first = begun.byte().argmax(dim=2)  # where the branch of each token begins
        positions = torch.where(shared, places, places - first + shared.sum(dim=1, keepdim=True))
        positions = positions.masked_fill(self.branch == NO_BRANCH, 0)
        hidden = ~(begun | shared[:, None, :]) | (places[:, None] < places)
        weights = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
        return {"input_ids": self.ids, "position_ids": positions, "attention_mask": weights[:, None]}


@runtime_checkable
class Learns(Protocol):
    """A subject that `saescale subject train` trains: its file defines `Settings`, a pydantic model of what can be
    chosen, and `blank(settings, seed)`, which gives such a subject with random weights."""

    model: Any  # of transformers: ids in, logits out

    def lessons(self, seed: int, batch: int, first: int) -> Iterator[Lesson]:
        """Training sequences from number `first` on, without end, a pure function of the arguments."""

    def score(self, sequences: int, seed: int = 0) -> dict[str, float]:
        """How well it does what it is trained for, on so many held-out sequences."""


@runtime_checkable
class Composed(Protocol):
    """A subject whose activations are sums of known features, which its label `features` says: the magnitude of each,
    0 where it is not active, float32 [batch, length, features]."""

    directions: Tensor  # float32 [features, d_model], unit rows


class SubjectFile(Protocol):
    """What the file of a subject defines at its top level; `load` may take `trust_remote_code` and `device_map`
    besides, and a file may define `outline(rest, cache, notify)`, which gives an `Outline` without the weights.
    `NAMES_A_PATH = True` says that what follows the colon is a path or URL in any case."""

    def load(self, rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Subject:
        """The subject. `rest` is what follows the colon in its name ("" without one), `cache` a folder for downloads,
        `dtype` the arithmetic of the forward pass ("auto": its device's, "float32", "bfloat16"); `notify` is told
        in words what takes long. Raises SaescaleError where it cannot be had."""


def subject_names() -> tuple[str, ...]:
    """What can stand before a colon, or alone."""
    return tuple(name.replace("_", "-") for name in SUBJECTS.names())


def check_subject_name(name: str) -> None:
    """Raises SaescaleError with the nearest valid name when `name` names no subject, and where the address in it has a
    secret. Loads nothing."""
    names = subject_names()
    file, colon, rest = name.partition(":")
    if "://" in rest and (found := secret_in_url(rest)):
        raise SaescaleError(
            f"the subject {name}: {found}, and every store of it would say it; give an address without, or a file here"
        )
    if file in names and bool(colon) == bool(rest) and not rest.startswith("//"):
        return
    close = difflib.get_close_matches(file, names, n=1, cutoff=0.4)
    meant = _meant_of_hub(name) or (close[0] if close and close[0] != file else None)
    hint = f"did you mean {meant!r}? " if meant else ""
    raise SaescaleError(
        f"unknown subject {name!r}: {hint}there are {', '.join(names)}; any Hugging Face causal language model is "
        "hf:<org>/<name>, hf:<org>/<name>@<revision> or hf:/path/to/folder"
    )


def _meant_of_hub(name: str) -> str | None:
    """The subject that a name or address of the hub, or a folder, means without its `hf:`."""
    for before in ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf://", "huggingface:", "HF:"):
        if name.startswith(before) and name != before:
            return f"hf:{name.removeprefix(before)}"
    if name.startswith(("/", ".", "~")):
        return f"hf:{name}"
    if ":" in name or name.count("/") > 1:
        return None
    return f"hf:{name}" if "/" in name.strip("/") else None


def at_revision(name: str, revision: str | None) -> str:
    """The name of a model on the Hugging Face hub with its branch, tag or commit, `hf:<org>/<name>@<revision>`.

    Raises SaescaleError for a subject that has none.
    """
    if not revision:
        return name
    if not name.startswith("hf:"):
        raise SaescaleError(f"{name} has no revisions; only a model on the Hugging Face hub has: hf:<org>/<name>")
    if "@" in name and not name.endswith(f"@{revision}"):
        raise SaescaleError(f"{name} names its revision already, so --revision {revision} does not apply; leave it out")
    return name if "@" in name else f"{name}@{revision}"


def get_subject(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    notify: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> Subject:
    """Loads a subject by its name; see SubjectFile for the rest (`cache`: `cache_folder()` unless given).

    With `trust_remote_code` Python code that comes with a model is run; with `device_map` ("auto", or the most bytes on
    each device: spread.py) its layers may lie on several devices. Raises SaescaleError for an unknown name and
    when the model cannot be had or is not usable.
    """
    found, rest, more = _find(name, trust_remote_code, device_map)
    return found.load(rest, Path(cache) if cache else cache_folder(), dtype, notify or _tell_nobody, **more)


def check_sites_before_loading(
    name: str,
    layers: Iterable[int],
    length: int,
    cache: str | os.PathLike[str] | None = None,
    notify: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """What `check_site` of the subject raises for any of the layers, as far as that shows without its weights; else
    what `get_subject` raises."""
    if (outline := _outline(name, cache, notify, trust_remote_code)) is not None:
        for layer in layers:
            outline.check_site(layer, length)


def count_layers(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    notify: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> int:
    """How many layers the subject has, without its weights where that shows. Raises what `get_subject` raises."""
    outline = _outline(name, cache, notify, trust_remote_code)
    known = outline or get_subject(name, cache, notify=notify, trust_remote_code=trust_remote_code)
    return known.n_layers


def _outline(
    name: str, cache: str | os.PathLike[str] | None, notify: Callable[[str], None] | None, trust_remote_code: bool
) -> Outline | None:
    found, rest, more = _find(name, trust_remote_code)
    if not hasattr(found, "outline"):
        return None
    outline: Outline = found.outline(rest, Path(cache) if cache else cache_folder(), notify or _tell_nobody, **more)
    return outline


def _find(name: str, trust_remote_code: bool, device_map: str | None = None) -> tuple[Any, str, dict[str, Any]]:
    check_subject_name(name)
    file, _, rest = name.partition(":")
    found = SUBJECTS.load(file)
    if trust_remote_code and "trust_remote_code" not in inspect.signature(found.load).parameters:
        raise SaescaleError(
            f"{name} comes with no code of a model that could be trusted; leave --trust-remote-code out"
        )
    if device_map is not None and "device_map" not in inspect.signature(found.load).parameters:
        raise SaescaleError(f"{name} lies on one device; leave device_map out, which is of large models (hf:...)")
    more = {"trust_remote_code": True} if trust_remote_code else {}
    return found, rest, more | ({} if device_map is None else {"device_map": device_map})


def _tell_nobody(stage: str) -> None:
    pass


def name_for_other_processes(name: str) -> str:
    """The name with a relative path behind its colon made absolute, so that it means the same in every process."""
    file, _, rest = name.partition(":")
    local = rest.startswith((".", "~")) or (bool(rest) and "://" not in rest and SUBJECTS.defines(file, "NAMES_A_PATH"))
    return f"{file}:{Path(rest).expanduser().absolute()}" if local else name


def surely_reads_text(name: str) -> bool:
    """Whether the subject's file says so (`READS_TEXT = True`) before anything is loaded; False where it is silent."""
    return bool(getattr(SUBJECTS.load(name.partition(":")[0]), "READS_TEXT", False))
