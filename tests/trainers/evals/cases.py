"""SAEs of any architecture away from their initialisation, and a source of rows, for tests of evaluations."""

from types import SimpleNamespace

import numpy as np
import torch

from saescale.trainers.architectures.architecture import Batch, PenaltySettings, Shape, State
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import measure_centre, normalise

D_MODEL = 16


def raw_rows(rows: int, d_model: int = D_MODEL, seed: int = 0) -> np.ndarray:
    """float16 [rows, d_model], some directions larger than others, away from 0."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, 2, d_model)
    return (rng.normal(size=(rows, d_model)) * scale + rng.normal(size=d_model)).astype(np.float16)


def a_source(act: np.ndarray, rows_per_document: int = 25) -> SimpleNamespace:
    doc = np.arange(len(act), dtype=np.int32) // rows_per_document

    def heldout(rows: int | None, columns: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(act=act[:rows], doc=doc[:rows])

    return SimpleNamespace(dtype="float16", heldout=heldout)


def a_trained(
    architecture: str = "topk", act: np.ndarray | None = None, n_latents: int = 48, k: int = 4, seed: int = 0,
    **settings: object,
) -> Trained:  # fmt: skip
    """Random weights, untied, with biases; calibrated on `act` where its architecture has something to calibrate."""
    x = normalise(torch.from_numpy(raw_rows(500) if act is None else act))
    cell = Cell(
        store="s", architecture=architecture, d_model=x.shape[1], n_latents=n_latents, k=k, seed=seed, tokens=64,
        batch_tokens=64, lr=1e-3, dead_after_tokens=64, ema=0.9, settings=settings,
    )  # fmt: skip
    shape = Shape(x.shape[1], n_latents)
    sae = SAE(architecture, shape, cell.whole_settings, {})
    centre = measure_centre(x)
    made = sae.architecture.parameters(shape, cell.whole_settings, centre, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    params = {
        name: parameter.data + 0.1 * torch.randn(parameter.data.shape, generator=draw) * parameter.trained
        for name, parameter in made.items()
    }
    sae = sae.like(params)
    sae.calibrate(Batch.of(x, centre.b_pre, bf16=False))
    if architecture == "pca":  # is measured, not trained
        state = State(1.0, torch.zeros(n_latents, dtype=torch.bool))
        params |= sae.architecture.losses(params, sae.forward(x), x, cell.whole_settings, state).measured
        sae = sae.like(params)
    if isinstance(cell.whole_settings, PenaltySettings):  # no penalty made latents few: half of them would be active
        scores, values = sae.candidates(sae.forward(x))
        largest = scores[values > 0].topk(k * len(x) + 1).values
        params["b_gate" if architecture == "gated" else "b_enc"] -= largest[-2:].mean()
        sae = sae.like(params)
    return Trained(sae, cell)
