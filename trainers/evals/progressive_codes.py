"""How an SAE fares with more or fewer latents a token than it was trained for (Gao et al. 2024, section 5.5; paper.md).

Two ways to choose latents of a trained SAE: TopK(k'), the k' of each token with the largest scores, and JumpReLU, all
whose score exceeds one threshold, which is the same for all tokens and such that k' are active on average over the
rows. A score is how near a latent is to being active: its pre-activation, or what the architecture has in its place
(`candidates`). A latent's value is what it would be if it were active; negative ones are 0. In the paper nmse of
TopK rises again beyond its k; Multi-TopK and hierarchical_topk are trained for other k' as well.

| metric | what |
|---|---|
| `nmse` | by the SAE's own code |
| `topk`, `jumprelu` | nmse at k' from k / 4 to 4 k (at most N), in steps of a factor of sqrt 2; `at` names it |
| `topk_half`, `topk_same`, `topk_twice` | those of k / 2, k and 2 k |
| `topk_rise` | nmse at 4 k over nmse at k: above 1 where more latents make it worse |
| `jumprelu_half` ... `jumprelu_rise` | the same by a threshold |

A threshold that would have to be below all values that are not negative is left out (relu has nothing beyond its own
latents). nmse is of preprocessed rows, the first 32,768 of those that the cell's nmse was measured on; intervals are
over documents. Cost: one dense forward pass, and for either way a sparse decoding of the most latents a token that it
takes, since each code holds those before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.architectures.architecture import Forward
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.evals.decoder import Decoder, linear_decoder
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, by_document, ratio
from saescale.trainers.evals.nmse import CHUNK_ROWS
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject

WAYS = "topk", "jumprelu"
ROWS = 32_768
MOST = 4  # times k, and as much below it
_TOLERANCE = 1e-4  # of the largest activation

needs: frozenset[Need] = frozenset()
metrics = {
    "nmse": Metric("lower"),
    **{f"{way}_{name}": Metric("lower") for way in WAYS for name in ("half", "same", "twice", "rise")},
}


class Ranked(NamedTuple):
    """The candidates of each row that could be active, the largest score first, [rows, width]; behind them -inf, -1
    and 0."""

    scores: Tensor  # float32
    indices: Tensor  # int32
    values: Tensor  # float32


def measure(trained: Trained, source: Source, subject: Subject | None) -> Iterator[Measurement]:
    rows = source.heldout(trained.cell.heldout_rows, ("act", "doc"))
    sae, k = trained.sae, trained.cell.k
    device = next(iter(sae.params.values())).device
    x, doc = normalise(to_tensor(rows.act[:ROWS], source.dtype).to(device)), rows.doc[:ROWS]
    columns, mean = _errors(sae, x, k), x.mean(dim=0, dtype=torch.float64)
    variations = [(some.double() - mean).square().sum(dim=1) for some in x.split(CHUNK_ROWS)]
    variation = torch.cat(variations).cpu().numpy()
    if not variation.sum() > 1e-20 * len(x):
        raise SaescaleError("the held-out rows are all the same, so nmse has no meaning; harvest again")
    statistics = {code: ratio(code, "variation") for code in columns}
    most = min(MOST * k, sae.shape.n_latents)
    for way in WAYS:
        if {f"{way} {k}", f"{way} {most}"} <= columns.keys():
            statistics[f"{way}_rise"] = ratio(f"{way} {most}", f"{way} {k}")
    found = by_document(doc, columns | {"variation": variation}, statistics)
    for code, estimate in found.items():
        metric, _, at = code.partition(" ")
        yield Measurement(metric, *estimate, at=f"k' = {at}" if at else "", n=len(x), seed=SEED)
    for way in WAYS:
        for name, many in (("half", max(1, k // 2)), ("same", k), ("twice", min(2 * k, sae.shape.n_latents))):
            if (code := f"{way} {many}") in found:
                yield Measurement(f"{way}_{name}", *found[code], n=len(x), seed=SEED)


def around(k: int, n_latents: int) -> list[int]:
    """k' from k / 4 to 4 k, at most N; k / 2, k and 2 k are among them."""
    found = {min(n_latents, max(1, round(k * 2 ** (half / 2)))) for half in range(-4, 5)}
    return sorted(found | {max(1, k // 2), k})


@torch.no_grad()
def _errors(sae: SAE, x: Tensor, k: int) -> dict[str, np.ndarray]:
    """||x - x_hat||^2 of each row, float64 [rows], by the SAE's own code ("nmse") and each other one ("topk 8")."""
    decoder, ks = linear_decoder(sae, x), around(k, sae.shape.n_latents)
    own, ranked = _ranked(sae, x, min(sae.shape.n_latents, 2 * ks[-1]))
    # Where all that is kept of a row exceeds the lowest threshold, there may be more that does.
    while _more_exceed(ranked, _thresholds(ranked.scores, ks[-1:])[0]) and (
        (width := ranked.scores.shape[1]) < sae.shape.n_latents
    ):
        ranked = _ranked(sae, x, min(sae.shape.n_latents, 2 * width))[1]
    of_thresholds = {
        f"jumprelu {at}": (ranked.scores >= threshold).sum(dim=1, keepdim=True)
        for at, threshold in zip(ks, _thresholds(ranked.scores, ks), strict=True)
        if threshold > -np.inf
    }
    columns = {"nmse": own.cpu().numpy()} | _nested(decoder, x, ranked, {f"topk {at}": at for at in ks})
    return columns | _nested(decoder, x, ranked, of_thresholds)


def _ranked(sae: SAE, x: Tensor, width: int) -> tuple[Tensor, Ranked]:
    """||x - x_hat||^2 by the SAE's own code, float64 [rows], and the `width` best candidates of each row."""
    own, parts = [], []
    for rows in x.split(max(1, CHUNK_ENTRIES // sae.shape.n_latents)):
        forward = sae.forward(rows)
        own.append((rows - forward.x_hat).double().square().sum(dim=1))
        scores, values = sae.candidates(forward)
        _require_values(sae, forward, values)
        best = scores.masked_fill(~(values > 0), -torch.inf).topk(width, dim=1)
        none = best.values == -torch.inf
        parts.append(
            Ranked(
                best.values,
                best.indices.int().masked_fill_(none, -1),
                values.gather(1, best.indices).masked_fill_(none, 0),
            )
        )
    return torch.cat(own), Ranked(*map(torch.cat, zip(*parts, strict=True)))


def _require_values(sae: SAE, forward: Forward, values: Tensor) -> None:
    latents = forward.latents
    off = (values - latents).masked_fill(latents == 0, 0).abs()
    if values.shape != latents.shape or off.max() > _TOLERANCE * latents.abs().max():
        raise SaescaleError(
            f"active latents of {sae.name} are not its pre-activations, so it has to define `candidates` as well "
            "(trainers/architectures/architecture.py)"
        )


def _thresholds(scores: Tensor, ks: Sequence[int]) -> np.ndarray:
    """Of each k the k * rows-th largest of all `scores` [rows, width >= k], float32 [ks]; -inf where there are not so
    many."""
    places = np.array(ks) * len(scores) - 1
    return -np.partition(-scores.cpu().numpy().ravel(), places)[places]


def _more_exceed(ranked: Ranked, threshold: float) -> bool:
    last = ranked.scores[:, -1]
    return bool(((last > -torch.inf) & (last >= threshold)).any())


def _nested(decoder: Decoder, x: Tensor, ranked: Ranked, codes: Mapping[str, Tensor | int]) -> dict[str, np.ndarray]:
    """||x - x_hat||^2, float64 [rows], by the first candidates of each row: as many as each of `codes` says, an int or
    [rows, 1], none of which is below the one before it: what it has beyond that one is taken off its error."""
    found, error, b = {}, x, decoder.b.contiguous()
    place = torch.arange(ranked.scores.shape[1], device=x.device)[None]
    before: Tensor | int = 0
    for code, counts in codes.items():
        own = ((place >= before) & (place < counts)).expand(len(x), -1)
        width = max(1, int(own.sum(dim=1).max()))
        # Those are a run of places of each row, which is moved to its beginning.
        at = (place[:, :width] + before).clamp_max_(place.shape[1] - 1).expand(len(x), -1)
        kept = own.gather(1, at)
        selected = Selected(
            ranked.indices.gather(1, at).masked_fill_(~kept, -1), ranked.values.gather(1, at).masked_fill_(~kept, 0)
        )
        left = torch.empty_like(x)
        kernels(x.device).decode(error, b, selected, decoder.W.contiguous(), None, left)
        found[code] = left.double().square().sum(dim=1).cpu().numpy()
        error, b, before = left, torch.zeros_like(b), counts
    return found
