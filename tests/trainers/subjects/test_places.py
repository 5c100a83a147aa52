"""Reading of a corpus that begins at a place which an earlier one noted: all that it would have given from there on."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.texts.text import corpus_digest, placed_pieces

# What is said of null texts is tried in test_corpora.py.
pytestmark = pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")

TEXTS = ["alpha beta\n\n  gamma", "   ", "délta " * 40, "one two three four " * 9, "αβγ\r\nδ", "x" * 90, "last"]


def _jsonl(folder: Path) -> None:
    for name, texts in (("a.jsonl", TEXTS[:3]), ("b.jsonl", TEXTS[3:])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / name).write_text("\n\n".join([*lines, '{"text": null}']) + "\n", "utf-8")


def _marked(folder: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(lines), "utf-8-sig")
    (folder / "b.jsonl").write_text("\n".join(lines), "utf-16")


def _packed(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in TEXTS).encode()))


def _arrays(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (folder / "b.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (folder / "c.json").write_text(json.dumps({"text": "of many lines"}, indent=1))


def _txt(folder: Path) -> None:
    paragraph = "Some words of prose, é and others, in a line.\n" * 3
    (folder / "a.txt").write_text((paragraph + "\n") * 200, "utf-8")
    (folder / "b.txt").write_bytes(b"\r\n\r\nshort\r\n")
    (folder / "c.txt").write_text((paragraph + "\n") * 130, "utf-8")


def _parquet(folder: Path) -> None:
    pq.write_table(pa.table({"text": [*TEXTS, None, *TEXTS]}), folder / "a.parquet", row_group_size=4)


def _csv(folder: Path) -> None:
    rows = "".join('"{}",1\n'.format(text.replace("\r", "")) for text in TEXTS)
    (folder / "a.csv").write_text("text,n\n" + rows, "utf-8")


@pytest.mark.parametrize("write", [_jsonl, _marked, _packed, _arrays, _txt, _parquet, _csv])
@pytest.mark.parametrize("cut", [None, 30])
def test_reading_goes_on_from_any_piece(tmp_path: Path, write: Callable[[Path], None], cut: int | None) -> None:
    write(tmp_path)
    whole = list(placed_pieces(str(tmp_path), 0, cut=cut))
    assert len(whole) >= 6
    for number in range(0, len(whole), 1 if len(whole) < 60 else 37):
        assert list(placed_pieces(str(tmp_path), 0, cut=cut, begin=whole[number][1])) == whole[number:]


def test_prose_goes_on_from_any_piece() -> None:
    whole = list(placed_pieces("python-prose", 3, cut=2_000))
    for number in (1, 500, len(whole) - 1):
        assert list(placed_pieces("python-prose", 3, cut=2_000, begin=whole[number][1])) == whole[number:]


def test_lines_before_the_place_are_not_read(tmp_path: Path) -> None:
    """What stands there may be anything, as long as lines end where they did."""
    _jsonl(tmp_path)
    (*_, (_, before), (last, place)) = placed_pieces(str(tmp_path), 0)
    (tmp_path / "a.jsonl").write_bytes(b"\xff")
    content = (tmp_path / "b.jsonl").read_bytes()
    byte = place.where.byte
    (tmp_path / "b.jsonl").write_bytes(b"\xff" * (byte - 1) + content[byte - 1 :])
    assert [piece for piece, _ in placed_pieces(str(tmp_path), 0, begin=place)] == [last]
    with pytest.raises(SaescaleError, match=r"b\.jsonl: no line begins at byte \d+ any more; restore the corpus"):
        list(placed_pieces(str(tmp_path), 0, begin=before))


def test_other_files_show(tmp_path: Path) -> None:
    _jsonl(tmp_path)
    before = corpus_digest(str(tmp_path))
    assert corpus_digest(f"{tmp_path}/*.jsonl") == before
    (tmp_path / "0.jsonl").write_text('{"text": "new"}\n')
    assert corpus_digest(str(tmp_path)) != before
