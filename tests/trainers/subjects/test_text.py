"""Corpora: what they yield, in which order, and what is said of broken ones."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.texts.text import (
    TXT_CHARACTERS,
    TXT_CHARACTERS_MOST,
    Piece,
    check_corpus,
    pieces,
    python_prose,
)

# What is said besides is tried in test_corpora.py.
pytestmark = pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")


def test_python_prose_is_long_english_without_doubles_in_a_seeded_order() -> None:
    prose = python_prose()
    assert sum(map(len, prose)) > 1_500_000  # about 400 k SmolLM2 tokens
    assert len(set(prose)) == len(prose)
    assert any(text.startswith('The "if" statement') for text in prose)
    first, again, other = ([text for _, text in pieces("python-prose", seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == sorted(prose)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("alpha\n\nbeta\n")
    (tmp_path / "blank.txt").write_text(" \n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "gámma", "id": 1}) + "\n\n" + json.dumps({"text": "delta"}) + "\n")
    pq.write_table(pa.table({"text": ["epsilon", None, "zeta"]}), tmp_path / "c.parquet", row_group_size=2)
    return tmp_path


def test_every_format_compression_and_way_to_name_files(folder: Path) -> None:
    everything = [*map(Piece, range(5), ["alpha\n\nbeta\n", "gámma", "delta", "epsilon", "zeta"])]
    assert list(pieces(str(folder), 0)) == everything
    assert list(pieces(f"{folder}/*.*", 0)) == everything
    assert list(pieces(f"file://{folder}/b.jsonl.gz", 0)) == [(0, "gámma"), (1, "delta")]


def test_text_is_read_from_object_stores(s3_url: str) -> None:
    files.write_atomic(f"{s3_url}/one.txt", b"one")
    files.write_atomic(f"{s3_url}/two.txt", b"two")
    assert list(pieces(f"{s3_url}/*.txt", 0)) == [(0, "one"), (1, "two")]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 300 + "\n\n"
    (tmp_path / "long.txt").write_text(paragraph * 20)
    docs, texts = zip(*pieces(f"{tmp_path}/long.txt", 0), strict=True)
    assert set(docs) == {0}
    assert "".join(texts) == paragraph * 20
    assert all(TXT_CHARACTERS < len(text) < TXT_CHARACTERS + 2 * len(paragraph) for text in texts[:-1])
    (tmp_path / "lines.txt").write_text("a line without a blank one after it\n" * 3000)
    docs, texts = zip(*pieces(f"{tmp_path}/l*.txt", 0), strict=True)
    assert set(docs) == {0, 1}
    assert docs.count(0) > 2
    assert max(map(len, texts)) < TXT_CHARACTERS_MOST + 100


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "fine"}\n{"body": "not"}\n', r"x\.jsonl, line 2: no field 'text'"),
        ("x.jsonl", b'{"text": 3}\n', r"x\.jsonl, line 1: the field 'text' holds a number, not a string"),
        ("x.jsonl", b'\n{"text": ["a"]}\n', r"x\.jsonl, line 2: the field 'text' holds a list, not a string"),
        ("x.jsonl", b'"text"\n', r"x\.jsonl, line 1: a string where an object with a field 'text' should be"),
        ("x.jsonl", b'{"text": "fine"}\n{"text\n', r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a", "text": "b"}\n', r"x\.jsonl, line 1: not JSON \(the key 'text' stands twice\)"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: not JSON"),
        ("x.json", b'[{"text": "a"},\n{"text": null},\n{"txt": "b"}]', r"x\.json, entry 3: .* --text-column txt"),
        ("x.jsonl", b'{"messages": [], "n": 1}\n', r"line 1: no field 'text'; it has messages, n, and no text in any"),
        ("x.json", b'[\n{"text": "a"},\n', r"x\.json, line 3: not JSON"),
        ("x.json", b'{"text": "a",\n "n": }', r"x\.json, line 2: not JSON"),
        ("x.txt", b"fine\n\xff\xfe\n", r"x\.txt, line 2: not UTF-8"),
        ("x.txt", "fine".encode("utf-16-le"), r"x\.txt: no UTF-8 text \(is it binary, or UTF-16 without"),
        ("x.txt", "\ufefffine\n".encode("utf-16-le") + b"\x00\xd8", r"x\.txt, after line \d: not UTF-16"),
        ("x.txt", b"PK\x03\x04 and more", r"x\.txt: is a zip archive; unpack it"),
        ("x.txt.gz", b"not gzip at all", r"x\.txt\.gz: is not what \.gz says"),
        ("x.txt.gz", gzip.compress(b"a line\n" * 99, mtime=0)[:-9], r"x\.txt\.gz: cannot be read"),
        ("x.parquet", b"not parquet at all", r"x\.parquet: cannot be read"),
        ("x.parquet.gz", b"any", r"x\.parquet\.gz: Parquet compresses by itself .*; unpack the file"),
        ("x.jsonl", b"PAR1\x15\x04and more", r"x\.jsonl: is a Parquet file; give it a name that ends in \.parquet"),
        ("x.csv", b"text\rfine\r\xff\r", r"x\.csv, after line \d: not UTF-8"),
        ("x.parquet", b"", r"x\.parquet: cannot be read"),
        ("x.csv", b"a,b\n", r"x\.csv: no column 'text'; it has a, b: name the one .* --text-column NAME"),
        ("x.csv", b"id,Text\n1,a\n", r"x\.csv: no column 'text'; .* --text-column Text"),
        ("x.csv", b"id,text\n1,a\n2,b, c\n", r"x\.csv, line 3: 3 fields where the header has 2; quote"),
        ("x.csv", b'id,text\n1,a\n2,"b\nc\n', r"x\.csv, line 3: not CSV"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv: 2 columns are called 'text'"),
        ("x.pdf", b"%PDF", r"x\.pdf: no format of a corpus: it must be \.txt, \.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SaescaleError, match=said) as caught:
        list(pieces(f"{tmp_path}/{name}", 0))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(SaescaleError, match=r"x\.parquet: no column 'text'; it has body: .* --text-column body"):
        list(pieces(str(tmp_path), 0))
    assert list(pieces(str(tmp_path), 0, "body")) == [(0, "x")]
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "x.parquet")
    with pytest.raises(
        SaescaleError,
        match=r"x\.parquet: the column 'text' holds int64, no text; it has body, text: .* --text-column body",
    ):
        list(pieces(str(tmp_path), 0))
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff"])}), tmp_path / "x.parquet")
    with pytest.raises(SaescaleError, match=r"x\.parquet, row 1 \(from 0\): the text is not UTF-8"):
        list(pieces(str(tmp_path), 0))


@pytest.mark.parametrize(
    ("name", "content", "passed"),
    [
        ("empty.jsonl", "", ""),
        ("blank.txt", " \n\n\t\n", ""),
        ("blank.csv", "id,text\n1, \n", ""),
        ("null.jsonl", '{"text": null}\n' * 3, r"; texts that are null, passed over: 3 \(the first: .*, line 1\)"),
    ],
)
def test_a_corpus_without_text_is_told_before_anything_is_loaded(
    tmp_path: Path, name: str, content: str, passed: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SaescaleError, match=rf"holds no text: 1 file, of empty or blank texts{passed}$"):
        check_corpus(str(tmp_path))
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    if not name.endswith(".csv"):  # beside .jsonl, what describes it
        check_corpus(str(tmp_path))  # and reads no further


def test_a_parquet_file_of_nulls_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(SaescaleError, match=r"holds no text: 1 file, .*; texts that are null, passed over: 2"):
        check_corpus(f"{tmp_path}/x.parquet")


def test_the_name_of_a_data_set_is_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaescaleError, match=r"hub download the files, or give 'hf://datasets/org/some-name\.v1/\*\*/"):
        check_corpus("org/some-name.v1")
    for path in ("here/x.jsonl", "a/b/c", "/org/name", "org"):
        with pytest.raises(SaescaleError, match=r"or 'python-prose'$"):
            check_corpus(path)


def test_no_match_is_told_before_anything_is_read(tmp_path: Path) -> None:
    for corpus in ("python-pros", f"{tmp_path}/*.txt", str(tmp_path)):
        with pytest.raises(SaescaleError, match="no text file matches"):
            pieces(corpus, 0)
    with pytest.raises(SaescaleError, match="has no name"):
        pieces(" ", 0)  # not all that lies here
