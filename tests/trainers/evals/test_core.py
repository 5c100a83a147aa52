"""core against loops in float64 over an SAE whose latents fire as often as was planned."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals import core
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.exchange.trained import Trained

ROWS, D_MODEL, N_LATENTS, K = 2_000, 8, 24, 3


def trained(dead: int = 4) -> Trained:
    """Random weights; the last `dead` latents never fire, the first one always does."""
    cell = Cell(
        store="s",
        d_model=D_MODEL,
        n_latents=N_LATENTS,
        k=K,
        tokens=64,
        batch_tokens=64,
        lr=1e-3,
        dead_after_tokens=64,
        ema=0.9,
    )
    draw = torch.Generator().manual_seed(0)
    bias = torch.zeros(N_LATENTS)
    bias[0], bias[-dead:] = 50, -50
    params = {
        "W_enc": torch.randn(N_LATENTS, D_MODEL, generator=draw), "b_enc": bias,
        "W_dec": torch.nn.functional.normalize(torch.randn(N_LATENTS, D_MODEL, generator=draw), dim=1),
        "b_pre": torch.randn(D_MODEL, generator=draw) / 4,
    }  # fmt: skip
    return Trained(SAE("topk", Shape(D_MODEL, N_LATENTS), cell.whole_settings, params), cell)


def source(act: np.ndarray) -> SimpleNamespace:
    doc = np.arange(len(act), dtype=np.int32) // 50

    def heldout(rows: int | None, columns: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(act=act[:rows], doc=doc[:rows])

    return SimpleNamespace(dtype="float16", heldout=heldout)


def by_hand(sae: Trained, act: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """One row after the other; metrics and on how many rows each latent fires."""
    params = {name: tensor.double().numpy() for name, tensor in sae.sae.params.items()}
    x = act.astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    mean, fired = x.mean(axis=0), np.zeros(N_LATENTS)
    squared = variation = length = cosine = active = 0.0
    for row in x:
        pre = params["W_enc"] @ (row - params["b_pre"]) + params["b_enc"]
        x_hat = params["b_pre"].copy()
        for latent in np.argsort(-pre)[:K]:
            if pre[latent] > 0:
                x_hat += pre[latent] * params["W_dec"][latent]
                fired[latent] += 1
                active += 1
        squared += ((row - x_hat) ** 2).sum()
        variation += ((row - mean) ** 2).sum()
        length += (row**2).sum()
        cosine += row @ x_hat / np.linalg.norm(row) / np.linalg.norm(x_hat)
    n = len(x)
    return {
        "nmse": squared / variation, "explained_variance": 1 - squared / variation,
        "explained_variance_zero": 1 - squared / length, "cosine": cosine / n, "l0": active / n,
        "dead": float((fired == 0).mean()), "dense_1": float((fired / n > 0.01).mean()),
        "dense_10": float((fired / n > 0.1).mean()),
    }, fired  # fmt: skip


def measured(sae: Trained, act: np.ndarray) -> list[Measurement]:
    return list(core.measure(sae, source(act), None))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def act() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(ROWS, D_MODEL)) + rng.normal(size=D_MODEL)).astype(np.float16)


def test_metrics_are_those_of_loops(act: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "CHUNK_ENTRIES", 300 * N_LATENTS)  # in pieces, the last one short
    monkeypatch.setattr(core, "CHUNK_ROWS", 300)
    found = measured(trained(), act)
    wanted, fired = by_hand(trained(), act)
    whole = {row.metric: row for row in found if not row.at}
    assert whole.keys() == wanted.keys()
    for name, value in wanted.items():
        assert whole[name].value == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert whole[name].n == ROWS
    for name in ("nmse", "cosine", "l0"):
        row = whole[name]
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
        assert row.seed == 0
    bins = {row.at: row.value for row in found if row.at}
    assert sum(bins.values()) + whole["dead"].value == pytest.approx(1)
    assert whole["dead"].value >= 4 / N_LATENTS
    frequency = fired / ROWS
    assert bins["1e-0.5 to 1e0"] == pytest.approx(np.mean((frequency >= 10**-0.5) & (frequency <= 1)))
    assert bins["1e-1 to 1e-0.5"] == pytest.approx(np.mean((frequency >= 0.1) & (frequency < 10**-0.5)))


def test_rows_that_are_all_the_same_are_refused(act: np.ndarray) -> None:
    with pytest.raises(SaescaleError, match="no variance to explain"):
        measured(trained(), np.repeat(act[:1], 50, axis=0))
