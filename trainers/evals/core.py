"""How faithful a cell is and how its latents fire, on the held-out rows that its nmse was measured on.

Everything is of preprocessed rows (preprocess.normalise), as nmse is. SAEBench has metrics of the same names of raw
activations, and another explained variance: README.md says what agrees and what does not. Cost: one dense forward pass
over those rows.

| metric | what |
|---|---|
| `nmse`, `explained_variance` | sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, and 1 less that |
| `explained_variance_zero` | 1 - sum ||x - x_hat||^2 / sum ||x||^2 |
| `cosine` | mean over rows of the cosine of x and x_hat, 0 where x_hat is 0 |
| `l0` | mean number of active latents |
| `dead` | share of latents that are active on no row |
| `dense_1`, `dense_10` | share of latents that are active on more than 1 % and 10 % of rows |
| `frequency` | share of latents whose frequency of activation lies in a bin of half a decade; `at` names it |
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, by_document, ratio
from saescale.trainers.evals.nmse import CHUNK_ROWS
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset()
metrics = {
    "nmse": Metric("lower"),
    "explained_variance": Metric("higher", limit=1.0),
    "explained_variance_zero": Metric("higher", limit=1.0),
    "cosine": Metric("higher", limit=1.0),
    "dead": Metric("lower", bounded=True),
    "dense_1": Metric("lower", bounded=True),
    "dense_10": Metric("lower", bounded=True),
}

BINS = np.arange(-6.0, 0.5, 0.5)  # edges, log10 of the frequency of activation; rarer ones are in the first bin
BIN_NAMES = [f"1e{low:g} to 1e{high:g}" for low, high in itertools.pairwise(BINS)]

_STATISTICS = {
    "nmse": ratio("squared", "variation"),
    "explained_variance": lambda sums: 1 - sums["squared"] / sums["variation"],
    "explained_variance_zero": lambda sums: 1 - sums["squared"] / sums["length"],
    "cosine": ratio("cosine", "rows"),
    "l0": ratio("active", "rows"),
}


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    rows = source.heldout(trained.cell.heldout_rows, ("act", "doc"))
    columns, fired = _of_rows(trained, to_tensor(rows.act, source.dtype))
    n = len(rows.act)
    if not columns["variation"].sum() > 1e-20 * n:
        raise SaescaleError("the held-out rows are all the same, so there is no variance to explain; harvest again")
    for name, found in by_document(rows.doc, columns, _STATISTICS).items():
        yield Measurement(name, *found, n=n, seed=SEED)
    frequency = fired / n
    yield Measurement("dead", float(np.mean(fired == 0)), n=n)
    for name, share in (("dense_1", 0.01), ("dense_10", 0.1)):
        yield Measurement(name, float(np.mean(frequency > share)), n=n)
    counts = np.bincount(bin_of(frequency[fired > 0]), minlength=len(BIN_NAMES))
    for name, count in zip(BIN_NAMES, counts, strict=True):
        yield Measurement("frequency", count / len(fired), at=name, n=n)


def bin_of(frequency: np.ndarray) -> np.ndarray:
    """In which of `BIN_NAMES` frequencies above 0 lie, int64."""
    return np.clip(np.digitize(np.log10(frequency), BINS) - 1, 0, len(BIN_NAMES) - 1)


@torch.no_grad()
def _of_rows(trained: Trained, raw: torch.Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns [rows] of float64, and on how many rows each latent is active, int64 [n_latents]."""
    sae = trained.sae
    device = next(iter(sae.params.values())).device
    mean = torch.zeros(raw.shape[1], dtype=torch.float64, device=device)
    for chunk in raw.split(CHUNK_ROWS):
        mean += normalise(chunk.to(device)).double().sum(dim=0)
    mean /= len(raw)
    fired = torch.zeros(sae.shape.n_latents, dtype=torch.int64, device=device)
    parts = []
    for chunk in raw.split(max(1, CHUNK_ENTRIES // sae.shape.n_latents)):
        x = normalise(chunk.to(device))
        forward = sae.forward(x)
        active = forward.latents > 0
        fired += active.sum(dim=0)
        of_each = {
            "squared": (x - forward.x_hat).double().square().sum(dim=1),
            "variation": (x.double() - mean).square().sum(dim=1),
            "length": x.double().square().sum(dim=1),
            "cosine": torch.nn.functional.cosine_similarity(x, forward.x_hat, dim=1).double(),
            "active": active.sum(dim=1).double(),
            "rows": x.new_ones(len(x)).double(),
        }
        parts.append(torch.stack(list(of_each.values())).cpu())
    return dict(zip(of_each, torch.cat(parts, dim=1).numpy(), strict=True)), fired.cpu().numpy()
