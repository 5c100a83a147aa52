"""Small activation stores of known content, on every kind of file system."""

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saescale.storage.manifest import Manifest, Site, write_manifest
from saescale.storage.rows import Rows, write_shard
from saescale.storage.store import ActivationStore

BuildStore = Callable[..., ActivationStore]


def numbered_rows(first: int, count: int, d_model: int, dtype: str) -> np.ndarray:
    """Rows [count, d_model] whose first two columns spell their number: every row of a store is unique."""
    number = np.arange(first, first + count)
    act = np.full((count, d_model), 0.5, np.float32)  # no number: a row of equal values is refused
    act[:, 0], act[:, 1] = number // 128, number % 128
    if dtype == "bfloat16":  # integers below 256 are exact in bfloat16, the upper half of a float32
        return (act.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return act.astype(np.float16)


def build(
    url: str,
    *,
    train: tuple[int, ...] = (40, 24),
    heldout: tuple[int, ...] = (16,),
    d_model: int = 4,
    dtype: str = "float16",
    row_group_rows: int = 8,
) -> ActivationStore:
    """A sealed store at `url` with shards of these sizes; row numbers start at 0 in each split."""
    shards = []
    for split, sizes in (("train", train), ("heldout", heldout)):
        first = 0
        for number, size in enumerate(sizes):
            token = np.arange(first, first + size, dtype=np.int32)
            rows = Rows(numbered_rows(first, size, d_model, dtype), token, token.astype(np.int16), token)
            name = f"{split}-{number:05d}.parquet"
            shards.append(write_shard(url, name, split, rows, dtype, row_group_rows))
            first += size
    manifest = Manifest(
        subject="synthetic",
        fingerprint="0",
        site=Site(layer=1, hook="resid_post", positions="all but BOS"),
        d_model=d_model,
        dtype=dtype,
        context_length=64,
        dropped=["BOS"],
        corpus="numbers",
        seed=0,
        row_group_rows=row_group_rows,
        shards=shards,
        mean=[0.0] * d_model,
        mean_square=1.0,
        created_with={"numpy": np.__version__},
    )
    write_manifest(url, manifest)
    return ActivationStore.open(url)


@pytest.fixture(scope="session")
def build_store() -> BuildStore:
    """Builds a small sealed store: build_store(url, train=(40, 24), dtype="float16", ...)."""
    return build


@pytest.fixture(params=["file", "memory", "s3"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh prefix on each kind of file system in turn."""
    if request.param == "file":
        return str(tmp_path / "below" / "here")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    url: str = request.getfixturevalue("s3_url")
    return url
