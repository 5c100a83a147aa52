"""Corpora as users have them: any format, encoding, compression and way to name one gives its texts, or one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.trainers.harvest import make_shard
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.subjects.texts.text import Piece, pieces

TEXTS = ["alpha\n\nbeta", 'gämma, "quoted"\tand; more', "delta\x00 \U0001f600"]


def zst(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return bytes(out.getvalue())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst
}  # fmt: skip


def as_lines(texts: list[str | None]) -> str:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))


def as_array(texts: list[str | None]) -> str:
    return json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False)


def as_csv(texts: list[str | None], separator: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([("id", " text"), *((n, text) for n, text in enumerate(texts))])
    return out.getvalue()


def as_parquet(kind: pa.DataType) -> Callable[[list[str | None]], bytes]:
    def write(texts: list[str | None]) -> bytes:
        coded = [None if text is None else text.encode() for text in texts]
        column = pa.array(coded, pa.binary()) if kind == pa.binary() else pa.array(texts, pa.string()).cast(kind)
        out = io.BytesIO()
        pq.write_table(pa.table({"id": range(len(texts)), "text": column}), out, row_group_size=2)
        return out.getvalue()

    return write


AS_TEXT: dict[str, Callable[[list[str | None]], str]] = {
    "x.jsonl": as_lines, "X.NDJSON": as_lines, "x.json": as_array, "array.jsonl": as_array, "x.csv": as_csv,
    "semicolon.csv": lambda texts: as_csv(texts, ";"), "x.tsv": lambda texts: as_csv(texts, "\t"),
}  # fmt: skip
PARQUET = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


def read(corpus: object, **options: Any) -> list[str]:
    """The texts of all documents, each put together again."""
    whole: dict[int, str] = {}
    for doc, text in pieces(str(corpus), 0, **options):
        whole[doc] = whole.get(doc, "") + text
    assert list(whole) == list(range(len(whole)))
    return list(whole.values())


def texts_or_line(corpus: object) -> list[str] | str:
    try:
        return read(corpus)
    except SaescaleError as error:
        return str(error)


@pytest.mark.parametrize("name", AS_TEXT)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_text_format_in_every_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    file = tmp_path / name
    file.write_bytes(AS_TEXT[name](list(TEXTS)).encode(encoding))
    assert read(file) == TEXTS


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", [*AS_TEXT, "x.txt"])
def test_lines_that_end_in_a_carriage_return_alone(tmp_path: Path, name: str, encoding: str, end: str) -> None:
    texts: list[str | None] = ["one\n", 'gämma, "quoted"'] if "sv" in name else ["one", "gämma"]
    content = AS_TEXT[name](texts) if name in AS_TEXT else "one\n\ngämma\n"
    content = content.replace("\r\n", "\n").replace("\n", "\r")
    (tmp_path / f"{name}{end}").write_bytes(COMPRESS[end](content.encode(encoding)))
    assert read(tmp_path / f"{name}{end}") == (texts if name in AS_TEXT else ["one\n\ngämma\n"])


def test_numbers_beside_a_text_may_have_any_length(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "n": {"9" * 6000}}}\n')
    assert read(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", PARQUET, ids=str)
def test_every_kind_of_text_in_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "x.Parquet").write_bytes(as_parquet(kind)([*TEXTS, None]))
    with pytest.warns(
        SaescaleWarning, match=r"texts that are null, passed over: 1 \(the first: .*, row 3 \(from 0\)\)"
    ):
        assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("end", COMPRESS)
def test_every_compression_by_its_name_in_any_case_and_most_without(tmp_path: Path, end: str) -> None:
    content = COMPRESS[end](b"a\r\n\r\nb\n")
    (tmp_path / f"X.TXT{end.upper()}").write_bytes(content)
    assert read(tmp_path) == ["a\n\nb\n"]
    if end != ".bz2":  # a text may begin like one
        (tmp_path / "y.txt").write_bytes(content)
        assert read(tmp_path / "y.txt") == ["a\n\nb\n"]
    if end:
        (tmp_path / f"empty.txt{end}").write_bytes(b"")
        assert read(tmp_path / f"empty.txt{end}") == []
    (tmp_path / f"two.jsonl{end}").write_bytes(b"".join(COMPRESS[end](as_lines([text]).encode()) for text in "ab"))
    assert read(tmp_path / f"two.jsonl{end}") == ["a", "b"]  # as tools for many processors write them


def test_names_are_taken_as_they_are_before_they_are_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "part [1]"
    folder.mkdir()
    for name in ("b[1].txt", "b1.txt", "what?.txt", "star*.txt"):
        (folder / name).write_text(name)
        assert read(folder / name) == [name]
    assert read(f"{folder}/b*.txt") == ["b1.txt", "b[1].txt"]
    assert read(f"{tmp_path}/part*/b[[]1].txt") == ["b[1].txt"]
    assert len(read(folder)) == 4
    (folder / "link.txt").symlink_to(folder / "b1.txt")
    (folder / "folder.txt").mkdir()
    assert read(folder / "link.txt") == ["b1.txt"]
    assert read(f"{tmp_path}/*/[fl]*.txt") == ["b1.txt"]
    os.mkfifo(folder / "pipe.txt")
    with pytest.warns(SaescaleWarning, match=r"no file .* was not read: 1 \(the first: .*pipe\.txt\)"):
        assert len(read(folder)) == 5
    with pytest.raises(SaescaleError, match=r"pipe\.txt: neither a file nor a folder"):
        read(folder / "pipe.txt")  # and does not wait for somebody who writes


def test_of_a_folder_hidden_files_are_not_read_and_what_else_is_not_is_said(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".b.jsonl", "._c.jsonl", ".cache/d.jsonl", "deep/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(as_lines([name]))
    assert read(tmp_path) == ["a.jsonl", "deep/e.jsonl"]
    for name in ("README.md", "info.json", "meta.csv"):
        (tmp_path / name).write_text("no text of a corpus")
    with pytest.warns(SaescaleWarning, match=r"not read, being of another format: 3 \(the first: .*README\.md\)"):
        assert read(tmp_path) == ["a.jsonl", "deep/e.jsonl"]
    with pytest.raises(SaescaleError, match=r"README\.md: no format of a corpus"):
        read(f"{tmp_path}/*")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "x.csv").write_text("text\nf\n")
    assert read(tmp_path / "alone") == ["f"]


def test_one_rule_for_null_and_for_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"text": "a\\ud800b"}\n{"text": null}\n{"text": ""}\n{"text": "\\ud83d\\ude00"}\n'
    )
    with pytest.warns(SaescaleWarning) as said:
        assert read(tmp_path) == ["a\ufffdb", "\U0001f600"]
    assert [str(each.message).partition(": ")[2] for each in said] == [
        f"texts with halves of surrogate pairs, read as U+FFFD: 1 (the first: {tmp_path}/x.jsonl, line 1)",
        f"texts that are null, passed over: 1 (the first: {tmp_path}/x.jsonl, line 2)",
    ]


def test_a_column_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": null, "body": "a"}\n')
    (tmp_path / "y.csv").write_text("body;n\nb;1\n")
    assert read(tmp_path / "x.jsonl", column="body") == ["a"]
    assert read(tmp_path / "y.csv", column="body") == ["b"]


# --- long documents, cut


def test_long_documents_are_cut_between_words_and_equal_ones_alike(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(3_000)) + " " + "x" * 250
    (tmp_path / "a.txt").write_text(text)  # one line
    (tmp_path / "b.jsonl").write_text(as_lines([text.replace(" ", " \n\n ")]))
    found = list(pieces(str(tmp_path), 0, cut=100))
    assert [doc for doc, _ in found] == list(range(len(found)))
    half = len(found) // 2
    parts, again = ([text for _, text in part] for part in (found[:half], found[half:]))
    assert "".join(parts) == text
    assert [part.split() for part in parts] == [part.split() for part in again]
    assert all(50 < len(" ".join(part.split())) <= 100 for part in parts[:-1])
    assert list(pieces(f"{tmp_path}/a.txt", 0)) == [Piece(0, text)]


def test_one_long_line_suffices_when_it_is_cut(tiny_subject: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(f"chapter {number} of a book" for number in range(400)))
    spec = HarvestSpec.model_validate(
        {
            "subject": tiny_subject, "layer": 0, "corpus": f"{tmp_path}/book.txt", "out": f"{tmp_path}/store",
            "tokens": 512, "heldout_tokens": 128, "context_length": 32, "row_group_rows": 128,
        }
    )  # fmt: skip
    with pytest.raises(SaescaleError, match=r"split is by document, .* or cut long ones \(--cut-documents 2000\)"):
        harvest(spec)
    manifest = harvest(spec.model_copy(update={"cut_documents": 200}))
    assert (manifest.documents_cut, manifest.split_by) == (200, "content")
    split = {name: pq.read_table(Path(spec.out) / f"{name}-00000.parquet") for name in ("train", "heldout")}
    docs = {name: set(table["doc"].to_pylist()) for name, table in split.items()}
    assert not docs["train"] & docs["heldout"]
    with pytest.raises(SaescaleError, match="another harvest: cut_documents is 200 there, None here"):
        harvest(spec)


# --- any corpus

any_text = st.text(
    st.characters(codec="utf-8") | st.sampled_from(list(' \n\r\t",;|[]{}\\\x00\ufeff\u2028\x85')), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.none() | any_text, max_size=6),
    name=st.sampled_from([*AS_TEXT, *map(str, range(len(PARQUET)))]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(list(COMPRESS)),
    damage=st.none() | st.tuples(st.integers(0, 2**16), st.integers(0, 255)),
)
def test_any_corpus_gives_its_texts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    name: str,
    encoding: str,
    end: str,
    damage: tuple[int, int] | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    if name.isdigit():
        name, content = "x.parquet", as_parquet(PARQUET[int(name)])(texts)
    else:
        content = COMPRESS[end](AS_TEXT[name](texts).encode(encoding))
        name += end
    if damage is not None and content:
        at = damage[0] % len(content)
        content = content[:at] + bytes([damage[1]]) + content[at + 1 :]
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaescaleWarning)
        found = texts_or_line(folder)
    if isinstance(found, str):
        assert damage is not None, found
        assert "\n" not in found
        assert str(folder) in found
    elif damage is None:
        # A line's end is one character, wherever it stands in a file that is read line by line.
        one_end = "csv" in name or "tsv" in name
        wanted = [text.replace("\r\n", "\n") if one_end else text for text in texts if text and text.strip()]
        assert found == wanted


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.none() | any_text, max_size=12), cut=st.none() | st.integers(1, 9), lone=st.booleans())
def test_any_corpus_makes_a_store_of_its_texts_or_one_line(
    tiny_subject: str,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    cut: int | None,
    lone: bool,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "x.jsonl").write_text(as_lines([*texts, "half \ud83d of a pair"] if lone else texts))
    given = {"subject": tiny_subject, "layer": 0, "corpus": f"{folder}/x.jsonl", "out": f"{folder}/store"}
    sizes = {"tokens": 16, "heldout_tokens": 8, "context_length": 4, "row_group_rows": 8, "cut_documents": cut}
    subject = get_subject(tiny_subject)
    with patch.object(make_shard, "get_subject", lambda *_, **__: subject), warnings.catch_warnings():
        warnings.simplefilter("ignore", SaescaleWarning)
        documents = [(doc, text) for doc, text in pieces(given["corpus"], 0, cut=cut)]
        try:
            harvest(HarvestSpec.model_validate(given | sizes))
        except SaescaleError as error:
            said = str(error)
        else:
            said = ""
    assert said == "" or ("is too short" if documents else "holds no text") in said
    assert "\n" not in said
    if not said:
        tokens = subject.tokenize(text.rstrip() + "\n\n" for _, text in documents)  # type: ignore[attr-defined]
        split = {name: pq.read_table(folder / "store" / f"{name}-00000.parquet") for name in ("train", "heldout")}
        assert {name: table.num_rows for name, table in split.items()} == {"train": 16, "heldout": 8}
        docs = {name: set(table["doc"].to_pylist()) for name, table in split.items()}
        assert not docs["train"] & docs["heldout"]
        for table in split.values():
            for doc, token in zip(table["doc"].to_pylist(), table["token"].to_pylist(), strict=True):
                assert token in tokens[doc]
