"""Held-out nmse: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over the whole held-out set, summed in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject
from torch import Tensor

CHUNK_ROWS = 8_192  # preprocessed and encoded at a time

needs: frozenset[Need] = frozenset()


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    """nmse and l0 on all held-out rows of `source`."""
    held_out = HeldOut(source, None, next(iter(trained.sae.params.values())).device)
    quality = held_out.evaluate([lambda: trained.sae], trained.origin, trained.sae.precision == "bf16")[0]
    yield Measurement("nmse", quality.nmse, n=held_out.tokens)
    yield Measurement("l0", quality.l0, n=held_out.tokens)


class Quality(NamedTuple):
    nmse: float
    l0: float  # mean number of active latents per token


class HeldOut:
    """The first `tokens` held-out rows of a source (None: all), kept in memory as they are stored (2 bytes a number).

    `where` names the source in errors. Raises SaescaleError where there are fewer, and where nmse has no meaning
    because they do not vary.
    """

    def __init__(
        self, source: Source, tokens: int | None, device: torch.device | str = "cpu", where: str | None = None
    ) -> None:
        self._raw = to_tensor(source.heldout(tokens).act, source.dtype)
        self._device = torch.device(device)
        self.tokens = len(self._raw)
        self._total = self._variation()
        # Rows have unit norm, so equal ones leave nothing but rounding.
        if not math.isfinite(self._total) or self._total <= 1e-20 * self.tokens:
            raise SaescaleError(
                f"{where or source.identity}: the first {self.tokens} held-out rows have a total variation of "
                f"{self._total:.3g}, so nmse has no meaning; set eval.tokens to take in rows that differ, or harvest "
                "again"
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

    def evaluate(self, saes: Sequence[Callable[[], SAE]], origin: Tensor, bf16: bool = False) -> list[Quality]:
        """nmse and l0 of each SAE; the rows are read and preprocessed once for all.

        `origin` [d_model]: what batches are centred by; `bf16`: some SAE has operands of that type.
        """
        squared, active = [0.0] * len(saes), [0] * len(saes)
        for chunk in self._raw.split(CHUNK_ROWS):
            batch = Batch.of(normalise(chunk.to(self._device)), origin, bf16)
            for i, make in enumerate(saes):
                # Made again for every chunk: averaged copies of all cells would double a pack's weights, and on a CPU
                # this is a few per cent of a chunk's product.
                result = make().reconstruct(batch)
                squared[i] += result.squared
                active[i] += result.active
        return [Quality(s / self._total, a / self.tokens) for s, a in zip(squared, active, strict=True)]
