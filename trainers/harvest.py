"""From a subject and text to an activation store; what was written survives any interruption.

The store is a pure function of the spec, the corpus and the subject: a shard holds fixed contexts, and its rows
are permuted by a seed of its own. So a harvest that died goes on with the first shard that is missing.
"""

import importlib.metadata
import json
import platform
import struct
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, model_validator

from storage import files
from storage.activations import (
    FORMAT,
    MANIFEST,
    ActivationStore,
    Manifest,
    Rows,
    Shard,
    Site,
    find_bad_row,
    raw_dtype,
    to_float32,
    write_manifest,
    write_shard,
)
from storage.errors import SaescaleError
from trainers.subjects import check_subject_name, get_subject
from trainers.subjects.huggingface import Subject
from trainers.text import PYTHON_PROSE, documents

PLAN = "harvest.json"
SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
_TOKENIZED_TOGETHER = 64

Progress = Callable[[int, int, float, str], None]  # rows done, rows in all, tokens/s, what is being done


class HarvestSpec(BaseModel):
    """What to harvest and where to. Every field but `out` decides the bytes of the store.

    `tokens` and `heldout_tokens` are rows of the two splits, multiples of `context_length`; `layer` counts from
    0 (resid_post of layer L is the output of block L); `batch_contexts` contexts go through the subject at a time;
    `compute_dtype` is the arithmetic of the forward pass ("auto": bfloat16 where that is fast). Raises
    SaescaleError on values that make no harvest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    subject: str = "smollm2-135m"
    layer: int = 22
    corpus: str = PYTHON_PROSE
    out: str
    tokens: int = 262_144
    heldout_tokens: int = 32_768
    context_length: int = 64
    dtype: Literal["float16", "bfloat16"] = "float16"
    seed: int = 0
    shard_rows: int = 32_768
    row_group_rows: int = 8_192
    batch_contexts: int = 16
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_subject_name(self.subject)
        sizes = ("tokens", "heldout_tokens", "context_length", "shard_rows", "row_group_rows", "batch_contexts")
        for name in sizes:
            if getattr(self, name) < 1:
                raise SaescaleError(f"harvest: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("layer", "seed"):
            if getattr(self, name) < 0:
                raise SaescaleError(f"harvest: {name} must be at least 0, not {getattr(self, name)}")
        most = np.iinfo(np.int16).max
        if self.context_length > most:
            raise SaescaleError(f"harvest: context_length must be at most {most}, not {self.context_length}")
        for name in ("tokens", "heldout_tokens", "shard_rows"):
            value, length = getattr(self, name), self.context_length
            if value % length:
                below = value // length * length
                raise SaescaleError(
                    f"harvest: {name} must be a multiple of context_length {length}, not {value}; "
                    f"the nearest are {below or length} and {below + length}"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that decide the bytes of the store, for comparing two harvests."""
        return self.model_dump(mode="json", exclude={"out"})


def harvest(spec: HarvestSpec, progress: Progress | None = None, cache: str | None = None) -> Manifest:
    """Harvests into the store `spec.out`, or finishes a harvest of the same spec, and returns its manifest.

    A finished one is returned at once, without loading the subject. `progress(done_rows, total_rows, tokens_per_s,
    stage)` is called at every batch; the rate counts what this call computed. Memory: one shard and all token ids.
    Raises SaescaleError when the corpus is too short, when `spec.out` holds another harvest or other files, when
    an activation exceeds float16, and for what subjects, corpora and writing raise.
    """
    meter = _Meter(spec, progress)
    found = _read_plan(spec)
    if files.exists(files.join(spec.out, MANIFEST)):
        store = ActivationStore.open(spec.out)
        store.verify(full=False)
        return store.manifest

    meter.say(f"loading {spec.subject}")
    # What `auto` came to when the harvest began: it is measured, and might come to something else now.
    begun = found.get("computed_in", "auto") if found is not None and spec.compute_dtype == "auto" else None
    subject = get_subject(spec.subject, cache=cache, dtype=begun or spec.compute_dtype, notify=meter.say)
    prefix = _prefix(subject)
    subject.check_site(spec.layer, len(prefix) + spec.context_length)
    meter.say(f"tokenizing {spec.corpus}")
    contexts = _collect(spec, subject)
    computed_in = str(subject.dtype).removeprefix("torch.")
    plan = {
        "format": 1,
        **spec.identity(),
        "fingerprint": subject.fingerprint,
        "computed_in": computed_in,
        "tokens_xxh3": _hash(contexts),
    }
    if found is not None:
        _refuse_difference(spec.out, found, plan)

    shards: list[Shard] = []
    total, total_square = np.zeros(subject.d_model), 0.0
    for split in SPLITS:
        for index, part in enumerate(_shards(spec, contexts[split])):
            name = f"{split}-{index:05d}.parquet"
            order = np.random.default_rng([spec.seed, SPLITS.index(split), index]).permutation(part.ids.size)
            token, pos, doc = _columns(part, order, first_pos=len(prefix))
            kept = _read_kept(spec, name, split, token, pos, doc, subject.d_model)
            if kept is not None:
                shard, act = kept
                meter.skip(len(act), f"keeping {name}")
            else:
                act = _activations(spec, subject, prefix, part.ids, meter, name)[order]
                if found is None:  # only now, so that what fails in the first shard leaves an empty folder
                    files.write_atomic(files.join(spec.out, PLAN), (json.dumps(plan, indent=1) + "\n").encode())
                    found = plan
                rows = Rows(act, token, pos, doc)
                shard = write_shard(spec.out, name, split, rows, spec.dtype, spec.row_group_rows)
            shards.append(shard)
            if split == "train":
                shard_sum, shard_square = _moments(act, spec.dtype)
                total += shard_sum
                total_square += shard_square
    manifest = Manifest(
        format=FORMAT,
        subject=spec.subject,
        fingerprint=subject.fingerprint,
        site=Site(layer=spec.layer, positions="all but BOS" if prefix else "all"),
        d_model=subject.d_model,
        dtype=spec.dtype,
        context_length=spec.context_length,
        dropped=[] if not prefix else ["bos"] if subject.bos_token_id is not None else ["eos"],
        corpus=spec.corpus,
        seed=spec.seed,
        row_group_rows=spec.row_group_rows,
        shards=shards,
        mean=(total / spec.tokens).tolist(),
        mean_square=total_square / spec.tokens,
        created_with=_created_with(computed_in),
    )
    write_manifest(spec.out, manifest)
    meter.say("done")
    return manifest


# --- the plan


def _read_plan(spec: HarvestSpec) -> dict[str, Any] | None:
    """The plan of the harvest that `spec.out` holds, None for an empty folder; another harvest is refused."""
    where = files.join(spec.out, PLAN)
    try:
        found = json.loads(files.read_bytes(where))
    except FileNotFoundError:
        others = [name for name in files.list_names(spec.out) if not name.startswith(".")]
        if others:
            raise SaescaleError(
                f"{spec.out} holds other files ({others[0]}) and no {PLAN}; harvest into an empty folder"
            ) from None
        return None
    except ValueError as error:
        raise SaescaleError(f"{where} is damaged ({error}); remove {spec.out} or harvest elsewhere") from error
    _refuse_difference(spec.out, found, spec.identity())
    return dict(found)


def _refuse_difference(url: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{key} is {found.get(key)!r} there, {value!r} here" for key, value in wanted.items() if found.get(key) != value
    ]
    if differing:
        raise SaescaleError(
            f"{url} holds another harvest: {'; '.join(differing)}. Harvest into another folder, or remove this one"
        )


# --- the contexts


class _Contexts(NamedTuple):
    """Token ids and the document of each, both int32 [contexts, context_length]."""

    ids: np.ndarray
    doc: np.ndarray


def _collect(spec: HarvestSpec, subject: Subject) -> dict[str, _Contexts]:
    """Tokenizes documents until both splits are full. A document gives its tokens to one split only.

    A seeded hash of its number sends it to heldout with that split's share of the tokens; when its split is full
    it goes to the other one, so a corpus suffices whenever it has the tokens at all.
    """
    wanted = {"train": spec.tokens, "heldout": spec.heldout_tokens}
    have = dict.fromkeys(wanted, 0)
    parts: dict[str, list[tuple[int, np.ndarray]]] = {split: [] for split in wanted}
    heldout_share = spec.heldout_tokens / (spec.tokens + spec.heldout_tokens)
    numbered = enumerate(documents(spec.corpus, spec.seed))
    seen = 0
    while have != wanted and (batch := list(islice(numbered, _TOKENIZED_TOGETHER))):
        texts = subject.tokenize([text.rstrip() + "\n\n" for _, text in batch])
        for (number, _), ids in zip(batch, texts, strict=True):
            seen += len(ids)
            draw = xxhash.xxh3_64_intdigest(struct.pack("<QQ", spec.seed, number)) / 2**64
            first, second = ("heldout", "train") if draw < heldout_share else ("train", "heldout")
            split = first if have[first] < wanted[first] else second
            taken = ids[: wanted[split] - have[split]]
            parts[split].append((number, taken))
            have[split] += len(taken)
    if have != wanted:
        raise SaescaleError(
            f"the corpus {spec.corpus} is too short: it gave {seen:,} tokens (train {have['train']:,}, heldout "
            f"{have['heldout']:,}) where tokens + heldout_tokens = {sum(wanted.values()):,} are wanted; ask for "
            "fewer, or give more text"
        )
    shape = (-1, spec.context_length)
    return {
        split: _Contexts(
            np.concatenate([ids for _, ids in found]).reshape(shape),
            np.concatenate([np.full(len(ids), number, np.int32) for number, ids in found]).reshape(shape),
        )
        for split, found in parts.items()
    }


def _hash(contexts: dict[str, _Contexts]) -> str:
    digest = xxhash.xxh3_128()
    for split in SPLITS:
        digest.update(contexts[split].ids.tobytes())
        digest.update(contexts[split].doc.tobytes())
    return digest.hexdigest()


def _prefix(subject: Subject) -> list[int]:
    """What stands before each context and is dropped: BOS, or EOS where there is none (as in GPT-2), or nothing."""
    first = subject.bos_token_id if subject.bos_token_id is not None else subject.eos_token_id
    return [] if first is None else [first]


# --- one shard


def _shards(spec: HarvestSpec, contexts: _Contexts) -> Iterator[_Contexts]:
    size = spec.shard_rows // spec.context_length
    for first in range(0, len(contexts.ids), size):
        yield _Contexts(contexts.ids[first : first + size], contexts.doc[first : first + size])


def _columns(part: _Contexts, order: np.ndarray, first_pos: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token, pos and doc of the shard's rows, each [rows], in the order of the file."""
    length = part.ids.shape[1]
    pos = np.tile(np.arange(first_pos, first_pos + length, dtype=np.int16), len(part.ids))
    return part.ids.ravel()[order], pos[order], part.doc.ravel()[order]


def _activations(
    spec: HarvestSpec, subject: Subject, prefix: list[int], ids: np.ndarray, meter: "_Meter", name: str
) -> np.ndarray:
    """Raw activations [rows, d_model] of the contexts `ids` in their order."""
    length = spec.context_length
    act = np.empty((ids.size, subject.d_model), raw_dtype(spec.dtype))
    for first in range(0, len(ids), spec.batch_contexts):
        batch = torch.from_numpy(ids[first : first + spec.batch_contexts])
        batch = torch.cat([torch.tensor(prefix, dtype=torch.int32).expand(len(batch), -1), batch], dim=1)
        resid = subject.resid_post(batch, spec.layer)[:, len(prefix) :].reshape(-1, subject.d_model)
        start = first * length
        act[start : start + len(resid)] = _raw(resid, spec)
        meter.computed(len(resid), f"harvesting {name}")
    return act


def _raw(resid: torch.Tensor, spec: HarvestSpec) -> np.ndarray:
    if spec.dtype == "bfloat16":
        return resid.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
    largest = float(resid.abs().max())
    if np.isfinite(largest) and largest > float(np.finfo(np.float16).max):
        raise SaescaleError(
            f"an activation of {spec.subject} at layer {spec.layer} is {largest:.4g}, too large for float16; harvest "
            "with --dtype bfloat16"
        )
    return resid.to(torch.float16).cpu().numpy()


def _read_kept(
    spec: HarvestSpec,
    name: str,
    split: Literal["train", "heldout"],
    token: np.ndarray,
    pos: np.ndarray,
    doc: np.ndarray,
    d_model: int,
) -> tuple[Shard, np.ndarray] | None:
    """The shard that an interrupted harvest wrote, with its activations; None when it is missing or unsound."""
    try:
        content = files.read_bytes(files.join(spec.out, name))
        table = pq.read_table(pa.BufferReader(content), use_threads=False)
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None
    expected = {"token": token, "pos": pos, "doc": doc}
    if table.schema.names != ["act", *expected] or table.schema.field("act").type != pa.binary(2 * d_model):
        return None
    if any(not np.array_equal(table.column(key), column) for key, column in expected.items()):
        return None
    column = table.column("act").combine_chunks()
    act = np.frombuffer(column.buffers()[1], raw_dtype(spec.dtype))[column.offset * d_model :]
    act = act[: len(token) * d_model].reshape(len(token), d_model)
    if find_bad_row(act, spec.dtype) is not None:
        return None
    checksum = xxhash.xxh3_64_hexdigest(content)
    return Shard(name=name, split=split, rows=len(act), bytes=len(content), xxh3=checksum), act


def _moments(act: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """Sum of the rows [d_model] and sum of their squared norms, as stored, in float64."""
    total, square = np.zeros(act.shape[1]), 0.0
    for first in range(0, len(act), 4096):
        rows = to_float32(act[first : first + 4096], dtype).astype(np.float64)
        total += rows.sum(axis=0)
        square += float(np.square(rows).sum())
    return total, square


# --- what is told


class _Meter:
    """Keeps count for the progress callback."""

    def __init__(self, spec: HarvestSpec, progress: Progress | None) -> None:
        self._progress = progress or (lambda done, total, rate, stage: None)
        self._total = spec.tokens + spec.heldout_tokens
        self._done = 0
        self._computed = 0
        self._rate = 0.0
        self._since: float | None = None

    def say(self, stage: str) -> None:
        self._progress(self._done, self._total, self._rate, stage)

    def skip(self, rows: int, stage: str) -> None:
        self._done += rows
        self.say(stage)

    def computed(self, rows: int, stage: str) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now  # the first batch warms up and is not timed
        else:
            self._computed += rows
            self._rate = self._computed / max(now - self._since, 1e-9)
        self._done += rows
        self.say(stage)


def _created_with(computed_in: str) -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return {"python": platform.python_version(), **packages, "computed_in": computed_in}
