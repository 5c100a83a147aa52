"""What a live source is asked for: the section `live` of a sweep file's `store`."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import xxhash
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.secrets import ADVICE, secret_in_url

if TYPE_CHECKING:
    from saescale.trainers.harvest.spec import HarvestSpec

_UNITS = {"": 1, "b": 1} | {
    f"{p}{b}": base**e for e, p in enumerate("kmgtp", 1) for b, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*((?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*([a-z]*)\s*", re.IGNORECASE)
_OF_TEXT = ("corpus", "text_column", "cut_documents", "context_length", "batch_contexts", "compute_dtype")
_NOT_OF_A_SERVER = (*_OF_TEXT, "actors", "device_map")
_AS_IT_IS = {"actors": 1}  # a server's files are one process's to take; a sweep.yaml of before `auto` says so
_NOT_OF_A_HARVEST = {
    "max_bytes", "block_rows", "window_blocks", "actors", "folder", "hidden_states", "hidden_states_index",
    "remove_hidden_states",
}  # fmt: skip
_NOT_OF_ITS_ROWS = {"max_bytes", "actors", "folder", "remove_hidden_states", "device_map"}
HELDOUT_EVERY = 8  # the held-out rows are drawn from so many times as many tokens


def _as_keys(told: str) -> str:
    """What a harvest says of its options, with the keys of this section in their place."""
    keys = {"shard-rows": "block_rows"}
    named = re.sub(r"--([a-z][a-z-]*)", lambda found: keys.get(found[1], found[1].replace("-", "_")), told)
    return named.removeprefix("harvest: ")


def _whole(given: Any) -> Any:
    """A count as people write large ones: YAML takes 4.0e10 for text."""
    if isinstance(given, str | float) and not isinstance(given, bool):
        try:
            number = Decimal(str(given).strip())
        except InvalidOperation:
            return given
        return int(number) if number.is_finite() and number == int(number) else given
    return given


def _bytes(given: Any) -> Any:
    """200 GB, 1.5 TiB, or a number of bytes."""
    if isinstance(given, str) and (match := _SIZE.fullmatch(given)) and match[2].lower() in _UNITS:
        return int(Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()])
    if isinstance(given, str):
        raise ValueError("should be a size such as 200 GB or 1.5 TiB")
    return _whole(given)


Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=2**62, strict=True)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0, le=2**62, strict=True)]


class LiveSpec(BaseModel):
    """A harvest (spec.py) of which never more than `max_bytes` lie in `folder`, temporary files included.

    `tokens` are the train rows of one pass. A block has `block_rows` of them and is what `shard_rows` is to a harvest;
    the rows of `window_blocks` blocks are mixed. `folder`: beside the run where it is not named; it may be a store that
    `saescale harvest` has finished with the same fields, from which the same batches come. `actors` harvest, on a
    cluster ("auto": as many as it has GPUs for them, or nodes). Raises ValidationError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    subject: str
    layer: Annotated[int, Field(ge=0, strict=True)]
    tokens: Count
    max_bytes: Bytes
    corpus: str | None = None
    hidden_states: str | None = None  # a folder of files of an inference server (served.py), in place of the corpus
    hidden_states_index: Annotated[int, Field(ge=0, strict=True)] = 0  # of its layers
    remove_hidden_states: Annotated[bool, Field(strict=True)] = False  # files to which no cell goes back
    text_column: str | None = None
    cut_documents: Count | None = None
    heldout_tokens: Count = 32_768
    context_length: Count | None = None
    dtype: Literal["float16", "bfloat16"] = "float16"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device_map: str | None = None
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    batch_contexts: Count | None = None
    block_rows: Count = 32_768
    row_group_rows: Count | None = None
    window_blocks: Count = 4
    actors: Count | Literal["auto"] = "auto"
    folder: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_site(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("layer"), list):
            raise ValueError("layer: a live source has one site; name a live source for each layer (store: [...])")
        return fields

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.hidden_states is not None:
            fields = type(self).model_fields  # what sweep.yaml says has all of them
            nothing = {name: (fields[name].default, _AS_IT_IS.get(name)) for name in _NOT_OF_A_SERVER}
            if given := [name for name in nothing if getattr(self, name) not in nothing[name]]:
                raise ValueError(f"{given[0]} says nothing to hidden states that a server makes: leave it out")
        elif given := [name for name in ("hidden_states_index", "remove_hidden_states") if getattr(self, name)]:
            raise ValueError(f"{given[0]} is of hidden_states, the folder to which a server writes: name that")
        for name in ("folder", "corpus", "hidden_states"):
            if (value := getattr(self, name)) and (found := secret_in_url(value)):
                raise ValueError(f"{name}: {found}; {ADVICE}")
        try:
            self.harvest("unknown", reads_text=True)
        except SaescaleError as error:
            raise ValueError(_as_keys(str(error))) from error
        return self

    def harvest(self, out: str, reads_text: bool) -> "HarvestSpec":
        """The same as a harvest into the store `out`."""
        # Only here: sweep files are read without torch.
        from saescale.trainers.harvest.spec import HarvestSpec

        fields = self.model_dump(exclude=_NOT_OF_A_HARVEST, exclude_none=True)
        fields |= {"shard_rows": self.block_rows}
        if self.hidden_states is not None:
            fields |= {"corpus": self.hidden_states, "context_length": 1}
        if reads_text:
            fields |= {"heldout_from": HELDOUT_EVERY * self.heldout_tokens}
        return HarvestSpec.model_validate(fields | {"out": out})

    def folder_of(self, run: str) -> str:
        """Where its blocks lie, for the run directory `run`."""
        if self.folder is not None:
            return self.folder
        what = json.dumps(self.model_dump(mode="json", exclude=_NOT_OF_ITS_ROWS), sort_keys=True)
        return files.join(run, "live", xxhash.xxh3_64_hexdigest(what.encode()))
