"""Decoder directions of cells side by side: which latents of two SAEs write the same thing."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.columns import columns_of
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.firing import firing
from saescale.trainers.evals.intervals import SEED, means_of
from saescale.trainers.exchange.trained import SparseLatents, Trained
from saescale.trainers.preprocess import normalise, to_tensor

SAME = 0.7  # cosine of decoder directions above which two latents are taken for one
_SPEC = [column.name for column in columns_of("results") if column.role == "spec"]


class Nearest(NamedTuple):
    """Of each latent of one SAE the nearest of another: its place among that one's directions, and the cosine."""

    place: np.ndarray  # int64 [latents]
    cosine: np.ndarray  # float64 [latents]


class Directions:
    """Unit decoder directions of the latents that fire on the held-out rows, float32 [latents, d_model]: dead ones lie
    where they were drawn, and are nobody's partners. Which ones fire is found once for each cell in a process."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._alive: dict[str, np.ndarray] = {}

    def of(self, trained: Trained) -> Tensor:
        """Raises SaescaleError where no latent fires."""
        cell = trained.cell.cell_id
        raw = to_tensor(self._source.heldout(trained.cell.heldout_rows).act, self._source.dtype)
        rows = directions_of(trained, raw)
        if cell not in self._alive:
            self._alive[cell] = np.flatnonzero(firing(trained, raw).fired)
        alive = self._alive[cell]
        if not len(alive):
            raise SaescaleError(f"no latent of {cell} fires on its held-out rows")
        return torch.nn.functional.normalize(rows[torch.from_numpy(alive).to(rows.device)], dim=1)


def random_directions(n_latents: int, d_model: int) -> Tensor:
    """Unit rows less their mean, as preprocessed rows are, float32 [n_latents, d_model]: latents of no training."""
    return normalise(torch.randn(n_latents, d_model, generator=torch.Generator().manual_seed(SEED)))


def largest(raw: Tensor, directions: Tensor, k: int) -> SparseLatents:
    """TopK with directions [n_latents, d_model] for an encoder: the k largest products of each preprocessed row with
    them that are positive."""
    indices, values = [], []
    for rows in raw.split(max(1, CHUNK_ENTRIES // len(directions))):
        kept = (normalise(rows.to(directions.device)) @ directions.T).topk(min(k, len(directions)), dim=1)
        indices.append(kept.indices.where(kept.values > 0, -1))
        values.append(kept.values.clamp_min(0))
    return SparseLatents(torch.cat(indices), torch.cat(values))


def cosines(ours: Tensor, theirs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows of ours @ theirs.T at a time: the place of the first, and float32 [some, latents of theirs]."""
    at_a_time = max(1, CHUNK_ENTRIES // len(theirs))
    for start in range(0, len(ours), at_a_time):
        yield start, ours[start : start + at_a_time] @ theirs.T


def nearest(ours: Tensor, theirs: Tensor) -> Nearest:
    """Of each direction of `ours` [latents, d_model] the one of `theirs` with the largest cosine."""
    found = [of_some.max(dim=1) for _, of_some in cosines(ours, theirs)]
    place, cosine = torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
    return Nearest(place.cpu().numpy(), cosine.double().cpu().numpy())


def alike(row: Mapping[str, Any], other: Mapping[str, Any], *but_for: str) -> bool:
    """Whether two rows of results.parquet are of cells that differ in nothing but `but_for`."""
    return all(row[name] == other[name] for name in _SPEC if name not in ("cell_id", *but_for))


def over_latents(columns: Mapping[str, np.ndarray], at: str = "") -> Iterator[Measurement]:
    """The mean of each column [latents], with its interval over latents."""
    for name, found in means_of(columns).items():
        yield Measurement(name, *found, at=at, n=len(columns[name]), seed=SEED)
