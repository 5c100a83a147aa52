"""Harvests of a subject that makes its own sequences (the example of subjects/README.md), and rows back to contexts."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.rows import Rows, write_shard
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.harvest import conduct
from saescale.trainers.harvest.conduct import harvest, harvest_layers
from saescale.trainers.harvest.contexts import SPLITS, draws
from saescale.trainers.harvest.make_shard import Harvester
from saescale.trainers.harvest.retrace import Places, heldout_places
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.numbered import BLOCK_SEQUENCES, draw_block
from saescale.trainers.subjects.subject import Subject, get_subject
from tests.test_doors import example


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of subjects in SAESCALE_PATH: `toy`, and `ragged`, whose sequences are of 3 to 15 ids."""
    _, text = example("trainers/subjects")
    folder = tmp_path / "mine" / "subjects"
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text(text)
    ragged = text.replace("size=LENGTH", "size=rng.integers(3, LENGTH)").replace(
        "np.arange(LENGTH) > 0", "np.arange(len(ids)) % 3 > 0"
    )
    assert ragged.count("% 3 > 0") == ragged.count("rng.integers(3, LENGTH)") == 1
    (folder / "ragged.py").write_text(ragged)
    monkeypatch.setenv("SAESCALE_PATH", str(folder.parent))
    return tmp_path


def spec_of(subject: str, out: Path, **changes: object) -> HarvestSpec:
    sizes = {"tokens": 5_000, "heldout_tokens": 1_001, "shard_rows": 1_700, "row_group_rows": 256, "batch_contexts": 7}
    return HarvestSpec.model_validate({"subject": subject, "layer": 0, "out": str(out)} | sizes | changes)


def contents(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def streams(store: ActivationStore, subject: Subject, places: Places) -> np.ndarray:
    """The residual stream at each place, computed context by context, float32 [rows, d_model]."""
    with torch.inference_mode():
        each = [subject.run(torch.from_numpy(ids)[None], [store.site]).resid[0][0] for ids in places.contexts]
    return np.stack([each[c][p].float().numpy() for c, p in zip(places.context, places.pos, strict=True)])


@pytest.mark.parametrize("name", ["toy", "ragged"])
def test_every_row_is_the_subjects_stream_where_its_sequence_says(rooms: Path, name: str) -> None:
    spec = spec_of(name, rooms / "store")
    manifest = harvest(spec)
    store = ActivationStore.open(spec.out)
    store.verify(full=True)
    assert (store.rows("train"), store.rows("heldout")) == (5_000, 1_001)
    assert [shard.rows for shard in manifest.shards] == [1_700, 1_700, 1_600, 1_001]
    assert manifest.site.positions == "those that the subject keeps"
    assert manifest.context_length <= 16
    subject = get_subject(name)
    places = heldout_places(store, subject)
    rows = store.heldout(columns=("act", "token", "pos", "doc"))
    ids = [places.contexts[c][p] for c, p in zip(places.context, places.pos, strict=True)]
    assert np.array_equal(rows.token, ids)
    # Of batches of another size, so to rounding.
    np.testing.assert_allclose(rows.act.astype(np.float32), streams(store, subject, places), rtol=2e-3, atol=2e-3)
    kept = places.pos % 3 > 0 if name == "ragged" else places.pos > 0
    assert kept.all()
    assert len(set(zip(rows.doc, rows.pos, strict=True))) == len(rows.doc)  # no row comes twice
    assert np.mean(rows.doc[:-1] == rows.doc[1:]) < 0.2  # and they are mixed


def test_all_layers_of_a_subject_that_says_how_many_only_when_it_is_loaded(rooms: Path) -> None:
    harvest(spec_of("ragged", rooms / "alone"))
    (manifest,) = harvest_layers(spec_of("ragged", rooms / "all"), "all")
    assert manifest.site.layer == 0
    assert contents(str(rooms / "all" / "resid_post.0")) == contents(str(rooms / "alone"))


def test_train_and_heldout_share_no_sequence(rooms: Path) -> None:
    subject = get_subject("ragged")
    found = {
        split: {ids.tobytes() for block in range(4) for ids, _ in draw_block(subject, split, 0, block)}
        for split in SPLITS
    }
    assert len(found["train"]) > BLOCK_SEQUENCES
    assert not found["train"] & found["heldout"]
    train, heldout = ({draw.block for draw in islice(draws(split, 0), 50)} for split in SPLITS)
    assert not train & heldout


def test_who_draws_which_block_and_when_decides_nothing(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("ragged", rooms / "store")
    harvest(spec)

    class Ahead(conduct.Alone):
        """Draws four blocks further than it is asked for, as actors may, each by a subject of its own."""

        def tokenize(self, blocks):  # type: ignore[no-untyped-def]
            wanted = list(islice(blocks, 12))
            done = {}
            for block in reversed(wanted):
                done[block.block] = Harvester([spec], self._spool, "auto").tokenize(block)
            return (done[block.block] for block in wanted)

    monkeypatch.setattr(conduct, "Alone", Ahead)
    other = spec_of("ragged", rooms / "other")
    harvest(other)
    assert contents(other.out) == contents(spec.out)


def test_what_a_dead_harvest_left_is_finished_with_the_same_bytes(rooms: Path) -> None:
    spec = spec_of("ragged", rooms / "store")
    harvest(spec)
    before = contents(spec.out)
    for name in ("manifest.json", "train-00001.parquet"):
        (Path(spec.out) / name).unlink()
    harvest(spec)
    assert contents(spec.out) == before
    with pytest.raises(SaescaleError, match="another harvest: seed is 0 there, 1 here"):
        harvest(spec.model_copy(update={"seed": 1}))


@pytest.mark.parametrize("given", [{"corpus": "python-prose"}, {"context_length": 8}])
def test_what_is_of_text_alone_is_refused_in_one_line(rooms: Path, given: dict[str, object]) -> None:
    sizes = {"tokens": 4_096, "heldout_tokens": 1_024, "shard_rows": 1_024}
    with pytest.raises(
        SaescaleError, match=f"--{next(iter(given)).replace('_', '-')} does not apply to toy, which makes"
    ):
        harvest(spec_of("toy", rooms / "store", **sizes, **given))
    assert not (rooms / "store").exists()


def test_a_subject_that_ends_or_keeps_nothing_is_one_line(rooms: Path) -> None:
    text = (rooms / "mine" / "subjects" / "toy.py").read_text()
    for name, changed, said in (
        ("ends", text.replace("while True:", "for _ in range(100):"), "ended after"),
        ("empty", text.replace("np.arange(LENGTH) > 0", "np.zeros(LENGTH, bool)"), "keeps no position"),
        ("odd", text.replace("np.arange(LENGTH) > 0", "np.ones(3, bool)"), r"has ids \[16\], keep \[3\]"),
    ):
        (rooms / "mine" / "subjects" / f"{name}.py").write_text(changed)
        with pytest.raises(SaescaleError, match=said):
            harvest(spec_of(name, rooms / name))


@pytest.mark.parametrize("name", ["toy", "ragged"])
def test_labels_of_rows_are_recomputed_from_their_whole_sequences(rooms: Path, name: str) -> None:
    spec = spec_of(name, rooms / "store")
    harvest(spec)
    store, subject = ActivationStore.open(spec.out), get_subject(name)
    found = heldout_labels(store, subject, 300)
    assert list(found) == ["ahead"]
    assert found["ahead"].shape == (300,)
    assert 0.1 < found["ahead"].mean() < 0.9
    places = heldout_places(store, subject, 300)
    for value, context, pos in zip(found["ahead"], places.context, places.pos, strict=True):
        seen = places.contexts[context][: pos + 1]  # the start token is 2
        assert value == ((seen == 1).sum() > (seen == 0).sum())


# --- text


def test_rows_of_a_text_lead_back_to_their_contexts(tiny_subject: str, tiny_corpus: str, tmp_path: Path) -> None:
    spec = HarvestSpec(
        subject=tiny_subject, layer=1, corpus=tiny_corpus, out=str(tmp_path / "store"), tokens=2_048,
        heldout_tokens=1_536, context_length=32, shard_rows=1_024, row_group_rows=256, compute_dtype="float32",
    )  # fmt: skip
    harvest(spec)
    store, subject = ActivationStore.open(spec.out), get_subject(tiny_subject, dtype="float32")
    places = heldout_places(store, subject, 1_200)  # ends in the second shard
    assert {len(ids) for ids in places.contexts} == {33}
    assert {int(ids[0]) for ids in places.contexts} == {subject.bos_token_id}  # type: ignore[attr-defined]
    rows = store.heldout(1_200)
    np.testing.assert_allclose(rows.act.astype(np.float32), streams(store, subject, places), rtol=2e-3, atol=2e-3)
    with pytest.raises(SaescaleError, match="has no labels"):
        heldout_labels(store, subject, 10)


def test_rows_of_another_writer_do_not_lead_back(tiny_subject: str, tiny_corpus: str, tmp_path: Path) -> None:
    spec = HarvestSpec(
        subject=tiny_subject, layer=1, corpus=tiny_corpus, out=str(tmp_path / "store"), tokens=1_024,
        heldout_tokens=1_024, context_length=32, row_group_rows=256, compute_dtype="float32",
    )  # fmt: skip
    manifest = harvest(spec)
    store = ActivationStore.open(spec.out)
    rows = store.heldout(columns=("act", "token", "pos", "doc"))
    (tmp_path / "store" / "manifest.json").unlink()
    shard = write_shard(
        spec.out, "heldout-00000.parquet", "heldout", Rows(*(column[::-1] for column in rows)), "float16", 256
    )
    other = ActivationStore(spec.out, manifest.model_copy(update={"shards": [manifest.shards[0], shard]}))
    with pytest.raises(SaescaleError, match="not in the order of saescale harvest"):
        heldout_places(other, get_subject(tiny_subject))
