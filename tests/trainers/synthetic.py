"""Synthetic activation stores whose dictionary is known."""

import numpy as np

from saescale.storage.manifest import Manifest, Site, write_manifest
from saescale.storage.rows import Rows, write_shard

D_MODEL, N_TRUE, ACTIVE = 32, 64, 3


def true_dictionary() -> np.ndarray:
    """Unit rows [N_TRUE, D_MODEL]."""
    rows = np.random.default_rng(7).normal(size=(N_TRUE, D_MODEL))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sparse_rows(count: int, seed: int) -> np.ndarray:
    """Sums of ACTIVE true directions with coefficients in [0.5, 1.5], float16 [count, D_MODEL]."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((count, N_TRUE)), axis=1)[:, :ACTIVE]
    z = np.zeros((count, N_TRUE))
    np.put_along_axis(z, chosen, rng.uniform(0.5, 1.5, chosen.shape), axis=1)
    return (z @ true_dictionary()).astype(np.float16)


def write_store(url: str, train: np.ndarray, heldout: np.ndarray, row_group_rows: int = 1024, layer: int = 0) -> str:
    shards = []
    for split, act in (("train", train), ("heldout", heldout)):
        count = len(act)
        rows = Rows(act, np.zeros(count, np.int32), np.ones(count, np.int16), np.arange(count, dtype=np.int32))
        shards.append(write_shard(url, f"{split}-00000.parquet", split, rows, "float16", row_group_rows))
    write_manifest(
        url,
        Manifest(
            format=1,
            subject="synthetic",
            fingerprint="0",
            site=Site(layer=layer, hook="resid_post", positions="all"),
            d_model=train.shape[1],
            dtype="float16",
            context_length=64,
            dropped=[],
            corpus="none",
            seed=0,
            row_group_rows=row_group_rows,
            shards=shards,
            mean=train.astype(np.float64).mean(axis=0).tolist(),
            mean_square=float(np.square(train.astype(np.float64)).mean()),
            created_with={},
        ),
    )
    return url
