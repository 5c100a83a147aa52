"""Documents as they are read back: what is missing, damaged and newer are three things; no size is believed."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import BaseModel

from saescale.storage.documents import json_bytes, read_json, read_model, read_table, read_yaml, table_bytes
from saescale.storage.errors import Damaged, Newer, SaescaleError


class Kind(BaseModel):
    format: int
    rows: int


def put(folder: Path, content: bytes | str) -> str:
    path = folder / "document"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_missing_damaged_and_newer_are_three_things(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(str(tmp_path / "nowhere"), "restore it")
    for content, reason in (
        ("", "it is empty"),
        ('{"format": 1, "rows"', "Expecting"),
        (b"\x80{", "decode"),
        ("[1]", "it holds no object"),
        ('{"rows": 1}', "it has no format"),
        ('{"format": "new", "rows": 1}', "its format is no number"),
        ('{"format": 1, "rows": "many"}', "rows: Input should be a valid integer"),
        ('{"format": 1, "rows": 1, "rows": 2}', "the key 'rows' stands twice"),
        ('{"format": 1, "rows": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "recursion"),
    ):
        with pytest.raises(Damaged, match=rf"document is damaged \(.*{reason}.*\); restore it$"):
            read_model(put(tmp_path, content), Kind, "restore it", newest=1)
    with pytest.raises(Newer, match="has format 2, this saescale reads up to 1; upgrade saescale"):
        read_model(put(tmp_path, '{"format": 2, "other": 1}'), Kind, "restore it", newest=1)


def test_an_altered_number_is_noticed(tmp_path: Path) -> None:
    written = json_bytes({"nmse": 0.25, "text": "ü", "nothing": float("nan"), "many": [1, 2e300]})
    assert read_json(put(tmp_path, written), "") == {"nmse": 0.25, "text": "ü", "nothing": None, "many": [1, 2e300]}
    with pytest.raises(Damaged, match="its checksum is another"):
        read_json(put(tmp_path, written.replace(b"0.25", b"0.35")), "")


def test_every_altered_byte_of_a_table_is_noticed_or_harmless(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(50)), "b": [f"text {i}" for i in range(50)]})
    content = table_bytes(table)
    for at in range(0, len(content), 17):
        altered = bytearray(content)
        altered[at] ^= 4
        found = table
        with suppress(Damaged):
            found = read_table(put(tmp_path, bytes(altered)), table.schema, "make it again")
        assert found.equals(table)


def bomb(depth: int) -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: a\ngrid:\n  k: [2]\n  n: 3\n  k: [4]\n", "the key k stands in line 3 and again in line 5: keep one"),
        ("{k: 1, k: 2}", "the key k stands in line 1 and again in line 1"),
        (bomb(9), "aliases stand for more than"),
        ("a: &a [*a]", "the anchor of line 1 holds itself"),
        ("[" * 1_000_000, "nested more than 100 deep"),
        ("- " * 1_000_000, "nested more than 100 deep"),
        ("a: !!int x", "invalid literal"),
        ("a: 2001-99-99", "month must be"),
        ("a: !!bool maybe", "not of its kind"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: [", "parsing"),
        (b"a: \xff", "utf-?8|invalid"),
        ("a: 1\x00", "control characters"),
        ("a: " + "1" * 5000, "digits"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_yaml_that_is_none_is_one_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    where = put(tmp_path, content)
    with pytest.raises(SaescaleError, match=rf"(?i)document is not valid YAML: .*{said}.*; correct it$") as caught:
        read_yaml(where)
    assert "\n" not in str(caught.value)
    with pytest.raises(Damaged, match=r"document is damaged \(.*\); restore it$"):
        read_yaml(where, "restore it")


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    text = "base: &base {k: [2, 4], n: 8}\nother:\n  <<: *base\n  n: 16\nagain: *base\n1: one\n'1': text\n"
    base = {"k": [2, 4], "n": 8}
    expected = {"base": base, "other": {"k": [2, 4], "n": 16}, "again": base, 1: "one", "1": "text"}
    assert read_yaml(put(tmp_path, text)) == expected
    assert read_yaml(put(tmp_path, json.dumps({"a": [[[]]]}))) == {"a": [[[]]]}
    assert read_yaml(put(tmp_path, "")) is None
