"""Sweeps of known law: cells of the published GPT-4 L(N, k), and curves that reach them."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.compute import topk_flops
from saescale.scaling.laws.forms.n_k import GPT4, N_K

D_MODEL = 4096
TOKENS = 8_000_000


def _cells(sizes: Iterable[int], ks: Iterable[int], noise: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of results.parquet on the grid sizes x ks, nmse from the published law with log-normal noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in sizes:
        for k in ks:
            law = N_K.value(GPT4, {"n_latents": np.array([n]), "k": np.array([k])})[0]
            flops = topk_flops(D_MODEL, n, tokens=TOKENS, selected=(k + 256) * TOKENS)
            rows.append(
                {
                    "cell_id": f"{n}x{k}", "subject": "gpt4", "site": "resid_post 22", "d_model": D_MODEL,
                    "n_latents": n, "k": k, "architecture": "topk", "seed": 0, "lr": 1e-4, "tokens": TOKENS,
                    "flops": float(flops.sparse), "flops_dense": float(flops.dense),
                    "nmse": float(law * np.exp(noise * rng.standard_normal())), "l0": float(k),
                    "dead_fraction": 0.01, "dead_fraction_long": 0.0, "wall_s": 10.0, "status": "done", "error": None,
                }
            )  # fmt: skip
    return rows


def _curves_of(rows: list[dict[str, Any]], evaluations: int = 50, late_fall: float = 0.0) -> list[dict[str, Any]]:
    """Rows of curves.parquet: larger cells take longer; `late_fall` is how much nmse falls over the end."""
    curves = []
    for row in rows:
        for tokens in np.linspace(0, row["tokens"], evaluations + 1)[1:]:
            done = tokens / row["tokens"]
            # Zero at the end, and small long before it in cells that converge.
            behind = np.exp(-done / (0.02 * (row["n_latents"] / 512) ** 0.5)) + late_fall * (1 - done)
            curves.append(
                {
                    "cell_id": row["cell_id"], "step": int(tokens), "tokens": int(tokens),
                    "flops": row["flops"] * done, "nmse": row["nmse"] * (1 + behind), "train_nmse": row["nmse"],
                    "l0": row["l0"], "dead_fraction": 0.01, "dead_fraction_long": 0.0, "lr": 1e-4,
                    "tokens_per_s": 1e4,
                }
            )  # fmt: skip
    return curves


@pytest.fixture
def cells() -> Callable[..., list[dict[str, Any]]]:
    return _cells


@pytest.fixture
def curves_of() -> Callable[..., list[dict[str, Any]]]:
    return _curves_of
