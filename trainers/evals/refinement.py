"""How much better each token could be reconstructed by the latents that it has, with the decoder as it is.

Gao et al. 2024, section 5.4 ("activation shrinkage"; paper.md): the support of each token's code and the decoder are
held fast, and the error is minimised over activations that are not negative. Where the best ones are larger than the
encoder's, the encoder shrinks: a penalty on ||z||_1 makes it do so, TopK has none.

| metric | what |
|---|---|
| `nmse`, `nmse_refined` | sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 by the encoder's activations, and by the best |
| `gain` | share of the squared error that refinement takes away, 1 - nmse_refined / nmse |
| `ratio` | sum of the refined activations over the sum of the encoder's: above 1 where the encoder shrinks |
| `zeroed` | share of active pairs (token, latent) whose best activation is 0 |

x is preprocessed, as of nmse, on the first 4,096 rows that the cell's nmse was measured on; intervals are over
documents. By projected gradient with momentum (FISTA, begun anew where the error would rise) from the encoder's
activations, each token by itself, until none could move by more than 1e-6 of its largest. Cost: rows * w^2 * (d_model +
iterations) for w active latents; some tens of iterations.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.decoder import Decoder, linear_decoder
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, by_document, ratio
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject

ROWS = 4_096
ITERATIONS, TOLERANCE = 5_000, 1e-6
_LOOKED_AT = 16  # iterations after which those that are done are left out
_ENTRIES = 2**22  # of active decoder rows, or of their products, that are held at a time

needs: frozenset[Need] = frozenset()
metrics = {
    "nmse": Metric("lower"),
    "nmse_refined": Metric("lower"),
    "gain": Metric("lower", bounded=True),
    "ratio": Metric("lower", limit=1.0),
    "zeroed": Metric("lower", bounded=True),
}

_STATISTICS = {
    "nmse": ratio("squared", "variation"),
    "nmse_refined": ratio("refined", "variation"),
    "gain": lambda sums: 1 - sums["refined"] / sums["squared"],
    "ratio": ratio("refined_activations", "activations"),
    "zeroed": ratio("zeroed", "active"),
}


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    rows = source.heldout(trained.cell.heldout_rows, ("act", "doc"))
    columns = _of_rows(trained, to_tensor(rows.act[:ROWS], source.dtype))
    doc = rows.doc[:ROWS]
    if not columns["active"].sum():
        raise SaescaleError("no latent is active on the held-out rows, so there is nothing to refine")
    for name, found in by_document(doc, columns, _STATISTICS).items():
        yield Measurement(name, *found, n=len(doc), seed=SEED)


@torch.no_grad()
def _of_rows(trained: Trained, raw: Tensor) -> dict[str, np.ndarray]:
    """Columns [rows] of float64."""
    sae = trained.sae
    x = normalise(raw.to(next(iter(sae.params.values())).device))
    decoder, mean = linear_decoder(sae, x), x.double().mean(dim=0)
    parts = []
    for rows in x.split(max(1, CHUNK_ENTRIES // sae.shape.n_latents)):
        z = sae.encode(rows)
        active = z > 0
        width = max(1, int(active.sum(dim=1).max()))
        own, indices = z.topk(width, dim=1)  # what is not active has 0 and stays so
        each = width * max(width, sae.shape.d_model)
        for some in torch.arange(len(rows), device=x.device).split(max(1, _ENTRIES // each)):
            best = refine(decoder, rows[some], indices[some], own[some])
            squared = _squared(decoder, rows[some], indices[some], own[some].double())
            of_each = {
                "squared": squared,
                # The encoder's activations are among those that were asked of.
                "refined": torch.minimum(squared, _squared(decoder, rows[some], indices[some], best)),
                "variation": (rows[some].double() - mean).square().sum(dim=1),
                "activations": own[some].double().sum(dim=1),
                "refined_activations": best.sum(dim=1),
                "zeroed": ((best == 0) & (own[some] > 0)).double().sum(dim=1),
                "active": (own[some] > 0).double().sum(dim=1),
            }
            parts.append(torch.stack(list(of_each.values())).cpu())
    return dict(zip(of_each, torch.cat(parts, dim=1).numpy(), strict=True))


def refine(decoder: Decoder, x: Tensor, indices: Tensor, own: Tensor) -> Tensor:
    """The activations not below 0, float64 [rows, width], that reconstruct each row of x [rows, d_model] best.

    `indices` int64 [rows, width] are its latents and `own` what the encoder gave them, 0 where one is not active: that
    stays 0.
    """
    active = own > 0
    W = decoder.W[indices] * active[..., None]
    gram = (W @ W.mT).double()
    linear = (W @ (x - decoder.b)[..., None])[..., 0].double()
    return _least(gram, linear, own.double())


def _least(gram: Tensor, linear: Tensor, start: Tensor) -> Tensor:
    """argmin over z >= 0 of z G z / 2 - linear z of each row, [rows, width], from `start`."""
    found = start.clone()
    # The largest row sum bounds the largest eigenvalue; a row without an active latent has none.
    step = 1 / gram.abs().sum(dim=2).amax(dim=1, keepdim=True).clamp_min(1e-30)
    left = torch.arange(len(start), device=start.device)
    z, y, t = start, start, torch.ones_like(step)
    for iteration in range(1, ITERATIONS + 1):
        moved = (y - step * ((gram @ y[..., None])[..., 0] - linear)).clamp_min_(0)
        ahead = (1 + (1 + 4 * t.square()).sqrt()) / 2
        onward = moved + (t - 1) / ahead * (moved - z)
        turned = ((y - moved) * (moved - z)).sum(dim=1, keepdim=True) > 0
        y, t = torch.where(turned, moved, onward), torch.where(turned, 1.0, ahead)
        z = moved
        if iteration % _LOOKED_AT == 0 or iteration == ITERATIONS:
            plain = (z - step * ((gram @ z[..., None])[..., 0] - linear)).clamp_min_(0)
            moving = (plain - z).abs().amax(dim=1) > TOLERANCE * z.amax(dim=1)
            found[left] = z
            if not bool(moving.any()):
                break
            left, gram, linear, step = left[moving], gram[moving], linear[moving], step[moving]
            z, y, t = z[moving], y[moving], t[moving]
    return found


def _squared(decoder: Decoder, x: Tensor, indices: Tensor, z: Tensor) -> Tensor:
    """||x - x_hat||^2 of each row, float64 [rows]."""
    x_hat = (z[:, None, :].float() @ decoder.W[indices])[:, 0] + decoder.b
    return (x - x_hat).double().square().sum(dim=1)
