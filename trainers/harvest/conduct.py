"""From a subject and what it reads to an activation store; what was written survives any interruption.

A harvest is a plan, which the numbers of tokens of the documents decide (assignment.py); shards, each a pure function
of the plan and its number (make_shard.py); and a manifest from what the shards say of themselves. So it does not matter
who makes which shard, and a harvest that died goes on with the shards that are missing.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import FORMAT, MANIFEST, Manifest, Shard, Split, write_manifest
from saescale.storage.secrets import hide_secrets
from saescale.storage.store import ActivationStore
from saescale.storage.writable import require_writable
from saescale.trainers.harvest.assignment import Assignment
from saescale.trainers.harvest.contexts import SPLITS, Block, Counted, draws, text_blocks
from saescale.trainers.harvest.layers import each_layer
from saescale.trainers.harvest.make_shard import Facts, Harvester, Made, ShardJob, ShardRecord, site_of
from saescale.trainers.harvest.room import check_room
from saescale.trainers.harvest.spec import OWN_SEQUENCES, HarvestSpec, read_plan, refuse_difference
from saescale.trainers.subjects.subject import surely_reads_text
from saescale.trainers.subjects.texts.text import TEXT_COLUMN, check_corpus

PLAN_FORMAT = 2  # 1 split texts by their numbers
SPOOL_PREFIX = ".tokens-"  # folders of token ids in the store's folder while a harvest goes on

NOTHING_S = 0.02  # until somebody with nothing to do asks again

Progress = Callable[[int, int, float, str], None]  # rows done, rows in all, tokens/s, what is being done


class Crew(Protocol):
    """Who does the work of a harvest: this process, or actors of a cluster. Results come in the order of what was
    asked, whoever was faster."""

    def load(self, specs: Sequence[HarvestSpec], computed_in: str) -> Facts:
        """Loads the subject in that arithmetic ("auto": what its device is made for), for the stores of `specs`."""

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[Counted]:
        """Puts the ids of the blocks, texts or draws, into the spool; the caller may stop at any of them."""

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[Made]:
        """Makes the shards that are not there, each in all stores."""

    def serve(self, items: Iterator[Block | ShardJob | None]) -> Iterator[Counted | Made]:
        """Does both as it comes; None stands for nothing to do at the moment."""


def harvest(spec: HarvestSpec, progress: Progress | None = None, cache: str | None = None) -> Manifest:
    """Harvests in this process into the store `spec.out`, or finishes a harvest of the same spec; its manifest.

    A finished one is returned at once, without loading the subject. `progress(done_rows, total_rows, tokens_per_s,
    stage)` is called at every batch; the rate counts what this call computed. Memory: one shard; the token ids lie in
    a temporary folder. Raises SaescaleError when the corpus is too short, when `spec.out` holds another harvest or
    other files, when the disk is too small, when an activation exceeds float16, and for what subjects, corpora and
    writing raise.
    """
    (manifest,) = harvest_each([spec], progress, cache)
    return manifest


def harvest_layers(
    spec: HarvestSpec, layers: str | Iterable[int], progress: Progress | None = None, cache: str | None = None
) -> list[Manifest]:
    """`harvest` of several layers ("0-11", "0,4,8", "all", or numbers) in one pass of the subject: the stores that
    `each_layer` (layers.py) names, each as its own harvest writes it, to the last byte.

    Memory: a shard of each store. Raises what `harvest` and `each_layer` raise.
    """
    meter = Meter(0, progress)
    return harvest_each(each_layer(spec, layers, cache, meter.say), progress, cache)


def harvest_each(
    specs: Sequence[HarvestSpec], progress: Progress | None = None, cache: str | None = None
) -> list[Manifest]:
    """`harvest` of specs that differ in `layer` and `out` alone, in one pass; their manifests."""
    meter = Meter(specs[0].rows, progress)
    with tempfile.TemporaryDirectory(prefix="saescale-tokens-") as spool:
        return conduct(specs, Alone(spool, cache, meter), spool, meter.say)


def conduct(specs: Sequence[HarvestSpec], crew: Crew, spool: str, say: Callable[[str], None]) -> list[Manifest]:
    """Has `crew` do a harvest whose ids lie in the folder `spool`, and seals the stores; their manifests.

    The stores of `specs`, which differ in `layer` and `out` alone, hold the same rows; those that are sealed already
    are left as they are. `say` is told what begins. Two calls at a time do no harm: both write the same bytes, and when
    one has sealed the stores, the other returns those manifests. Raises what `harvest` raises.
    """
    found = [read_plan(spec) for spec in specs]
    _refuse_other_rows(specs, found)
    if (manifests := _all_sealed(specs)) is not None:
        return manifests
    todo = [spec for spec in specs if not is_sealed(spec)]
    check_first(todo)
    try:
        say(f"loading {specs[0].subject}")
        # What `auto` came to when the harvest began: it may go on elsewhere.
        begun = next((str(plan["computed_in"]) for plan in found if plan and "computed_in" in plan), "auto")
        facts = crew.load(todo, begun if specs[0].compute_dtype == "auto" else specs[0].compute_dtype)
        say(check_room(todo, facts.d_model))
        assignment = _assign(specs[0], facts, crew, say)
        plan = {
            "format": PLAN_FORMAT,
            **specs[0].identity(facts.reads_text),
            "fingerprint": facts.fingerprint,
            "computed_in": facts.computed_in,
            "tokens_xxh3": assignment.digest(spool),
        }
        for spec, there in zip(specs, found, strict=True):
            if there is not None:
                refuse_difference(spec.out, there, {**plan, "layer": spec.layer})
        jobs = (ShardJob(tokens, plan) for tokens in assignment.shards())
        for spec, manifest in zip(todo, _manifests(todo, facts, assignment.longest, crew.make(jobs)), strict=True):
            write_manifest(spec.out, manifest)
    except SaescaleError as error:
        # Another call that had the same to do was faster.
        if (manifests := _all_sealed(specs)) is not None:
            return manifests
        if sealed := [spec.out for spec in todo if is_sealed(spec)]:
            raise SaescaleError(
                f"another harvest has finished {sealed[0]} meanwhile; run the same command again, which does the rest"
            ) from error
        raise
    manifests = _all_sealed(specs)
    assert manifests is not None, "they were sealed just now"
    say("done")
    return manifests


def _refuse_other_rows(specs: Sequence[HarvestSpec], found: Sequence[Mapping[str, Any] | None]) -> None:
    """SaescaleError where stores that were begun already, each by itself maybe, do not hold the same rows."""
    begun = [(spec, plan) for spec, plan in zip(specs, found, strict=True) if plan is not None]
    for spec, plan in begun[1:]:
        refuse_difference(spec.out, plan, {**begun[0][1], "layer": spec.layer})


def check_first(specs: Sequence[HarvestSpec]) -> None:
    """Raises SaescaleError for what shows without the subject, which may be gigabytes away."""
    spec = specs[0]
    if surely_reads_text(spec.subject):
        spec.check_contexts()
    check_corpus(spec.corpus, spec.text_column)
    for each in specs:
        require_writable(each.out)


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


def _all_sealed(specs: Sequence[HarvestSpec]) -> list[Manifest] | None:
    """The manifests of a finished harvest, its shards checked; None of one that is not."""
    if not all(is_sealed(spec) for spec in specs):
        return None
    manifests = []
    for spec in specs:
        store = ActivationStore.open(spec.out)
        store.verify(full=False)
        manifests.append(store.manifest)
    for spec in specs:
        _tidy(spec)
    return manifests


def is_sealed(spec: HarvestSpec) -> bool:
    """Whether the store is finished."""
    return files.exists(files.join(spec.out, MANIFEST))


def _tidy(spec: HarvestSpec) -> None:
    """Removes what killed processes left behind in a store that is sealed now."""
    for name in files.list_names(spec.out):
        if name.startswith(SPOOL_PREFIX):
            files.remove(files.join(spec.out, name))
    files.remove_partials(spec.out)


def heldout_manifest(spec: HarvestSpec, facts: Facts, longest: int, made: Iterable[Made]) -> Manifest:
    """That of a live source (live.py): it knows the held-out shards alone, and mean and mean square are theirs."""
    sums = _Sums(facts.d_model, "heldout")
    for one in made:
        sums.add(one.records[0])
    return _manifest(spec, facts, longest, sums, spec.heldout_tokens)


def _manifests(specs: Sequence[HarvestSpec], facts: Facts, longest: int, made: Iterator[Made]) -> list[Manifest]:
    """Of each store, from what all its shards say; none is sealed before all shards of all stores are there."""
    sums = [_Sums(facts.d_model) for _ in specs]
    for one in made:  # in the order of the shards: sums of floats depend on it
        for own, record in zip(sums, one.records, strict=True):
            own.add(record)
    return [_manifest(spec, facts, longest, own, spec.tokens) for spec, own in zip(specs, sums, strict=True)]


class _Sums:
    """Over the shards of a store."""

    def __init__(self, d_model: int, of: Split = "train") -> None:
        self.shards: list[Shard] = []
        self._of = of
        self.total, self.total_square = np.zeros(d_model), 0.0  # of the rows of that split

    def add(self, record: ShardRecord) -> None:
        self.shards.append(record.shard)
        if record.shard.split == self._of:
            self.total += record.total
            self.total_square += record.total_square


def _manifest(spec: HarvestSpec, facts: Facts, longest: int, sums: _Sums, rows: int) -> Manifest:
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
        shards=sums.shards,
        mean=(sums.total / rows).tolist(),
        mean_square=sums.total_square / rows,
        split_by="content" if facts.reads_text else "subject",
        contexts_cross_documents=facts.reads_text,
        created_with={**facts.created_with, "computed_in": facts.computed_in},
    )


# --- one process


class Alone:
    """The crew that this process is by itself."""

    def __init__(self, spool: str, cache: str | None, meter: "Meter") -> None:
        self._spool, self._cache, self._meter = spool, cache, meter

    def load(self, specs: Sequence[HarvestSpec], computed_in: str) -> Facts:
        self._harvester = Harvester(specs, self._spool, computed_in, self._cache, self._meter.say)
        return self._harvester.facts

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[Counted]:
        return map(self._harvester.tokenize, blocks)

    def make(self, jobs: Iterator[ShardJob]) -> Iterator[Made]:
        return (self._harvester.make(job, self._meter.tell) for job in jobs)

    def serve(self, items: Iterator[Block | ShardJob | None]) -> Iterator[Counted | Made]:
        for item in items:
            if item is None:
                time.sleep(NOTHING_S)
            elif isinstance(item, ShardJob):
                yield self._harvester.make(item, self._meter.tell)
            else:
                yield self._harvester.tokenize(item)


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
