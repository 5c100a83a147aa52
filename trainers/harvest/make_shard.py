"""One process's part in a harvest: it tokenizes or draws blocks and makes shards, any of them, in any order.

A shard is a pure function of the spec, the tokens and the subject, is written whole or not at all, and comes out the
same wherever it is made, and whatever other layers are harvested in the same pass.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Shard, Site, Split
from saescale.storage.rows import Rows, find_bad_row, raw_dtype, to_float32, write_shard
from saescale.trainers.harvest.assignment import ShardTokens
from saescale.trainers.harvest.contexts import SPLITS, Batch, Block, Context, Counted, batches
from saescale.trainers.harvest.spec import HarvestSpec, note_plan
from saescale.trainers.subjects.subject import Generates, ReadsText, Subject, check_sites_before_loading, get_subject

Tell = Callable[[int, str, bool], None]  # rows that were done, what is being done, whether it took computing


class Facts(NamedTuple):
    """What the plan and the manifest say of a loaded subject. `prefix` stands before each context and is dropped;
    without `reads_text` it makes its own sequences, and says itself which positions are kept."""

    fingerprint: str
    d_model: int
    computed_in: str
    prefix: list[int]
    dropped: list[str]
    created_with: dict[str, str]
    reads_text: bool

    @property
    def positions(self) -> str:
        """Which of a context's positions are rows, in words."""
        return "those that the subject keeps" if not self.reads_text else "all but BOS" if self.prefix else "all"


class ShardRecord(NamedTuple):
    """What the manifest needs of a shard: `total` [d_model] and `total_square` are the sums of its rows and of their
    squared norms in float64."""

    shard: Shard
    total: np.ndarray
    total_square: float


class Made(NamedTuple):
    """The same shard of every store: a record for each, in the order of the specs; how many of them were computed, and
    the seconds that took."""

    records: tuple[ShardRecord, ...]
    computed: int
    seconds: float

    @property
    def rows(self) -> int:
        return self.records[0].shard.rows


class ShardJob(NamedTuple):
    """A shard to make: its tokens, and the plan (harvest.json) that is written before any shard, but for the layer."""

    tokens: ShardTokens
    plan: dict[str, Any]


class Harvester:
    """A loaded subject and what it makes for a harvest: shards of a store for each of `specs`, which differ in `layer`
    and `out` alone. The ids of blocks lie in the folder `spool`.

    `computed_in` is the arithmetic ("auto": its device's). Raises what `get_subject` and `check_site` raise.
    """

    def __init__(
        self,
        specs: Sequence[HarvestSpec],
        spool: str,
        computed_in: str,
        cache: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._specs, self._spool = specs, spool
        self._spec = spec = specs[0]
        layers, trusted = [each.layer for each in specs], spec.trust_remote_code
        check_sites_before_loading(spec.subject, layers, spec.context_length, cache, notify, trusted)
        self._subject: Subject = get_subject(spec.subject, cache, computed_in, notify, trusted, spec.device_map)
        subject = self._subject
        prefix, dropped = prefix_of(subject)
        reads_text = not isinstance(subject, Generates)
        for layer in layers:
            # How long sequences are shows when they are drawn.
            subject.check_site(layer, len(prefix) + spec.context_length if reads_text else 1)
        self.facts = Facts(
            fingerprint=subject.fingerprint,
            d_model=subject.d_model,
            computed_in=str(subject.dtype).removeprefix("torch."),
            prefix=prefix,
            dropped=dropped,
            created_with=versions(),
            reads_text=reads_text,
        )

    def tokenize(self, block: Block) -> Counted:
        """Puts the ids of a block into the spool."""
        return block.spool(self._spool, self._subject)  # type: ignore[arg-type]  # the kind of block is the subject's

    def make(self, job: ShardJob, tell: Tell) -> Made:
        """Writes the shard into each store, or finds it sound as an interrupted harvest wrote it. The subject runs once
        for all stores that lack it.

        Raises SaescaleError when an activation exceeds float16, when a block is missing, when a store is sealed,
        and for what subjects and writing raise.
        """
        began = time.monotonic()
        spec, tokens = self._spec, job.tokens
        contexts = batches(self._contexts(tokens), spec.batch_contexts)
        columns = _columns(contexts)
        rows = len(columns["token"])
        order = mixed(spec.seed, tokens.split, tokens.ordinal, rows)
        columns = {name: column[order] for name, column in columns.items()}
        records: dict[int, ShardRecord] = {}
        for each in self._specs:
            if (kept := _read_kept(each, tokens, columns, self.facts.d_model)) is not None:
                records[each.layer] = ShardRecord(kept[0], *moments(kept[1], each.dtype))
                del kept  # before the next: a shard of each store may be more than there is room for
        lacking = [each for each in self._specs if each.layer not in records]
        if not lacking:
            tell(rows, f"keeping {tokens.name}", False)
            return Made(tuple(records[each.layer] for each in self._specs), 0, 0.0)
        acts = _activations(lacking, self._subject, self.facts, contexts, np.argsort(order), tell, tokens.name)
        for each in lacking:  # only now, so that what fails in the first shard leaves empty folders
            note_plan(each.out, {**job.plan, "layer": each.layer})
        for each in lacking:
            act = acts.pop(each.layer)
            shard = write_shard(
                each.out, tokens.name, tokens.split, Rows(act, **columns), each.dtype, each.row_group_rows
            )
            records[each.layer] = ShardRecord(shard, *moments(act, each.dtype))
        made = tuple(records[each.layer] for each in self._specs)
        return Made(made, len(lacking), time.monotonic() - began)

    def _contexts(self, tokens: ShardTokens) -> list[Context]:
        if self.facts.reads_text:
            return tokens.stretches.texts(self._spool, self._spec.context_length, self.facts.prefix)
        return tokens.stretches.sequences(self._spool)


def site_of(spec: HarvestSpec, facts: Facts) -> Site:
    """Where the rows of the harvest are taken."""
    return Site(layer=spec.layer, positions=facts.positions)


def mixed(seed: int, split: Split, ordinal: int, rows: int) -> np.ndarray:
    """Which row of its contexts stands at each place of a shard, int64 [rows]."""
    return np.random.default_rng([seed, SPLITS.index(split), ordinal]).permutation(rows)


def prefix_of(subject: Subject) -> tuple[list[int], list[str]]:
    """What stands before each context of a text, and what it is called: BOS, or EOS where there is none (as in GPT-2),
    or nothing."""
    if isinstance(subject, Generates):
        return [], []
    if not isinstance(subject, ReadsText):
        raise SaescaleError(f"the subject {subject.name} has neither `tokenize` nor `sequences`: give it one of them")
    if subject.bos_token_id is not None:
        return [subject.bos_token_id], ["bos"]
    return ([], []) if subject.eos_token_id is None else ([subject.eos_token_id], ["eos"])


def _columns(contexts: list[Batch]) -> dict[str, np.ndarray]:
    """`token`, `pos` and `doc` [rows] of the rows of the contexts in their order."""
    return {
        "token": np.concatenate([batch.ids[batch.keep] for batch in contexts]),
        "pos": np.concatenate([np.nonzero(batch.keep)[1] for batch in contexts]).astype(np.int16),
        "doc": np.concatenate([batch.doc[batch.keep] for batch in contexts]),
    }


def _activations(
    specs: Sequence[HarvestSpec],
    subject: Subject,
    facts: Facts,
    contexts: list[Batch],
    places: np.ndarray,
    tell: Tell,
    name: str,
) -> dict[int, np.ndarray]:
    """Raw activations [rows, d_model] at each spec's layer: row i of the contexts, in their order, at `places[i]`."""
    sites = [site_of(spec, facts) for spec in specs]
    acts = {spec.layer: np.empty((len(places), facts.d_model), raw_dtype(spec.dtype)) for spec in specs}
    start = 0
    for batch in contexts:
        keep = torch.from_numpy(batch.keep)
        stop = start + int(batch.keep.sum())
        run = subject.run(torch.from_numpy(batch.ids), sites)
        for spec, resid in zip(specs, run.resid, strict=True):
            acts[spec.layer][places[start:stop]] = raw_rows(resid[keep.to(resid.device)], spec)
        tell(stop - start, f"harvesting {name}", True)
        start = stop
    return acts


def raw_rows(resid: torch.Tensor, spec: HarvestSpec) -> np.ndarray:
    """[rows, d_model] as the store holds them. SaescaleError where one is too large for float16."""
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
    spec: HarvestSpec, tokens: ShardTokens, columns: dict[str, np.ndarray], d_model: int
) -> tuple[Shard, np.ndarray] | None:
    """The shard that an interrupted harvest wrote, with its activations; None when it is missing or unsound."""
    try:
        content = files.read_bytes(files.join(spec.out, tokens.name))
        table = pq.read_table(pa.BufferReader(content), use_threads=False)
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None
    if table.schema.names != ["act", *columns] or table.schema.field("act").type != pa.binary(2 * d_model):
        return None
    if any(not np.array_equal(table.column(key), column) for key, column in columns.items()):
        return None
    column, rows = table.column("act").combine_chunks(), table.num_rows
    act = np.frombuffer(column.buffers()[1], raw_dtype(spec.dtype))[column.offset * d_model :]
    act = act[: rows * d_model].reshape(rows, d_model)
    if find_bad_row(act, spec.dtype) is not None:
        return None
    checksum = xxhash.xxh3_64_hexdigest(content)
    return Shard(name=tokens.name, split=tokens.split, rows=rows, bytes=len(content), xxh3=checksum), act


def moments(act: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """Sum of the rows [d_model] and sum of their squared norms, as stored, in float64."""
    total, square = np.zeros(act.shape[1]), 0.0
    for first in range(0, len(act), 4096):
        rows = to_float32(act[first : first + 4096], dtype).astype(np.float64)
        total += rows.sum(axis=0)
        square += float(np.square(rows).sum())
    return total, square


def versions() -> dict[str, str]:
    """Of what a harvest is made with."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return {"python": platform.python_version(), **packages}
