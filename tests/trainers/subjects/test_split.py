"""The held-out split is by content: no text has rows in both splits, however often and in whatever pieces it comes."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saescale.storage.errors import SaescaleError
from saescale.trainers.harvest.assignment import Assignment
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.contexts import SPLITS, text_blocks
from saescale.trainers.harvest.make_shard import mixed
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.subjects.texts import text as module
from saescale.trainers.subjects.texts.text import python_prose


def plain(text: str) -> str:
    """A text by which equal ones are known: its words."""
    return " ".join(text.split())


def texts_of(out: str, split: str, subject: str) -> dict[int, str]:
    """What the stored tokens of a split say, document by document: shards unmixed and decoded."""
    ids: dict[int, list[int]] = defaultdict(list)
    for ordinal, path in enumerate(sorted(Path(out).glob(f"{split}-*.parquet"))):
        table = pq.read_table(path, columns=["token", "doc"])
        order = np.argsort(mixed(0, split, ordinal, table.num_rows))  # type: ignore[arg-type]
        for token, doc in zip(*(table[name].to_numpy()[order].tolist() for name in ("token", "doc")), strict=True):
            ids[doc].append(token)
    tokenizer = get_subject(subject, dtype="float32").tokenizer  # type: ignore[attr-defined]
    return {doc: tokenizer.decode(tokens) for doc, tokens in ids.items()}


@pytest.fixture
def spec(tiny_subject: str, tmp_path: Path) -> HarvestSpec:
    return HarvestSpec(
        subject=tiny_subject,
        layer=0,
        corpus=str(tmp_path / "corpus"),
        out=str(tmp_path / "store"),
        tokens=12_288,
        heldout_tokens=4_096,
        context_length=32,
        shard_rows=4_096,
        row_group_rows=512,
        compute_dtype="float32",
    )


def test_a_text_that_comes_twice_and_the_pieces_of_a_file_have_rows_in_one_split(spec: HarvestSpec) -> None:
    folder = Path(spec.corpus)
    folder.mkdir()
    texts = [f"{number} {text[:400]}" for number, text in enumerate(python_prose()[-70:])]
    assert len({plain(text)[:40] for text in texts}) == len(texts)
    once = [{"text": text} for text in texts]
    again = [{"text": "\n " + text.replace(" ", "\n") + " "} for text in reversed(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*once, *again]))
    # A long file, and the same as one line of another file, which is not cut.
    long = "\n\n".join(f"Part {number}. {text[:1500]}" for number, text in enumerate(python_prose()[:20]))
    (folder / "b.txt").write_text(long)
    (folder / "c.jsonl").write_text(json.dumps({"text": long}) + "\n")
    assert len(long) > 2 * module.TXT_CHARACTERS

    manifest = harvest(spec)
    found = {split: texts_of(spec.out, split, spec.subject) for split in SPLITS}
    # Documents of the corpus in their order: the texts, the same backwards, the long file, and its like.
    number_of = {**{n: n for n in range(70)}, **{70 + n: 69 - n for n in range(70)}, 140: 70, 141: 70}
    sides = defaultdict(set)
    for split, of_split in found.items():
        for doc, said in of_split.items():
            whole = [*texts, long][number_of[doc]]
            assert plain(whole).startswith(plain(said)[:30])
            sides[number_of[doc]].add(split)
    assert all(len(where) == 1 for where in sides.values())
    assert sum(n in found[split] and 139 - n in found[split] for split in SPLITS for n in range(70)) > 3
    assert min(map(len, found.values())) > 3
    assert (manifest.split_by, manifest.contexts_cross_documents) == ("content", True)


def test_one_document_is_too_short_for_two_splits_and_both_are_told(spec: HarvestSpec) -> None:
    Path(spec.corpus).mkdir()
    (Path(spec.corpus) / "book.txt").write_text("\n\n".join(python_prose()[:40]))
    said = (
        r"is too short: of its \d\d,\d{3} tokens in 1 document train got 12,288 of 12,288 and heldout got 0 of 4,096\. "
        r"The split is by document, a \.txt file is one, .* give more documents"
    )
    with pytest.raises(SaescaleError, match=said):
        harvest(spec)
    assert not Path(spec.out).exists()


# --- any small corpus, in characters instead of tokens


class Characters:
    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(character) for character in text], np.int32) for text in texts]


def too_short(folder: Path, texts: list[str], tokens: int, heldout_tokens: int) -> str:
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = HarvestSpec(out="-", corpus=str(folder), tokens=tokens, heldout_tokens=heldout_tokens)
    assignment = Assignment(spec, divisible=True)
    for block in text_blocks(str(folder), 0):
        assignment.add(block.spool(f"memory://{folder}", Characters()))  # type: ignore[arg-type]
    with pytest.raises(SaescaleError, match="too short") as caught:
        assignment.check_full()
    return str(caught.value)


def test_of_equal_documents_the_number_is_said_and_cutting_is_advised_for_long_ones_alone(tmp_path: Path) -> None:
    said = too_short(tmp_path, ["the same, short text"] * 100, 300, 60)
    assert "tokens in 100 documents (99 of them equal to an earlier one) train got" in said
    assert said.endswith("equal texts stay in one split: ask for fewer tokens, give more other documents")
    assert too_short(tmp_path, ["one " * 400], 300, 60).endswith(
        "more documents, or cut long ones (--cut-documents 2000)"
    )
    assert too_short(tmp_path, ["one", "two"], 300, 60).endswith("ask for fewer tokens, give more text")


words = st.text("ab", min_size=1, max_size=3)
lines = st.lists(words, min_size=1, max_size=6).map(" ".join)
any_text = st.lists(lines, min_size=1, max_size=8).flatmap(
    lambda parts: st.sampled_from(["\n", "\n\n", "  \n"]).map(lambda between: between.join(parts) + "\n")
)


@settings(max_examples=60, deadline=None)
@given(
    pool=st.lists(any_text, min_size=1, max_size=5),
    picks=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=16),
    wanted=st.tuples(st.integers(1, 150), st.integers(1, 60)),
    seed=st.integers(0, 3),
)
def test_no_text_of_any_small_corpus_is_on_both_sides(
    pool: list[str], picks: list[tuple[int, bool, bool]], wanted: tuple[int, int], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.multiple(module, TXT_CHARACTERS=20, TXT_CHARACTERS_MOST=40):
        whole = []
        for number, (pick, is_file, spaced) in enumerate(picks):
            text = pool[pick % len(pool)]
            whole.append(plain(text))
            text = text.replace(" ", "  ") if spaced else text
            content = text if is_file else json.dumps({"text": text})
            Path(folder, f"{number:02d}.{'txt' if is_file else 'jsonl'}").write_text(content)
        spec = HarvestSpec(out="-", corpus=folder, tokens=wanted[0], heldout_tokens=wanted[1], seed=seed)
        spool, assignment = f"memory://{folder}", Assignment(spec, divisible=True)
        for block in text_blocks(folder, seed):
            assignment.add(block.spool(spool, Characters()))  # type: ignore[arg-type]
        if not assignment.full():
            with pytest.raises(SaescaleError, match="too short"):
                assignment.check_full()
            return
        sides, pieces_of = defaultdict(set), {split: set() for split in SPLITS}
        for shard in assignment.shards():
            ids = np.concatenate(list(shard.stretches.ids(spool)))
            said = np.split(ids, np.cumsum(shard.stretches.tokens)[:-1])
            for doc, tokens in zip(shard.stretches.doc.tolist(), said, strict=True):
                piece = "".join(map(chr, tokens))
                assert plain(piece) in whole[doc]
                sides[whole[doc]].add(shard.split)
                if piece.endswith("\n\n"):  # not cut off where the split was full
                    pieces_of[shard.split].add(plain(piece))
        assert all(len(where) == 1 for where in sides.values())
        assert not pieces_of["train"] & pieces_of["heldout"]
