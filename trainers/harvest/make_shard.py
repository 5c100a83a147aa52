"""One process's part in a harvest: it tokenizes blocks of text and makes shards, any of them, in any order.

A shard is a pure function of the spec, the tokens and the subject, is written whole or not at all, and comes out the
same wherever it is made.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Shard
from saescale.storage.rows import Rows, find_bad_row, raw_dtype, to_float32, write_shard
from saescale.trainers.harvest.contexts import SPLITS, Counted, ShardTokens, Texts, spool_block
from saescale.trainers.harvest.spec import HarvestSpec, note_plan
from saescale.trainers.subjects.subject import get_subject

if TYPE_CHECKING:
    from saescale.trainers.subjects.language_model import Subject

Tell = Callable[[int, str, bool], None]  # rows that were done, what is being done, whether it took computing


class Facts(NamedTuple):
    """What the plan and the manifest say of a loaded subject. `prefix` stands before each context and is dropped."""

    fingerprint: str
    d_model: int
    computed_in: str
    prefix: list[int]
    dropped: list[str]
    created_with: dict[str, str]


class ShardRecord(NamedTuple):
    """What the manifest needs of a shard.

    `total` [d_model] and `total_square` are the sums of its rows and of their squared norms in float64; `seconds`
    the time it took to make, None when it was there.
    """

    shard: Shard
    total: np.ndarray
    total_square: float
    seconds: float | None


class ShardJob(NamedTuple):
    """A shard to make: its tokens, and the plan (harvest.json) that is written before any shard."""

    tokens: ShardTokens
    plan: dict[str, Any]


class Harvester:
    """A loaded subject and what it makes for the harvest `spec`; the ids of blocks lie in the folder `spool`.

    `computed_in` is the arithmetic ("auto": what is fast here). Raises what `get_subject` and `check_site` raise.
    """

    def __init__(
        self,
        spec: HarvestSpec,
        spool: str,
        computed_in: str,
        cache: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._spec, self._spool = spec, spool
        self._subject = subject = get_subject(spec.subject, cache=cache, dtype=computed_in, notify=notify)
        # BOS, or EOS where there is none (as in GPT-2), or nothing.
        first = subject.bos_token_id if subject.bos_token_id is not None else subject.eos_token_id
        prefix = [] if first is None else [first]
        subject.check_site(spec.layer, len(prefix) + spec.context_length)
        self.facts = Facts(
            fingerprint=subject.fingerprint,
            d_model=subject.d_model,
            computed_in=str(subject.dtype).removeprefix("torch."),
            prefix=prefix,
            dropped=[] if not prefix else ["bos"] if subject.bos_token_id is not None else ["eos"],
            created_with=_versions(),
        )

    def tokenize(self, texts: Texts) -> Counted:
        """Puts the ids of a block into the spool."""
        return spool_block(self._spool, texts, self._subject)

    def make(self, job: ShardJob, tell: Tell) -> ShardRecord:
        """Writes the shard, or finds it sound as an interrupted harvest wrote it.

        Raises SaescaleError when an activation exceeds float16, when a block is missing, when the store is sealed,
        and for what subjects and writing raise.
        """
        began = time.monotonic()
        spec, tokens = self._spec, job.tokens
        ids, docs = tokens.stretches.read(self._spool, spec.context_length)
        order = np.random.default_rng([spec.seed, SPLITS.index(tokens.split), tokens.ordinal]).permutation(ids.size)
        pos = np.arange(spec.context_length, dtype=np.int16) + np.int16(len(self.facts.prefix))
        columns = {
            "token": ids.ravel()[order],
            "pos": np.tile(pos, len(ids))[order],
            "doc": docs.ravel()[order],
        }
        kept = _read_kept(spec, tokens, columns, self.facts.d_model)
        if kept is not None:
            shard, act = kept
            tell(len(act), f"keeping {tokens.name}", False)
        else:
            act = _activations(spec, self._subject, self.facts.prefix, ids, tell, tokens.name)[order]
            note_plan(spec.out, job.plan)  # only now, so that what fails in the first shard leaves an empty folder
            shard = write_shard(
                spec.out, tokens.name, tokens.split, Rows(act, **columns), spec.dtype, spec.row_group_rows
            )
        total, total_square = _moments(act, spec.dtype)
        return ShardRecord(shard, total, total_square, None if kept else time.monotonic() - began)


def _activations(
    spec: HarvestSpec, subject: Subject, prefix: list[int], ids: np.ndarray, tell: Tell, name: str
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
        tell(len(resid), f"harvesting {name}", True)
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


def _moments(act: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """Sum of the rows [d_model] and sum of their squared norms, as stored, in float64."""
    total, square = np.zeros(act.shape[1]), 0.0
    for first in range(0, len(act), 4096):
        rows = to_float32(act[first : first + 4096], dtype).astype(np.float64)
        total += rows.sum(axis=0)
        square += float(np.square(rows).sum())
    return total, square


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return {"python": platform.python_version(), **packages}
