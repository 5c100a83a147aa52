"""What a harvest is asked for, and the note of it in the store's folder by which an interrupted one goes on."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError
from saescale.storage.secrets import hide_secrets
from saescale.trainers.subjects.spread import most_memory
from saescale.trainers.subjects.subject import check_subject_name
from saescale.trainers.subjects.texts.text import PYTHON_PROSE, TEXT_COLUMN

PLAN = "harvest.json"
# Fields that say nothing to a subject that makes its own sequences.
OF_TEXT = ("corpus", "context_length", "text_column", "cut_documents", "heldout_from")
# What a note that lacks them meant.
_WITHOUT: dict[str, Any] = {"text_column": TEXT_COLUMN, "cut_documents": None, "heldout_from": None}
OWN_SEQUENCES = "sequences of the subject's own"  # what a manifest calls their corpus


class HarvestSpec(BaseModel):
    """What to harvest and where to. Every field but `out` decides the bytes of the store.

    `tokens` and `heldout_tokens` are rows of the two splits; `layer` counts from 0 (resid_post of layer L is the output
    of block L); `batch_contexts` contexts go through the subject at a time; `compute_dtype` is the arithmetic of the
    forward pass ("auto": its device's). The rest is of subjects that read text and is not given for others: `corpus`,
    its `text_column`, `cut_documents` (subjects/texts/text.py), `heldout_from`, and `context_length`, of which the
    rows of splits and shards are multiples; those that are not given come down to one. `heldout_from`: the held-out
    rows are drawn from about so many of the first tokens (None: from all that are asked for), which a live source needs
    (live_spec.py). Raises SaescaleError on values that make no harvest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    subject: str = "smollm2-135m"
    layer: int = 22
    corpus: str = PYTHON_PROSE
    text_column: str = TEXT_COLUMN
    cut_documents: int | None = None
    out: str
    tokens: int = 262_144
    heldout_tokens: int = 32_768
    heldout_from: int | None = None
    context_length: int = 64
    dtype: Literal["float16", "bfloat16"] = "float16"
    seed: int = 0
    shard_rows: int = 32_768
    row_group_rows: int = 8_192
    batch_contexts: int = 16
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trust_remote_code: bool = Field(False, exclude=True)  # decides whether the subject is loaded, and no byte
    device_map: str | None = Field(None, exclude=True)  # decides where its layers lie (trainers/subjects/spread.py)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_subject_name(self.subject)
        if self.device_map is not None:
            most_memory(self.device_map)
        for name in ("out", "corpus", "text_column"):
            if not getattr(self, name).strip():
                raise SaescaleError(f"harvest: {_option(name)} is empty")
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise SaescaleError(f"harvest: {_option(name)} must be {bound}, not {value}")
        for name in _OF_CONTEXTS:
            if name not in self.model_fields_set:
                value, length = getattr(self, name), self.context_length
                self.__dict__[name] = max(value // length, 1) * length
        if "context_length" in self.model_fields_set:
            self.check_contexts()
        return self

    def check_contexts(self) -> None:
        """Raises SaescaleError unless splits and shards are whole contexts of a text."""
        for name in _OF_CONTEXTS:
            value, length = getattr(self, name), self.context_length
            if value % length:
                below = value // length * length
                nearest = f"{below} and {below + length}" if below else f"{length} and {2 * length}"
                raise SaescaleError(
                    f"harvest: {_option(name)} must be a multiple of --context-length {length}, not {value}; "
                    f"the nearest are {nearest}"
                )

    @property
    def rows(self) -> int:
        """Of both splits."""
        return self.tokens + self.heldout_tokens

    def refuse_text(self) -> None:
        """Raises SaescaleError where something was given that only subjects that read text can be told."""
        if given := [name for name in OF_TEXT if name in self.model_fields_set]:
            raise SaescaleError(
                f"harvest: {_option(given[0])} does not apply to {self.subject}, which makes its own sequences; leave "
                "it out"
            )

    def identity(self, reads_text: bool) -> dict[str, Any]:
        """The fields that decide the bytes of the store, for comparing two harvests; no secret is among them."""
        fields = self.model_dump(mode="json", exclude={"out", *(() if reads_text else OF_TEXT)})
        return {name: hide_secrets(value) if isinstance(value, str) else value for name, value in fields.items()}


_OF_CONTEXTS = ("tokens", "heldout_tokens", "shard_rows")
_MOST = 2**63 - 1
_LIMITS = {
    **dict.fromkeys((*_OF_CONTEXTS, "row_group_rows", "batch_contexts", "cut_documents", "heldout_from"), (1, _MOST)),
    "context_length": (1, int(np.iinfo(np.int16).max)),
    "layer": (0, _MOST),
    "seed": (0, 2**64 - 1),
}


def _option(name: str) -> str:
    """What the command line calls a field."""
    return "--" + name.replace("_", "-")


# --- its note in the store's folder


def read_plan(spec: HarvestSpec) -> dict[str, Any] | None:
    """The plan of the harvest that `spec.out` holds, None for an empty folder.

    Raises SaescaleError when the folder holds another harvest, other files, or a plan that cannot be read.
    """
    try:
        found = _load(spec.out)
    except FileNotFoundError:
        others = [name for name in files.list_names(spec.out) if not name.startswith(".")]
        if PLAN in others:  # another driver was faster
            return read_plan(spec)
        if others:
            raise SaescaleError(
                f"{spec.out} holds other files ({others[0]}) and no {PLAN}; harvest into an empty folder"
            ) from None
        return None
    refuse_difference(spec.out, found, spec.identity(reads_text="corpus" in found))
    return found


def note_plan(url: str, plan: dict[str, Any]) -> None:
    """Writes `plan` into the folder `url` unless it is there; SaescaleError when another one is."""
    try:
        refuse_difference(url, _load(url), plan)
    except FileNotFoundError:
        files.write_atomic(files.join(url, PLAN), (json.dumps(plan, indent=1) + "\n").encode())


def refuse_difference(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """SaescaleError that names what differs between the harvest that `url` holds and the wanted one."""
    there = {key: found.get(key, _WITHOUT.get(key)) for key in wanted}
    differing = [
        f"{key} is {there[key]!r} there, {value!r} here" for key, value in wanted.items() if there[key] != value
    ]
    if differing:
        raise SaescaleError(
            f"{url} holds another harvest: {'; '.join(differing)}. Harvest into another folder, or remove this one"
        )


def _load(url: str) -> dict[str, Any]:
    where = files.join(url, PLAN)
    return read_json(where, f"remove {url} or harvest elsewhere")
