"""Checkpoints: exact round trips, damage that falls back or says so, and kills between any two file operations."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saescale.storage import checkpoint, files
from saescale.storage.errors import SaescaleError, SaescaleWarning


def tensors_of(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 5), step, np.float32), "count": np.arange(step, step + 4, dtype=np.int64)}


def check(url: str, step: int, wanted: int | None = None) -> None:
    tensors, meta, found = checkpoint.load(url, wanted)
    assert (found, meta) == (step, {"tokens": step * 10})
    for name, tensor in tensors_of(step).items():
        assert np.array_equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
        tensors[name][:] = 0


def test_the_newest_two_are_kept_on_every_file_system(any_url: str) -> None:
    url = files.join(any_url, "checkpoint")
    assert checkpoint.steps(url) == []
    with pytest.raises(SaescaleError, match=r"no checkpoint in .*steps there: none"):
        checkpoint.load(url)
    for step in (0, 5, 70):
        checkpoint.save(url, step, tensors_of(step), {"tokens": step * 10})
        check(url, step)
    assert checkpoint.steps(url) == [70, 5]
    check(url, 5, wanted=5)
    names = ["latest.json", "step-00000005.safetensors", "step-00000070.safetensors"]
    assert files.list_names(url) == names
    with pytest.raises(SaescaleError, match=r"no checkpoint of step 0 .*steps there: 70, 5"):
        checkpoint.load(url, 0)


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text("abc._", min_size=1),
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))
        ),
        max_size=3,
    ),
    transpose=st.booleans(),
)
def test_any_tensors_come_back_bit_for_bit(tensors: dict[str, np.ndarray], transpose: bool) -> None:
    if transpose:
        tensors = {name: tensor.T for name, tensor in tensors.items()}
    meta = {"rng": [2**63 - 1, 0], "nested": {"lr": 1e-3}, "loss": math.nan}
    checkpoint.save("memory://any-tensors", 1, tensors, meta)
    loaded, found, _ = checkpoint.load("memory://any-tensors")
    assert math.isnan(found.pop("loss"))
    assert found == {"rng": [2**63 - 1, 0], "nested": {"lr": 1e-3}}
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert loaded[name].tobytes() == tensor.tobytes()
        assert loaded[name].flags.writeable


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda content: content[:-1], "bytes, not"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "wrong checksum"),
        (None, "is missing"),
    ],
)
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: object, text: str) -> None:
    url = str(tmp_path)
    for step in (1, 2):
        checkpoint.save(url, step, tensors_of(step), {"tokens": step * 10})
    for step in (2, 1):
        path = tmp_path / f"step-{step:08d}.safetensors"
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(path.read_bytes()))
        if step == 2:
            with pytest.warns(UserWarning, match=rf"step-00000002\.safetensors .*{text}.*; going back"):
                check(url, 1)
            with pytest.raises(SaescaleError, match=text):
                checkpoint.load(url, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SaescaleError, match=r"no sound checkpoint in .*remove the folder"):
            checkpoint.load(url)


def test_going_back_replaces_what_came_after(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (5, 10, 8):
        checkpoint.save(url, step, tensors_of(step), {"tokens": step * 10})
    assert checkpoint.steps(url) == [8, 5]
    checkpoint.save(url, 8, tensors_of(9), {"tokens": 80})
    assert checkpoint.steps(url) == [8, 5]
    assert checkpoint.load(url)[0]["w"][0, 0] == 9
    assert len(files.list_names(url)) == 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours handles it."""


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_kill_between_any_two_operations_leaves_a_sound_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    step = 2 if again else 3
    for survived in range(5):
        url = str(tmp_path / f"{survived}")
        for earlier in (1, 2):
            checkpoint.save(url, earlier, tensors_of(earlier), {"tokens": earlier * 10})
        left = survived

        def count_down(original: object) -> object:
            def operation(*args: object) -> object:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original(*args)

            return operation

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomic", count_down(files.write_atomic))
            patch.setattr(files, "remove", count_down(files.remove))
            finished = True
            try:
                checkpoint.save(url, step, tensors_of(step), {"tokens": step * 10})
            except Killed:
                finished = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(url, step if survived >= 2 else 2)
        checkpoint.save(url, 4, tensors_of(4), {"tokens": 40})
        check(url, 4)
        assert len(files.list_names(url)) == 3, "what a killed save left is removed by the next one"
        if survived == 4:
            assert finished


def test_a_damaged_pointer_is_a_warning_and_no_checkpoint(tmp_path: Path) -> None:
    url = str(tmp_path)
    checkpoint.save(url, 1, tensors_of(1), {})
    (tmp_path / "latest.json").write_bytes(b'{"gen')
    with pytest.warns(SaescaleWarning, match=r"latest\.json is damaged"):
        assert checkpoint.steps(url) == []
    with pytest.warns(SaescaleWarning, match=r"latest\.json is damaged"):
        checkpoint.save(url, 1, tensors_of(2), {})
    assert checkpoint.steps(url) == [1]
    assert checkpoint.load(url)[0]["w"][0, 0] == 2
    assert len(files.list_names(url)) == 2


def test_folders_that_go_back_together_always_can(tmp_path: Path) -> None:
    """Killed twice while the folders of a pack were being saved, after the first of three each time."""
    urls = [str(tmp_path / name) for name in "abc"]

    def save(step: int, whole: int, folders: int) -> None:
        for url in urls[:folders]:
            checkpoint.save(url, step, tensors_of(step), {}, keep=whole)

    save(10, whole=0, folders=3)
    save(20, whole=10, folders=3)
    save(30, whole=20, folders=1)
    save(31, whole=20, folders=1)
    common = set.intersection(*(set(checkpoint.steps(url)) for url in urls))
    assert common == {20}
    save(33, whole=20, folders=3)
    save(40, whole=33, folders=3)
    assert [checkpoint.steps(url) for url in urls] == [[40, 33]] * 3


# --- what several processes share


def shared(step: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Tensors of a cell, and what each of three shards has of them: rows of two, and the first one all of `b`."""
    rng = np.random.default_rng(step)
    whole = {"W": rng.normal(size=(7, 3)).astype(np.float32), "n": rng.integers(0, 9, 7), "b": rng.normal(size=3)}
    cuts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    parts = [
        {"W": whole["W"][cut], "n": whole["n"][cut]} | ({"b": whole["b"]} if not cut.start else {}) for cut in cuts
    ]
    return whole, parts


def save_parts(url: str, step: int, turn: int = 0) -> dict[str, np.ndarray]:
    whole, tensors = shared(step)
    parts = [checkpoint.write_part(url, step, own, turn, shard, 3) for shard, own in enumerate(tensors)]
    checkpoint.commit(url, step, parts, {"tokens": step}, turn=turn)
    return whole


def test_parts_are_read_whole_and_by_rows(tmp_path: Path) -> None:
    url = str(tmp_path)
    save_parts(url, 1)
    checkpoint.save(url, 2, tensors_of(2), {})  # by one process, between two that were shared
    whole = save_parts(url, 3)
    tensors, meta, step = checkpoint.load(url)
    assert (step, meta, set(tensors)) == (3, {"tokens": 3}, set(whole))
    for name, expected in whole.items():
        np.testing.assert_array_equal(tensors[name], expected, strict=True)
    for first, last in ((0, 7), (0, 1), (2, 4), (4, 7), (3, 5)):
        own, _, _ = checkpoint.load(url, rows=slice(first, last))
        np.testing.assert_array_equal(own.rows("W", slice(first, last)), whole["W"][first:last], strict=True)
        np.testing.assert_array_equal(own["b"], whole["b"])
    with pytest.raises(SaescaleError, match="lacks rows 5 to 8 of the tensor W"):
        tensors.rows("W", slice(5, 8))
    # Two generations are kept, whatever number of files they have.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest.json", "step-00000002.safetensors",
        *(f"step-00000003-shard-{shard:05d}-of-00003.safetensors" for shard in range(3)),
    ]  # fmt: skip


def test_a_part_that_nobody_told_of_is_no_checkpoint(tmp_path: Path) -> None:
    """As when a process was killed while it, or another one, wrote."""
    url = str(tmp_path)
    save_parts(url, 1)
    checkpoint.write_part(url, 2, shared(2)[1][0], shard=0, shards=3)
    assert checkpoint.load(url)[2] == 1
    save_parts(url, 3)
    save_parts(url, 4)
    assert sorted({path.name[:13] for path in tmp_path.glob("step-*")}) == ["step-00000003", "step-00000004"]


def test_a_damaged_part_is_seen_by_whom_it_concerns(tmp_path: Path) -> None:
    url = str(tmp_path)
    save_parts(url, 1)
    whole = save_parts(url, 2)
    path = tmp_path / "step-00000002-shard-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    own, _, step = checkpoint.load(url, rows=slice(1, 5))
    assert step == 2
    np.testing.assert_array_equal(own.rows("W", slice(1, 5)), whole["W"][1:5])
    for rows in (None, slice(4, 6)):
        with pytest.warns(UserWarning, match="shard-00002-of-00003.safetensors has a wrong checksum; going back"):
            assert checkpoint.load(url, rows=rows)[2] == 1
