"""From a subject and what it reads to an activation store; what was written survives any interruption.

A harvest is a plan, which the numbers of tokens of the documents decide (assignment.py); shards, each a pure function
of the plan and its number (make_shard.py); and a manifest from what the shards say of themselves. So it does not matter
who makes which shard, and a harvest that died goes on with the shards that are missing.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import FORMAT, MANIFEST, Manifest, Split, write_manifest
from saescale.storage.secrets import hide_secrets
from saescale.storage.store import ActivationStore
from saescale.storage.writable import require_writable
from saescale.trainers.harvest.assignment import Assignment
from saescale.trainers.harvest.contexts import SPLITS, Block, Counted, draws, text_blocks
from saescale.trainers.harvest.make_shard import Facts, Harvester, ShardJob, ShardRecord, site_of
from saescale.trainers.harvest.spec import OWN_SEQUENCES, HarvestSpec, read_plan, refuse_difference
from saescale.trainers.subjects.subject import surely_reads_text
from saescale.trainers.subjects.text import TEXT_COLUMN, check_corpus

PLAN_FORMAT = 2  # 1 split texts by their numbers
SPOOL_PREFIX = ".tokens-"  # folders of token ids in the store's folder while a harvest goes on

Progress = Callable[[int, int, float, str], None]  # rows done, rows in all, tokens/s, what is being done


class Crew(Protocol):
    """Who does the work of a harvest: this process, or actors of a cluster. Results come in the order of what was
    asked, whoever was faster."""

    def load(self, computed_in: str) -> Facts:
        """Loads the subject in that arithmetic ("auto": what its device is made for)."""

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[Counted]:
        """Puts the ids of the blocks, texts or draws, into the spool; the caller may stop at any of them."""

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[ShardRecord]:
        """Makes the shards that are not there."""


def harvest(spec: HarvestSpec, progress: Progress | None = None, cache: str | None = None) -> Manifest:
    """Harvests in this process into the store `spec.out`, or finishes a harvest of the same spec; its manifest.

    A finished one is returned at once, without loading the subject. `progress(done_rows, total_rows, tokens_per_s,
    stage)` is called at every batch; the rate counts what this call computed. Memory: one shard; the token ids lie in
    a temporary folder. Raises SaescaleError when the corpus is too short, when `spec.out` holds another harvest or
    other files, when an activation exceeds float16, and for what subjects, corpora and writing raise.
    """
    meter = Meter(spec.tokens + spec.heldout_tokens, progress)
    with tempfile.TemporaryDirectory(prefix="saescale-tokens-") as spool:
        return conduct(spec, _Alone(spec, spool, cache, meter), spool, meter.say)


def conduct(spec: HarvestSpec, crew: Crew, spool: str, say: Callable[[str], None]) -> Manifest:
    """Has `crew` do a harvest whose ids lie in the folder `spool`, and seals the store; its manifest.

    `say` is told what begins. Two calls of one spec at a time do no harm: both write the same bytes, and when one
    has sealed the store, the other returns that manifest. Raises what `harvest` raises.
    """
    found = read_plan(spec)
    if (manifest := _sealed(spec)) is not None:
        return manifest
    _check_first(spec)
    try:
        say(f"loading {spec.subject}")
        # What `auto` came to when the harvest began: it may go on elsewhere.
        begun = str(found.get("computed_in", "auto")) if found is not None else "auto"
        facts = crew.load(begun if spec.compute_dtype == "auto" else spec.compute_dtype)
        assignment = _assign(spec, facts, crew, say)
        plan = {
            "format": PLAN_FORMAT,
            **spec.identity(facts.reads_text),
            "fingerprint": facts.fingerprint,
            "computed_in": facts.computed_in,
            "tokens_xxh3": assignment.digest(spool),
        }
        if found is not None:
            refuse_difference(spec.out, found, plan)
        jobs = (ShardJob(tokens, plan) for tokens in assignment.shards())
        manifest = _manifest(spec, facts, assignment.longest, crew.make(jobs))
        write_manifest(spec.out, manifest)
    except SaescaleError:
        # Another call that had the same to do was faster.
        if (manifest := _sealed(spec)) is not None:
            return manifest
        raise
    _tidy(spec)
    say("done")
    return manifest


def _check_first(spec: HarvestSpec) -> None:
    """Raises SaescaleError for what shows without the subject, which may be gigabytes away."""
    if surely_reads_text(spec.subject):
        spec.check_contexts()
    check_corpus(spec.corpus, spec.text_column)
    require_writable(spec.out)


def _assign(spec: HarvestSpec, facts: Facts, crew: Crew, say: Callable[[str], None]) -> Assignment:
    """Has the crew put into the spool what the shards are made from."""
    assignment = Assignment(spec, divisible=facts.reads_text)
    if facts.reads_text:
        spec.check_contexts()
        say(f"tokenizing {spec.corpus}")
        texts = text_blocks(spec.corpus, spec.seed, spec.text_column, spec.cut_documents)
        rounds: list[tuple[Iterator[Block], Sequence[Split]]] = [(texts, SPLITS)]
    else:
        spec.refuse_text()
        say("drawing sequences")
        rounds = [(draws(split, spec.seed), [split]) for split in SPLITS]
    for blocks, splits in rounds:
        for counted in crew.tokenize(blocks):
            assignment.add(counted)
            if assignment.full(splits):
                break
    assignment.check_full()
    return assignment


def _sealed(spec: HarvestSpec) -> Manifest | None:
    """The manifest of a finished harvest, its shards checked; None of one that is not."""
    if not files.exists(files.join(spec.out, MANIFEST)):
        return None
    store = ActivationStore.open(spec.out)
    store.verify(full=False)
    _tidy(spec)
    return store.manifest


def _tidy(spec: HarvestSpec) -> None:
    """Removes what killed processes left behind in a store that is sealed now."""
    for name in files.list_names(spec.out):
        if name.startswith(SPOOL_PREFIX):
            files.remove(files.join(spec.out, name))
    files.remove_partials(spec.out)


def _manifest(spec: HarvestSpec, facts: Facts, longest: int, records: Iterator[ShardRecord]) -> Manifest:
    shards, total, total_square = [], np.zeros(facts.d_model), 0.0
    for record in records:  # in the order of the shards: sums of floats depend on it
        shards.append(record.shard)
        if record.shard.split == "train":
            total += record.total
            total_square += record.total_square
    return Manifest(
        format=FORMAT,
        subject=spec.subject,
        fingerprint=facts.fingerprint,
        site=site_of(spec, facts),
        d_model=facts.d_model,
        dtype=spec.dtype,
        context_length=spec.context_length if facts.reads_text else longest,
        dropped=facts.dropped,
        corpus=hide_secrets(spec.corpus) if facts.reads_text else OWN_SEQUENCES,
        text_column=spec.text_column if spec.text_column != TEXT_COLUMN else None,
        documents_cut=spec.cut_documents,
        seed=spec.seed,
        row_group_rows=spec.row_group_rows,
        shards=shards,
        mean=(total / spec.tokens).tolist(),
        mean_square=total_square / spec.tokens,
        split_by="content" if facts.reads_text else "subject",
        contexts_cross_documents=facts.reads_text,
        created_with={**facts.created_with, "computed_in": facts.computed_in},
    )


# --- one process


class _Alone:
    """The crew that this process is by itself."""

    def __init__(self, spec: HarvestSpec, spool: str, cache: str | None, meter: "Meter") -> None:
        self._spec, self._spool, self._cache, self._meter = spec, spool, cache, meter

    def load(self, computed_in: str) -> Facts:
        self._harvester = Harvester(self._spec, self._spool, computed_in, self._cache, self._meter.say)
        return self._harvester.facts

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[Counted]:
        return map(self._harvester.tokenize, blocks)

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[ShardRecord]:
        return (self._harvester.make(job, self._meter.tell) for job in jobs)


class Meter:
    """Keeps count of what one process does, for a progress callback."""

    def __init__(self, total: int, progress: Progress | None = None) -> None:
        self._progress = progress or (lambda done, total, rate, stage: None)
        self._total = total
        self._computed = 0
        self._since: float | None = None
        self.done = 0  # rows
        self.rate = 0.0  # of what was computed, tokens/s

    def say(self, stage: str) -> None:
        """What is being done now."""
        self._progress(self.done, self._total, self.rate, stage)

    def tell(self, rows: int, stage: str, computed: bool) -> None:
        """So many more rows are done, by computing them or as they were there."""
        if computed:
            now = time.monotonic()
            if self._since is None:
                self._since = now  # the first batch warms up and is not timed
            else:
                self._computed += rows
                self.rate = self._computed / max(now - self._since, 1e-9)
        self.done += rows
        self.say(stage)
