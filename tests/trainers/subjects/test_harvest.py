"""Harvests: what a store holds, and that it comes out the same whatever happened on the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from pydantic import ValidationError

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.rows import to_float32
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest import make_shard as module
from saescale.trainers.harvest.conduct import HarvestSpec, harvest
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.subjects.texts.text import pieces

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def spec(tiny_subject: str, tiny_corpus: str, tmp_path: Path) -> HarvestSpec:
    """5 train shards (the last one short) and 2 heldout shards."""
    return HarvestSpec(
        subject=tiny_subject,
        layer=2,
        corpus=tiny_corpus,
        out=str(tmp_path / "store"),
        tokens=4608,
        heldout_tokens=1536,
        context_length=32,
        shard_rows=1024,
        row_group_rows=256,
        batch_contexts=5,
        compute_dtype="float32",  # so that another batching gives the same bits nearly
    )


def _table(out: str, split: str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(path) for path in sorted(Path(out).glob(f"{split}-*.parquet"))]
    columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in ("token", "pos", "doc")}
    act = b"".join(value.as_py() for table in tables for value in table["act"])
    return {**columns, "act": np.frombuffer(act, np.float16).reshape(len(columns["token"]), -1)}


def _bytes(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def test_every_row_is_the_models_own_hidden_state_of_the_token_it_names(spec: HarvestSpec) -> None:
    manifest = harvest(spec)
    store = ActivationStore.open(spec.out)
    store.verify(full=True)
    assert (store.rows("train"), store.rows("heldout")) == (4608, 1536)
    assert [shard.rows for shard in manifest.shards] == [1024] * 4 + [512] + [1024, 512]
    assert manifest.dropped == ["bos"]
    assert manifest.site.positions == "all but BOS"
    subject = get_subject(spec.subject, dtype="float32")
    assert manifest.fingerprint == subject.fingerprint

    texts = [text.rstrip() + "\n\n" for _, text in pieces(spec.corpus, spec.seed)]
    tokens = subject.tokenize(texts)
    for split in ("train", "heldout"):
        rows = _table(spec.out, split)
        # The documents of a split one after the other are its contexts one after the other.
        numbers = np.unique(rows["doc"])
        text = np.concatenate([tokens[number] for number in numbers])[: len(rows["token"])]
        docs = np.concatenate([np.full(len(tokens[number]), number) for number in numbers])
        contexts = torch.from_numpy(text.reshape(-1, spec.context_length))
        ids = torch.cat([torch.full((len(contexts), 1), subject.bos_token_id), contexts], dim=1)
        with torch.inference_mode():
            states = subject.model(input_ids=ids, output_hidden_states=True).hidden_states[spec.layer + 1][:, 1:]
        expected: dict[tuple[int, int, int], list[np.ndarray]] = {}
        for index, state in enumerate(states.reshape(-1, subject.d_model).numpy()):
            key = (int(docs[index]), index % spec.context_length + 1, int(text[index]))
            expected.setdefault(key, []).append(state)
        for doc, pos, token, act in zip(rows["doc"], rows["pos"], rows["token"], rows["act"], strict=True):
            candidates = expected[int(doc), int(pos), int(token)]
            # The same token may stand at the same place of two contexts of one document.
            same = [i for i, state in enumerate(candidates) if np.allclose(act, state, rtol=2**-10, atol=1e-5)]
            assert same
            del candidates[same[0]]
        assert not any(expected.values())


def test_the_splits_share_no_document_and_rows_are_mixed(spec: HarvestSpec) -> None:
    harvest(spec)
    train, heldout = _table(spec.out, "train"), _table(spec.out, "heldout")
    assert not set(train["doc"]) & set(heldout["doc"])
    assert len(set(heldout["doc"])) > 3
    # A shard of 1,024 rows holds several documents, and neighbours are seldom of the same one.
    assert np.mean(train["doc"][:1023] == train["doc"][1:1024]) < 0.5


def test_the_cut_into_blocks_decides_nothing(
    spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest(spec)
    for characters in (1, 1500, 2**13):  # a document apiece, a few, and blocks that hold several shards
        monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", characters)
        out = str(tmp_path / str(characters))
        harvest(spec.model_copy(update={"out": out}))
        assert _bytes(out) == _bytes(spec.out)


def test_the_plan_holds_the_hash_of_all_tokens_and_their_documents(spec: HarvestSpec) -> None:
    harvest(spec)
    texts = [text.rstrip() + "\n\n" for _, text in pieces(spec.corpus, spec.seed)]
    tokens = get_subject(spec.subject, dtype="float32").tokenize(texts)
    digest = xxhash.xxh3_128()
    for split, size in (("train", spec.tokens), ("heldout", spec.heldout_tokens)):
        numbers = np.unique(_table(spec.out, split)["doc"])
        digest.update(np.concatenate([tokens[number] for number in numbers])[:size].tobytes())
        docs = np.concatenate([np.full(len(tokens[number]), number, np.int32) for number in numbers])
        digest.update(docs[:size].tobytes())
    assert json.loads((Path(spec.out) / "harvest.json").read_text())["tokens_xxh3"] == digest.hexdigest()


def test_mean_and_mean_square_are_those_of_the_stored_train_rows(spec: HarvestSpec) -> None:
    manifest = harvest(spec)
    rows = ActivationStore.open(spec.out).read_split("train").astype(np.float64)
    np.testing.assert_allclose(manifest.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(manifest.mean_square, np.square(rows).sum(axis=1).mean(), rtol=1e-12)


def test_the_order_is_of_the_seed(spec: HarvestSpec, tmp_path: Path) -> None:
    same = spec.model_copy(update={"out": str(tmp_path / "same")})
    other = spec.model_copy(update={"out": str(tmp_path / "other"), "seed": 1})
    for each in (spec, same, other):
        harvest(each)
    assert _bytes(spec.out) == _bytes(same.out)
    assert set(_table(spec.out, "heldout")["doc"]) != set(_table(other.out, "heldout")["doc"])


def test_bfloat16_stores_bit_patterns(spec: HarvestSpec, tmp_path: Path) -> None:
    harvest(spec)
    half = ActivationStore.open(spec.out)
    out = str(tmp_path / "bits")
    harvest(spec.model_copy(update={"dtype": "bfloat16", "out": out}))
    bits = ActivationStore.open(out)
    read = bits.read_split("heldout")
    assert read.dtype == np.uint16
    np.testing.assert_allclose(
        to_float32(read, "bfloat16"), to_float32(half.read_split("heldout"), "float16"), rtol=2**-7, atol=1e-4
    )


def test_too_large_for_float16_says_bfloat16(spec: HarvestSpec, tmp_path: Path) -> None:
    subject = get_subject(spec.subject, dtype="float32")
    subject.model.model.embed_tokens.weight *= 1e8
    subject.model.save_pretrained(tmp_path / "large")
    subject.tokenizer.save_pretrained(tmp_path / "large")
    large = spec.model_copy(update={"subject": f"hf:{tmp_path}/large"})
    with pytest.raises(SaescaleError, match="too large for float16; harvest with --dtype bfloat16"):
        harvest(large)
    manifest = harvest(large.model_copy(update={"dtype": "bfloat16"}))  # nothing is left in the way
    assert np.isfinite(manifest.mean_square)


@pytest.mark.parametrize(
    ("special", "dropped", "positions"),
    [({"eos_token": "</s>"}, ["eos"], (1, 32)), ({"pad_token": "</s>"}, [], (0, 31))],
)
def test_a_tokenizer_without_bos(
    spec: HarvestSpec, save_subject: Any, special: dict[str, str], dropped: list[str], positions: tuple[int, int]
) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    manifest = harvest(spec.model_copy(update={"subject": save_subject("gpt2", config, **special), "layer": 1}))
    assert manifest.dropped == dropped
    pos = _table(spec.out, "train")["pos"]
    assert (pos.min(), pos.max()) == positions


# --- interruptions

CHILD = """
import sys, time
from saescale.trainers.harvest.conduct import HarvestSpec, harvest
def progress(done, total, rate, stage):
    print(done, flush=True)
    if done >= 2 * 1024 + 512:
        time.sleep(60)
harvest(HarvestSpec.model_validate_json(sys.argv[1]), progress)
"""


def test_a_killed_harvest_goes_on_and_gives_the_same_bytes(
    spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = spec.model_copy(update={"out": str(tmp_path / "undisturbed")})
    harvest(undisturbed)

    command = [sys.executable, "-c", CHILD, spec.model_dump_json()]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 2 * 1024 + 512:  # half-way through the third shard
                break
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    names = sorted(path.name for path in Path(spec.out).iterdir())
    assert names == ["harvest.json", "train-00000.parquet", "train-00001.parquet"]
    with pytest.raises(SaescaleError, match="no activation store"):
        ActivationStore.open(spec.out)

    computed: list[str] = []
    whole = module._activations
    monkeypatch.setattr(module, "_activations", lambda *a: computed.append(a[-1]) or whole(*a))
    told: list[tuple[int, int, float, str]] = []
    harvest(spec, lambda *told_now: told.append(told_now))
    assert computed[0] == "train-00002.parquet"
    assert len(computed) == 5
    assert told[-1][:2] == (6144, 6144)
    assert any(stage == "keeping train-00001.parquet" for *_, stage in told)
    assert _bytes(spec.out) == _bytes(undisturbed.out)


def test_a_sealed_store_has_nothing_left_of_killed_processes(spec: HarvestSpec) -> None:
    harvest(spec)
    before = _bytes(spec.out)
    (Path(spec.out) / "manifest.json").unlink()
    (Path(spec.out) / f".train-00000.parquet.{'0' * 32}.partial").write_bytes(b"half")
    (Path(spec.out) / ".tokens-of-a-dead-driver").mkdir()
    harvest(spec)
    assert _bytes(spec.out) == before


def test_a_finished_harvest_returns_at_once(spec: HarvestSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = harvest(spec)
    monkeypatch.setattr(module, "get_subject", None)
    assert harvest(spec) == manifest
    (Path(spec.out) / "train-00001.parquet").unlink()
    with pytest.raises(SaescaleError, match="train-00001"):
        harvest(spec)


def test_an_unsound_shard_of_a_dead_harvest_is_made_again(spec: HarvestSpec) -> None:
    harvest(spec)
    before = _bytes(spec.out)
    (Path(spec.out) / "manifest.json").unlink()
    cut = Path(spec.out) / "train-00001.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    swapped = Path(spec.out) / "train-00002.parquet"
    swapped.write_bytes((Path(spec.out) / "train-00003.parquet").read_bytes())
    harvest(spec)
    assert _bytes(spec.out) == before


def test_another_harvest_is_refused_and_named(spec: HarvestSpec) -> None:
    harvest(spec)
    before = _bytes(spec.out)
    with pytest.raises(SaescaleError, match=r"another harvest: layer is 2 there, 1 here; seed is 0 there, 3 here\."):
        harvest(spec.model_copy(update={"layer": 1, "seed": 3}))
    (Path(spec.out) / "manifest.json").unlink()
    with pytest.raises(SaescaleError, match="another harvest: tokens is 4608 there, 4096 here"):
        harvest(spec.model_copy(update={"tokens": 4096}))
    assert {name: before[name] for name in _bytes(spec.out)} == _bytes(spec.out)


def test_other_weights_or_text_under_the_same_names_are_refused(spec: HarvestSpec) -> None:
    harvest(spec)
    (Path(spec.out) / "manifest.json").unlink()
    plan_file = Path(spec.out) / "harvest.json"
    plan = json.loads(plan_file.read_text())
    for key in ("fingerprint", "tokens_xxh3"):
        plan_file.write_text(json.dumps({**plan, key: "other"}))
        with pytest.raises(SaescaleError, match=f"another harvest: {key} is 'other' there"):
            harvest(spec)


def test_a_folder_with_other_files_is_left_alone(spec: HarvestSpec) -> None:
    Path(spec.out).mkdir()
    (Path(spec.out) / "thesis.tex").write_text("mine")
    with pytest.raises(SaescaleError, match=r"holds other files \(thesis\.tex\)"):
        harvest(spec)
    assert _bytes(spec.out) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_stores_on_other_file_systems_are_the_same(spec: HarvestSpec, scheme: str, request: Any) -> None:
    harvest(spec)
    url = f"memory://{time.time_ns()}" if scheme == "memory" else request.getfixturevalue("s3_url")
    harvest(spec.model_copy(update={"out": url}))
    assert {name: files.read_bytes(files.join(url, name)) for name in files.list_names(url)} == _bytes(spec.out)


# --- bad input


def test_a_short_corpus_says_what_it_gave_and_writes_nothing(spec: HarvestSpec) -> None:
    said = (
        r"too short: of its [\d,]+ tokens in 120 documents train got [\d,]+ of 1,000,000 and heldout got \d+ of 1,536"
    )
    with pytest.raises(SaescaleError, match=said):
        harvest(spec.model_copy(update={"tokens": 1_000_000}))
    assert not Path(spec.out).exists()


def test_a_corpus_suffices_when_it_has_the_tokens(spec: HarvestSpec) -> None:
    subject = get_subject(spec.subject, dtype="float32")
    texts = [text.rstrip() + "\n\n" for _, text in pieces(spec.corpus, 0)]
    every = sum(map(len, subject.tokenize(texts)))
    longest = max(map(len, subject.tokenize(texts)))
    tokens = (every - 1536 - longest) // 32 * 32
    assert harvest(spec.model_copy(update={"tokens": tokens})).shards


def test_sizes_that_nobody_gave_come_down_to_whole_contexts() -> None:
    spec = HarvestSpec(out="-", context_length=127)
    assert (spec.tokens, spec.heldout_tokens, spec.shard_rows) == (262_128, 32_766, 32_766)
    assert HarvestSpec(out="-", context_length=127, shard_rows=254).shard_rows == 254
    assert HarvestSpec(out="-", context_length=32_767).heldout_tokens == 32_767
    assert HarvestSpec.model_validate_json(spec.model_dump_json()) == spec


def test_what_needs_no_subject_is_found_before_it_is_loaded(
    spec: HarvestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_url: str
) -> None:
    monkeypatch.setattr(module, "get_subject", None)
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    before = sorted(tmp_path.iterdir())
    for changes, said in (
        ({"corpus": f"{tmp_path}/mistyped.jsonl"}, "no text file matches"),
        ({"corpus": f"{tmp_path}/bad.jsonl"}, "no field 'text'"),
        ({"tokens": 100}, "--tokens must be a multiple"),
        ({"out": f"{tmp_path}/a-file/store"}, "a-file/store .*: it is a file, not a folder"),
        ({"out": "/proc/store"}, "cannot write to /proc/store"),  # where nobody may write, root not either
        ({"out": "s3://no-such-bucket/store"}, "no-such-bucket"),
    ):
        with pytest.raises(SaescaleError, match=said):
            harvest(spec.model_copy(update=changes))
    with pytest.raises(TypeError):  # now it would be loaded
        harvest(spec.model_copy(update={"out": s3_url}))
    assert sorted(tmp_path.iterdir()) == before
    assert files.list_names(s3_url) == []


def test_impossible_specs_are_one_line(spec: HarvestSpec) -> None:
    def build(**changes: object) -> HarvestSpec:
        return HarvestSpec(**{**spec.model_dump(), **changes})

    with pytest.raises(
        SaescaleError, match=r"--tokens must be a multiple of --context-length 32, not 100; .* 96 and 128"
    ):
        build(tokens=100)
    with pytest.raises(SaescaleError, match="--shard-rows must be a multiple"):
        build(shard_rows=1000)
    with pytest.raises(SaescaleError, match="--heldout-tokens must be at least 1, not 0"):
        build(heldout_tokens=0)
    with pytest.raises(SaescaleError, match="--seed must be at most 18446744073709551615, not 18446744073709551616"):
        build(seed=2**64)
    with pytest.raises(SaescaleError, match="--out is empty"):
        build(out="")
    with pytest.raises(SaescaleError, match="unknown subject 'gpt9'"):
        build(subject="gpt9")
    with pytest.raises(ValidationError, match="contxt"):
        build(contxt=3)
    with pytest.raises(SaescaleError, match="no layer 7"):
        harvest(build(layer=7))
    with pytest.raises(SaescaleError, match="at most 64 tokens, not 65"):
        harvest(build(context_length=64))
    assert not Path(spec.out).exists()
