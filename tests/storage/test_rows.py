"""Rows: which no SAE can use, and what is refused when a shard is written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saescale.storage.errors import SaescaleError
from saescale.storage.rows import find_bad_row, to_float32, write_shard
from saescale.storage.store import ActivationStore
from tests.storage.small_rows import rows_of, varied

BuildStore = Callable[..., ActivationStore]


@settings(max_examples=60, deadline=None)
@given(
    bits=hnp.arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 6))),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
def test_bad_rows_are_those_that_the_values_show(bits: np.ndarray, dtype: str) -> None:
    act = bits.view(np.float16) if dtype == "float16" else bits
    values = to_float32(act, dtype)
    if dtype == "bfloat16":
        exact = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
        assert np.array_equal(values, exact, equal_nan=True)
    bad = ~np.isfinite(values).all(axis=1) | (values == values[:, :1]).all(axis=1)
    found = find_bad_row(act, dtype)
    assert (found[0] if found else None) == (int(bad.argmax()) if bad.any() else None)


def test_a_bad_row_far_into_a_large_block_is_found() -> None:
    act = varied(300_000, 8)
    act[299_999, 3] = np.inf
    assert find_bad_row(act, "float16") == (299_999, "NaN or Inf")


@pytest.mark.parametrize(
    ("value", "what"),
    [(np.nan, "NaN or Inf"), (-np.inf, "NaN or Inf"), (0, "zero norm;"), (7, "zero norm once its mean is subtracted")],
)
def test_bad_values_are_refused_when_written(tmp_path: Path, value: float, what: str) -> None:
    act = varied(20, 4)
    act[13] = value
    with pytest.raises(SaescaleError, match=rf"a\.parquet: row 13 \(row group 1\) has {what}"):
        write_shard(str(tmp_path), "a.parquet", "train", rows_of(act), "float16", 8)
    assert list(tmp_path.iterdir()) == []


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    act = varied(3, 4)
    with pytest.raises(ValueError, match="equal length"):
        write_shard(str(tmp_path), "a", "train", rows_of(act)._replace(doc=np.arange(2)), "float16", 8)
    with pytest.raises(ValueError, match="uint16"):
        write_shard(str(tmp_path), "a", "train", rows_of(act), "bfloat16", 8)
    with pytest.raises(pa.ArrowInvalid):
        write_shard(str(tmp_path), "a", "train", rows_of(act)._replace(pos=np.full(3, 70_000)), "float16", 8)
