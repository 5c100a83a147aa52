"""Held-out nmse: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over the whole held-out set, summed in float64."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject

CHUNK_ROWS = 8_192  # preprocessed and encoded at a time
KEPT_BYTES = 2**28  # of preprocessed rows, which all cells of an evaluation then share

needs: frozenset[Need] = frozenset()
metrics = {"nmse": Metric("lower")}


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    """nmse and l0 on the held-out rows that the cell names, all of `source` where it names none."""
    held_out = HeldOut(source, trained.cell.heldout_rows, next(iter(trained.sae.params.values())).device)
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
        """nmse and l0 of each SAE; each is made once, and the rows are preprocessed once for all where they fit.

        `origin` [d_model]: what batches are centred by; `bf16`: some SAE has operands of that type.
        """
        chunks = self._raw.split(CHUNK_ROWS)

        def preprocessed() -> Iterator[Batch]:
            return (Batch.of(normalise(chunk.to(self._device)), origin, bf16) for chunk in chunks)

        kept = list(preprocessed()) if self.tokens == rows_at_a_time(*self._raw.shape) else None
        # One SAE after the other: averaged copies of all cells would double a pack's weights, and one of them for each
        # chunk would be made anew many times.
        sums = [_sums(make(), preprocessed() if kept is None else kept) for make in saes]
        return [Quality(squared / self._total, active / self.tokens) for squared, active in torch.stack(sums).tolist()]

    def levels(self, sae: SAE, origin: Tensor, bf16: bool = False) -> list[dict[str, float]]:
        """k, nmse and l0 at each sparsity that the SAE serves (Settings.levels); [] for one that serves one alone."""
        ks = sae.settings.levels()
        found = self.evaluate([partial(sae.at, k) for k in ks], origin, bf16)
        return [{"k": k, **quality._asdict()} for k, quality in zip(ks, found, strict=True)]


def rows_at_a_time(rows: int, d_model: int) -> int:
    """How many of `rows` stand preprocessed in memory at once: all, where they and their rounding fit, or a chunk."""
    return rows if rows * d_model * (4 + 2) <= KEPT_BYTES else min(rows, CHUNK_ROWS)


def _sums(sae: SAE, batches: Iterable[Batch]) -> Tensor:
    """[squared error, active latents] over all rows, in float64 and on the device, for which nobody waits here."""
    total = torch.zeros(2, dtype=torch.float64, device=next(iter(sae.params.values())).device)
    for batch in batches:
        result = sae.reconstruct(batch)
        total += torch.stack([result.squared, result.active.double()])
    return total
