"""Live sources: the batches of the stored blocks to the last bit, never more on the disk than was allowed."""

import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError

from saescale.storage.checkpoint import steps
from saescale.storage.errors import SaescaleError
from saescale.storage.live import LiveSource, LiveStream, open_source
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Order, SourceBatch
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest import contexts, live_told
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.live import live_here
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.room import Room
from saescale.trainers.training.train import train_pack
from tests.s3_faults import Faults
from tests.survival import assert_same, reached
from tests.trainers.live_case import BLOCK, TOKENS, WINDOW, cell_of, job_of, live_spec
from tests.watched_disk import Watch


@pytest.fixture(autouse=True)
def small_blocks_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**13)


@pytest.fixture(scope="module")
def spec(tiny_subject: str, tiny_corpus: str) -> LiveSpec:
    return live_spec(tiny_subject, tiny_corpus)


def test_a_mistake_is_told_by_the_keys_of_the_section(spec: LiveSpec) -> None:
    for wrong, said in (
        ({"block_rows": 1_000}, "block_rows must be a multiple of context_length 32, not 1000"),
        ({"heldout_tokens": 10}, "heldout_tokens must be a multiple of context_length 32, not 10"),
        ({"context_length": 40_000}, "context_length must be at most 32767, not 40000"),
    ):
        with pytest.raises(ValidationError, match=f"Value error, {said}"):
            LiveSpec.model_validate(spec.model_dump(exclude_none=True) | wrong)


@pytest.fixture(scope="module")
def stored(spec: LiveSpec, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """What a harvest of the same fields writes."""
    url = str(tmp_path_factory.mktemp("stored") / "store")
    harvest(spec.harvest(url, reads_text=True))
    return ActivationStore.open(url)


def tight(spec: LiveSpec, blocks: int) -> LiveSpec:
    """With room for so many blocks and no more."""
    room = Room(spec, spec.harvest("x", reads_text=True), 32)
    return spec.model_copy(update={"max_bytes": room.beside + blocks * room.block})


def test_blocks_are_the_shards_of_the_harvest_and_their_order_is_as_the_page_says(
    spec: LiveSpec, stored: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, order = str(tmp_path / "live"), Order("train", 3, 512)
    few = tight(spec, WINDOW + 1)
    watch = Watch(url, monkeypatch)
    with live_here(few, url) as live:
        source = open_source(url)
        assert isinstance(source, LiveSource)
        assert source.rows("train") == TOKENS
        with source.batches(order, stop=2 * TOKENS // 512) as stream:
            found = np.stack([batch.x for batch in stream])
        made = live.making.made
    # Two passes: the second makes all blocks again, with the same bytes.
    whole = stored.read_split("train")
    expected = []
    for epoch in range(2):
        for number in range(TOKENS // (BLOCK * WINDOW)):
            part = whole[number * BLOCK * WINDOW : (number + 1) * BLOCK * WINDOW]
            bits = np.random.PCG64(np.random.SeedSequence((3, epoch, number + 1))).random_raw(len(part))
            expected.append(part[np.argsort(bits, kind="stable")])
    assert np.array_equal(found.reshape(-1, 32).view(np.uint16), np.concatenate(expected).view(np.uint16))
    assert np.array_equal(source.heldout().act, stored.heldout().act)
    assert made >= 2 * TOKENS - (WINDOW + 1) * BLOCK
    assert watch.blocks <= WINDOW + 1
    assert watch.bytes <= few.max_bytes
    assert watch.writes > 16


def test_blocks_that_are_gone_are_made_again(spec: LiveSpec, stored: ActivationStore, tmp_path: Path) -> None:
    """Consumers that begin anew, go back, and run beside slower ones, with room for little more than a window."""
    order, batches = Order("train", 0, 512), TOKENS // 512
    with live_here(spec, stored.url), open_source(stored.url).batches(order, stop=2 * batches) as stream:
        expected = [batch.x.copy() for batch in stream]
    url = str(tmp_path / "live")

    def equal(stream: Iterator[SourceBatch], first: int, last: int) -> bool:
        return all(np.array_equal(next(stream).x, expected[number]) for number in range(first, last))

    with live_here(tight(spec, WINDOW + 1), url) as live:
        source = open_source(url)
        with source.batches(order) as first:
            assert equal(first, 0, 20)
            with source.batches(order, stop=2 * batches) as second:  # from the start, while the other one waits
                assert equal(second, 0, 28)
                second.passed(16)
                assert equal(first, 20, 30)
                state = second.state() | {"batch": 16}
        with source.resume(state, stop=2 * batches) as third:
            assert equal(third, 16, 2 * batches)
        assert live.making.again > 0
        assert live.making.error is None


def test_a_producer_that_begins_again_reads_no_more_of_the_corpus_than_it_needs(
    spec: LiveSpec, stored: ActivationStore, tmp_path: Path
) -> None:
    """What was read before may be anything by then; where the notes are of other files, all is read again."""
    corpus, order = tmp_path / "corpus", Order("train", 0, 512)
    corpus.mkdir()
    content = Path(spec.corpus).read_bytes()
    (corpus / "a.jsonl").write_bytes(content)
    here = tight(spec, WINDOW + 1).model_copy(update={"corpus": str(corpus)})
    with live_here(spec, stored.url), open_source(stored.url).batches(order, stop=TOKENS // 512) as stream:
        expected = [batch.x.copy() for batch in stream]
    url = str(tmp_path / "live")
    with live_here(here, url):
        stream = open_source(url).batches(order, stop=TOKENS // 512)
        found = [next(stream).x.copy() for _ in range(24)]
        state = stream.state()
    third = content.index(b"\n", len(content) // 3)
    (corpus / "a.jsonl").write_bytes(b"\xff" * third + content[third:])
    with stream, live_here(here, url):
        found += [batch.x.copy() for batch in stream]
    assert np.array_equal(np.stack(found), np.stack(expected))
    (corpus / "b.jsonl").write_bytes(content)
    for block in Path(url).glob("train-*"):
        block.unlink()
    stream = open_source(url).resume(state, stop=TOKENS // 512)
    with stream, live_here(here, url), pytest.raises(SaescaleError, match=r"a\.jsonl, line 1: not UTF-8"):
        list(stream)


def test_a_folder_has_one_producer_and_what_one_left_that_was_killed_goes(
    spec: LiveSpec, stored: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token ids, what was half written, and a block that nobody has noted the checksum of, whatever it is."""
    monkeypatch.setattr(live_told, "_ALONE_S", 1.5)
    url, order = str(tmp_path / "live"), Order("train", 0, 512)
    with live_here(spec, url):
        with pytest.raises(SaescaleError, match="another producer makes the blocks of this live source; end it first"):
            live_here(spec, url).__enter__()
        with open_source(url).batches(order, stop=8) as stream:
            assert len(list(stream)) == 8
    told = tmp_path / "live" / "producer.json"
    told.write_text(told.read_text().replace('"ended"', '"making block 3"'))  # as one leaves it that was killed
    left = [f"{name}.{'0' * 32}.partial" for name in (".train-00007.parquet", "made/.00000.json", "places/.00000.json")]
    left += [".tokens-old/block-0", "train-00006.parquet"]
    for name in left:
        (tmp_path / "live" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "live" / name).write_bytes(b"half")
    (tmp_path / "live" / "made" / "00000.json").unlink()
    with live_here(spec, url):
        for name in left[:-1]:
            assert not (tmp_path / "live" / name).exists()
        with open_source(url).batches(order, stop=TOKENS // 512) as stream:
            found = np.stack([batch.x for batch in stream])
    with live_here(spec, stored.url), open_source(stored.url).batches(order, stop=TOKENS // 512) as stream:
        assert np.array_equal(found, np.stack([batch.x for batch in stream]))


@pytest.mark.slow
def test_blocks_in_a_slow_store_that_fails_at_times(
    spec: LiveSpec, stored: ActivationStore, s3_url: str, s3_faults: Faults
) -> None:
    order = Order("train", 0, 512)
    with live_here(spec, stored.url), open_source(stored.url).batches(order, stop=16) as stream:
        expected = [batch.x.copy() for batch in stream]
    with (
        s3_faults.injected(0.05, slow_s=0.2) as met,
        live_here(tight(spec, WINDOW + 1), s3_url),
        open_source(s3_url).batches(order, stop=16) as stream,
    ):
        found = [batch.x for batch in stream]
    assert np.array_equal(np.stack(found), np.stack(expected))
    assert len(met) >= 2


class SlowStore(MemoryFileSystem):
    """slow://, where whatever is asked for takes a while, and not always the same."""

    protocol = "slow"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    chance, answers = random.Random(0), 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("slow://")))

    def _slowly(self) -> None:
        SlowStore.answers += 1
        time.sleep(self.chance.choice([0.0, 0.002, 0.05]))

    def _open(self, *given: Any, **more: Any) -> Any:
        self._slowly()
        return super()._open(*given, **more)

    def pipe_file(self, *given: Any, **more: Any) -> Any:
        self._slowly()
        return super().pipe_file(*given, **more)

    def ls(self, *given: Any, **more: Any) -> Any:
        self._slowly()
        return super().ls(*given, **more)

    def rm(self, *given: Any, **more: Any) -> Any:
        self._slowly()
        return super().rm(*given, **more)


def test_training_over_a_slow_store_of_blocks_gives_the_bits_of_the_stored_ones(
    spec: LiveSpec, stored: ActivationStore, tmp_path: Path
) -> None:
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    outcomes, url = [], f"slow://{uuid.uuid4().hex}"
    for name, where, few in (("slow", url, tight(spec, WINDOW + 1)), ("stored", stored.url, spec)):
        run = RunDirectory(str(tmp_path / name))
        with live_here(few, where) as live:
            outcome = train_pack(job_of(open_source(where), run.url, [cell_of(open_source(where))]))
        assert live.making.error is None
        run.write_results(outcome.results)
        outcomes.append(reached(run))
    assert_same(*outcomes)
    assert SlowStore.answers > 100
    held = [len(file.getvalue()) for file in SlowStore.store.values()]
    assert 0 < sum(held) <= tight(spec, WINDOW + 1).max_bytes


def test_what_the_older_checkpoint_goes_on_from_is_not_passed(
    spec: LiveSpec, stored: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To which a pack goes back where the newer one is damaged, or to the start; it never waits for a block here."""
    run, url, said = RunDirectory(str(tmp_path / "run")), stored.url, list[tuple[int, int]]()
    passed = LiveStream.passed

    def noted(self: LiveStream, batch: int) -> None:
        (cell,) = run.cell_files()
        if found := steps(run.checkpoint_url(cell)):  # else it is done
            said.append((batch, found[1] if len(found) > 1 else 0))
        passed(self, batch)

    monkeypatch.setattr(LiveStream, "passed", noted)
    with live_here(spec, url):
        train_pack(job_of(open_source(url), run.url, [cell_of(open_source(url))], checkpoint_every_s=1e-6))
    assert len(said) > 10
    assert all(batch <= older for batch, older in said)
    assert said[-1][0] > 10


def test_training_gives_the_bits_of_the_stored_blocks(spec: LiveSpec, stored: ActivationStore, tmp_path: Path) -> None:
    outcomes = []
    for name, url, few in (("live", str(tmp_path / "live"), tight(spec, WINDOW + 1)), ("stored", stored.url, spec)):
        run = RunDirectory(str(tmp_path / name))
        with live_here(few, url):
            source = open_source(url)
            cells = [cell_of(source), cell_of(source, n_latents=96, k=6)]
            outcome = train_pack(job_of(source, run.url, cells))
        run.write_results(outcome.results)
        outcomes.append(reached(run))
    assert_same(*outcomes)
    assert stored.rows("train") == TOKENS  # what was stored stays
    ActivationStore.open(stored.url).verify(full=True)


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("tokens", "3.2e10", 32 * 10**9),  # which YAML takes for text
        ("tokens", 3.2e5, 320_000),
        ("max_bytes", "200 GB", 200 * 10**9),
        ("max_bytes", "1.5TiB", 3 * 2**39),
        ("max_bytes", 10**9, 10**9),
    ],
)
def test_large_numbers_are_read_as_people_write_them(spec: LiveSpec, field: str, given: object, read: int) -> None:
    assert getattr(LiveSpec.model_validate(spec.model_dump() | {field: given}), field) == read


@pytest.mark.parametrize(
    ("field", "given"),
    [("tokens", "3.5"), ("tokens", True), ("tokens", "many"), ("max_bytes", "5 apples"), ("tokens", -1)],
)
def test_what_is_no_number_of_things_is_refused(spec: LiveSpec, field: str, given: object) -> None:
    with pytest.raises(ValidationError, match=field):
        LiveSpec.model_validate(spec.model_dump() | {field: given})
