"""Held-out nmse: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over the whole held-out set, summed in float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from saescale.storage.errors import SaescaleError
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.topk_sparse import Batch, reconstruct
from saescale.trainers.preprocess import Centre, normalise, to_tensor
from saescale.trainers.training.optimiser import SAEAdam

CHUNK_ROWS = 8_192  # preprocessed and encoded at a time


class Evaluation(NamedTuple):
    nmse: float
    l0: float  # mean number of active latents per token


class HeldOut:
    """The first `tokens` held-out rows of a store, kept in memory as they are stored (2 bytes a number).

    Raises SaescaleError where there are fewer, and where nmse has no meaning because they do not vary.
    """

    def __init__(self, store: ActivationStore, tokens: int, device: torch.device | str = "cpu") -> None:
        store.require_rows("heldout", tokens, "eval.tokens")
        self._raw = to_tensor(store.heldout(tokens).act, store.dtype)
        self._device = torch.device(device)
        self.tokens = tokens
        self._total = self._variation()
        # Rows have unit norm, so equal ones leave nothing but rounding.
        if not math.isfinite(self._total) or self._total <= 1e-20 * tokens:
            raise SaescaleError(
                f"{store.url}: the first {tokens} held-out rows have a total variation of {self._total:.3g}, so nmse "
                "has no meaning; set eval.tokens to take in rows that differ, or harvest again"
            )

    def _variation(self) -> float:
        """sum ||x - mean(x)||^2 over all rows, in float64."""
        total = torch.zeros((), dtype=torch.float64)
        mean = torch.zeros(self._raw.shape[1], dtype=torch.float64)
        for chunk in self._raw.split(CHUNK_ROWS):
            mean += normalise(chunk).double().sum(dim=0)
        mean /= len(self._raw)
        for chunk in self._raw.split(CHUNK_ROWS):
            total += (normalise(chunk).double() - mean).square().sum()
        return float(total)

    def evaluate(self, optimisers: Sequence[SAEAdam], centre: Centre) -> list[Evaluation]:
        """nmse and l0 of each SAE with its averaged weights; the rows are read and preprocessed once for all."""
        squared = [0.0] * len(optimisers)
        active = [0] * len(optimisers)
        bf16 = any(optimiser.operand.dtype == torch.bfloat16 for optimiser in optimisers)
        for chunk in self._raw.split(CHUNK_ROWS):
            batch = Batch.of(normalise(chunk.to(self._device)), centre.b_pre, bf16)
            for i, optimiser in enumerate(optimisers):
                # Made again for every chunk: copies of all cells would double the pack's weights, and on a CPU this
                # is a few per cent of a chunk's product.
                sae = optimiser.averaged()
                result = reconstruct(sae, sae.W_enc.data.to(optimiser.operand.dtype), batch)
                squared[i] += result.squared
                active[i] += result.active
        return [Evaluation(s / self._total, a / self.tokens) for s, a in zip(squared, active, strict=True)]
