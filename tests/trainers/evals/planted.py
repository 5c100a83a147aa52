"""TopK SAEs whose directions are planted: orthonormal ones of mean 0, so that preprocessing leaves them as they are."""

from types import SimpleNamespace

import numpy as np
import torch

from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained

D_MODEL = 33
BIAS = 0.01  # which rounding does not exceed
E = np.linalg.qr(np.eye(D_MODEL) - 1 / D_MODEL)[0].T[: D_MODEL - 1]  # [32, D_MODEL]
E -= E.mean(axis=1, keepdims=True)
E /= np.linalg.norm(E, axis=1, keepdims=True)


def mix(first: int, second: int, cosine: float) -> np.ndarray:
    """A unit direction with that cosine to the first and else along the second."""
    return cosine * E[first] + np.sqrt(1 - cosine**2) * E[second]


def planted(directions: list[np.ndarray], k: int = 1, seed: int = 0) -> Trained:
    """One latent for each direction, by which it encodes too."""
    W = torch.tensor(np.stack(directions), dtype=torch.float32)
    cell = Cell(store="s", d_model=D_MODEL, n_latents=len(W), k=k, tokens=64, batch_tokens=64, lr=1e-3,
                dead_after_tokens=64, seed=seed)  # fmt: skip
    params = {"W_enc": W, "b_enc": torch.full((len(W),), -BIAS), "W_dec": W.clone(), "b_pre": torch.zeros(D_MODEL)}
    return Trained(SAE("topk", Shape(D_MODEL, len(W)), cell.whole_settings, params), cell)


def source(act: np.ndarray, rows_per_document: int = 4) -> SimpleNamespace:
    doc = np.arange(len(act), dtype=np.int32) // rows_per_document

    def heldout(rows: int | None, columns: tuple[str, ...] = ("act",)) -> SimpleNamespace:
        return SimpleNamespace(act=act[:rows].astype(np.float16), doc=doc[:rows])

    return SimpleNamespace(dtype="float16", heldout=heldout)
