"""Rows for tests of shards."""

import numpy as np

from saescale.storage.rows import Rows


def rows_of(act: np.ndarray) -> Rows:
    number = np.arange(len(act), dtype=np.int32)
    return Rows(act, number, number.astype(np.int16), number)


def varied(rows: int, d_model: int) -> np.ndarray:
    """Sound rows: 1 to d_model each."""
    return np.tile(np.arange(1, d_model + 1, dtype=np.float16), (rows, 1))
