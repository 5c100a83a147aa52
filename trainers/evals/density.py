"""How much of the reconstruction comes from latents of which frequency of activation.

A histogram of frequencies counts latents: most are rare. Here each counts by its energy, the sum over rows of
(latent x length of its decoder direction)^2, as a share of that of all: latents that fire on every tenth row are few,
and may carry most of it. Frequencies are those on the held-out rows. Cost: two dense forward passes over those rows.

| metric | what |
|---|---|
| `energy` | share of the energy of latents whose frequency lies in a bin of half a decade; `at` names it |
| `energy_1`, `energy_10` | share of the energy of latents that are active on more than 1 % and 10 % of rows |
| `mean_log10` | mean of log10 of the frequency, by energy |

Intervals are over documents, with each latent's frequency as it is over all rows.
"""

from collections.abc import Iterator

import numpy as np
import torch

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.core import BIN_NAMES, bin_of
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.firing import firing
from saescale.trainers.evals.intervals import SEED, by_document, ratio
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset()
metrics = {"energy_1": Metric("lower", bounded=True), "energy_10": Metric("lower", bounded=True)}


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    rows = source.heldout(trained.cell.heldout_rows, ("act", "doc"))
    raw, n = to_tensor(rows.act, source.dtype), len(rows.act)
    fired = firing(trained, raw).fired
    if not fired.any():
        raise SaescaleError("no latent fires on the held-out rows, so there is no energy to share out")
    counted = _counted(fired, n)
    sums = _energy(trained, raw, np.stack(list(counted.values()), axis=1))
    columns = dict(zip(counted, sums.T, strict=True))
    for name, found in by_document(rows.doc, columns, {name: ratio(name, "all") for name in counted}).items():
        if name in BIN_NAMES:
            yield Measurement("energy", *found, at=name, n=n, seed=SEED)
        elif name != "all":
            yield Measurement(name, *found, n=n, seed=SEED)


def _counted(fired: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """With what weight the energy of each latent counts for what is measured, float64 [n_latents] each."""
    frequency = np.maximum(fired, 1) / n  # one that never fires has no energy
    bins = bin_of(frequency)
    return {
        **{name: (bins == place).astype(float) for place, name in enumerate(BIN_NAMES)},
        "energy_1": (frequency > 0.01).astype(float),
        "energy_10": (frequency > 0.1).astype(float),
        "mean_log10": np.log10(frequency),
        "all": np.ones(len(frequency)),
    }


def _energy(trained: Trained, raw: torch.Tensor, weights: np.ndarray) -> np.ndarray:
    """The energy of each row, summed over latents with `weights` [n_latents, columns]: float64 [rows, columns]."""
    rows = directions_of(trained, raw)
    weighed = rows.double().square().sum(dim=1)[:, None] * torch.from_numpy(weights).to(rows.device)
    chunks = raw.split(max(1, CHUNK_ENTRIES // trained.sae.shape.n_latents))
    return torch.cat([(trained.encode(chunk).double().square() @ weighed).cpu() for chunk in chunks]).numpy()
