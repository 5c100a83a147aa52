"""Tensors in several files with an index: what others read, any other cut, damage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import load_torch_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from saescale.storage import sharded
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.tensors import BYTES, Part, Tensors, write_tensors

WHOLE = {
    "W": np.arange(70, dtype=np.float32).reshape(10, 7),
    "V": -np.arange(40, dtype=np.float32).reshape(10, 4),
    "b": np.arange(10, dtype=np.float32),
    "n": np.float32(3.5),
}


def stored(folder: Path) -> Tensors:
    return Tensors(str(folder), [write_tensors(str(folder), "one.safetensors", WHOLE, {"cell": "x"})])


def found(url: Path) -> Tensors:
    return sharded.read_index(str(url)).tensors(str(url))


def assert_whole(tensors: Tensors) -> None:
    assert set(tensors) == set(WHOLE)
    for name, expected in WHOLE.items():
        np.testing.assert_array_equal(tensors[name], expected, strict=True)


@pytest.mark.parametrize("most", [4, 100, 150, 281, 10**6])
def test_any_cut_holds_the_same_and_is_cut_again(tmp_path: Path, most: int) -> None:
    wrote = sharded.copy(stored(tmp_path), str(tmp_path / "a" / "sae.safetensors"), {"cell": "x"}, most)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(Path(url).name for url in wrote)
    if most == 10**6:
        assert [Path(url).name for url in wrote] == ["sae.safetensors"]
        return
    index = tmp_path / "a" / "sae.safetensors.index.json"
    assert wrote[-1] == str(index)
    tensors = found(index)
    assert_whole(tensors)
    np.testing.assert_array_equal(tensors.rows("W", slice(3, 8)), WHOLE["W"][3:8])
    # By the library's own reader, file by file.
    document = json.loads(index.read_text())
    assert document["metadata"] == {"total_size": sum(t.nbytes for t in WHOLE.values()), "cell": "x"}
    for key, name in document["weight_map"].items():
        tensor, _, cut = key.partition("[")
        rows = slice(*map(int, cut.rstrip("]").split(":"))) if cut else ...
        np.testing.assert_array_equal(load_file(tmp_path / "a" / name)[key], WHOLE[tensor][rows])
    # Over what was there: nothing of it stays.
    for again in (90, None):
        sharded.copy(tensors, str(tmp_path / "b" / "sae.safetensors"), {"cell": "x"}, again)
        names = [path.name for path in (tmp_path / "b").iterdir()]
        assert len(names) == (1 if again is None else len(set(names)) > 1 and len(names)), names
    assert_whole(Tensors(str(tmp_path / "b"), [Part(file="sae.safetensors", bytes=_size(tmp_path / "b"), xxh3="")]))


def _size(folder: Path) -> int:
    return (folder / "sae.safetensors").stat().st_size


def test_another_library_reads_it_where_no_tensor_is_cut(tmp_path: Path) -> None:
    sharded.copy(stored(tmp_path), str(tmp_path / "model.safetensors"), {}, 300)
    module = torch.nn.Module()
    for name, array in WHOLE.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(array.shape)))
    assert len(list(tmp_path.glob("model-*"))) == 2
    load_torch_model(module, tmp_path, strict=True)
    for name, array in WHOLE.items():
        np.testing.assert_array_equal(getattr(module, name).detach().numpy(), array)


def test_what_another_library_wrote_is_read(tmp_path: Path) -> None:
    """Without sizes and checksums, and several pieces of a tensor in one file, in any order."""
    save_file({"W[6:10]": WHOLE["W"][6:], "W[0:2]": WHOLE["W"][:2], "b": WHOLE["b"]}, tmp_path / "x.safetensors")
    save_file({"W[2:6]": WHOLE["W"][2:6]}, tmp_path / "y.safetensors")
    where = {"W[6:10]": "x", "W[0:2]": "x", "b": "x", "W[2:6]": "y"}
    index = tmp_path / "sae.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{name}.safetensors" for key, name in where.items()}}))
    np.testing.assert_array_equal(found(index)["W"], WHOLE["W"])


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5), most=st.integers(1, 600)
)  # fmt: skip
def test_each_row_lies_in_one_file_and_none_is_larger_than_asked(shapes: list[list[int]], most: int) -> None:
    entries = {f"t{i}": ("F32", shape) for i, shape in enumerate(shapes)}
    seen: dict[str, list[int]] = {name: [] for name in entries}
    files = sharded.planned(entries, most)
    for pieces in files:
        size = 0
        for piece in pieces:
            seen[piece.tensor] += range(piece.first, piece.last)
            size += (piece.last - piece.first) * math.prod(entries[piece.tensor][1][1:]) * BYTES["F32"]
        one_row = len(pieces) == 1 and pieces[0].last - pieces[0].first == 1
        assert size <= most or one_row
    assert seen == {name: list(range(shape[0] if shape else 1)) for name, (_, shape) in entries.items()}


@pytest.mark.parametrize("most", [None, 100])
def test_a_damaged_index_is_written_anew(tmp_path: Path, most: int | None) -> None:
    url, index = str(tmp_path / "a" / "sae.safetensors"), tmp_path / "a" / "sae.safetensors.index.json"
    sharded.copy(stored(tmp_path), url, {}, 100)
    index.write_text('{"x')
    made = sharded.copy(stored(tmp_path), url, {}, most)
    assert index.exists() == (str(index) in made) == (most is not None)
    if most is not None:
        assert_whole(found(index))


def test_damage_is_named_by_whom_it_concerns(tmp_path: Path) -> None:
    sharded.copy(stored(tmp_path), str(tmp_path / "sae.safetensors"), {}, 100)
    index = tmp_path / "sae.safetensors.index.json"
    path = tmp_path / "sae-00004-of-00007.safetensors"  # W[9:10] and the first rows of V
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    read = sharded.read_index(str(index))
    np.testing.assert_array_equal(read.tensors(str(index), slice(6, 9)).rows("W", slice(6, 9)), WHOLE["W"][6:9])
    for rows in (None, slice(9, 10)):
        with pytest.raises(Damaged, match=f"{path.name} has a wrong checksum"):
            read.tensors(str(index), rows)
    path.unlink()
    with pytest.raises(Damaged, match=f"{path.name} is missing"):
        found(index)
    index.write_text(index.read_text().replace("total_size", "size"))
    with pytest.raises(Damaged, match="was changed after it was written"):
        found(index)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"weight_map": {"W": "../x.safetensors"}}', r"names '\.\./x\.safetensors', which is no file with tensors"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"W[1:3]": "x.safetensors"}}', "lacks rows of the tensor W"),
        ('{"weight_map": {"W": "z.safetensors"}}', "z.safetensors is missing"),
    ],
)
def test_an_index_that_is_none_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    save_file({"W[1:3]": WHOLE["W"][1:3]}, tmp_path / "x.safetensors")
    index = tmp_path / "sae.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(Damaged, match=said):
        found(index)


def test_more_files_than_can_be_numbered_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "MOST", 5)
    with pytest.raises(SaescaleError, match="files of at most 4 bytes would be more than 5; give a larger size"):
        sharded.copy(stored(tmp_path), str(tmp_path / "sae.safetensors"), {}, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
