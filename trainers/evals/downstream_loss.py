"""What the subject loses when x_hat takes the place of x (Gao et al. 2024, section 4.1; paper.md).

Held-out contexts are read again. At each position that is a row of the store, the residual stream at the site becomes
x_hat with the token's own mean and norm put back; elsewhere (BOS, what was dropped) it stays. What the model then says
of the next token is compared, in nats a token, over the positions that were replaced and have a next token:

| metric | what |
|---|---|
| `kl` | KL(p of the model as it is || p with x_hat) |
| `ce`, `ce_original` | cross-entropy with x_hat, and of the model as it is |
| `ce_zero`, `ce_mean` | with 0 in place of x, and with the mean of x over those positions |
| `ce_increase` | ce - ce_original |
| `recovered_zero`, `recovered_mean` | (ce_zero - ce) / (ce_zero - ce_original), and the same with the mean |

A share of what an ablation costs is left out where it may cost nothing (its interval reaches 0).
`kl` and `ce_increase` are given by position as well (`at`; a context of more than 64 in 64 ranges). Intervals are over
documents. The model as it is and the two ablations are run once for all cells, and the blocks before the site once:
a cell costs a pass through the blocks behind it over 8,192 tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.trainers.evals.evaluation import LeftOut, Measurement, Need, Unsuited
from saescale.trainers.evals.intervals import SEED, Sums, by_document, ratio
from saescale.trainers.evals.splice import Contexts, heldout_contexts, logits_from
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject

TOKENS = 8_192  # rows of the store whose contexts are read, at least
KEPT_BYTES = 2**31  # of logits of the model as it is; where they are more, they are computed again for each cell
RANGES = 64  # of positions

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    "kl": Metric("lower"),
    "ce": Metric("lower", limit="ce_original"),
    "ce_increase": Metric("lower"),
    "recovered_zero": Metric("higher", limit=1.0),
    "recovered_mean": Metric("higher", limit=1.0),
}


class _Read(NamedTuple):
    """Some contexts, and the model as it is on them."""

    contexts: Contexts
    resid: Tensor  # [contexts, length, d_model], of the subject's dtype, at the site
    logits: Tensor | None  # [contexts, length, vocabulary]; None where they are not kept
    counted: np.ndarray  # bool [contexts, length - 1]: positions that the metrics are over


class _Loss(NamedTuple):
    """Of each token that counts, float64 [tokens]."""

    ce: np.ndarray
    kl: np.ndarray


class Prepared(NamedTuple):
    subject: Subject
    site: Site
    read: list[_Read]
    doc: np.ndarray  # [tokens], of each token that counts
    pos: np.ndarray
    original: np.ndarray  # cross-entropies, [tokens]
    zero: _Loss
    mean: _Loss


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """The model as it is, and with each ablation. Raises SaescaleError where it gives no logits."""
    assert subject is not None, "it is in `needs`"
    read: list[_Read] = []
    original, kept = [], 0
    for contexts in heldout_contexts(source, subject, TOKENS):
        run = subject.run(contexts.ids, [source.site], logits=True)
        if run.logits is None:
            raise Unsuited(f"the subject {subject.name} gives no logits, so nothing is lost that could be measured")
        counted = contexts.keep[:, :-1].numpy()
        kept += run.logits.nbytes
        read.append(_Read(contexts, run.resid[0], run.logits if kept <= KEPT_BYTES else None, counted))
        original.append(_cross_entropy(run.logits, contexts.ids)[counted])
    doc = np.concatenate([part.contexts.doc[:, :-1][part.counted] for part in read])
    if not len(doc):
        raise SaescaleError("no held-out row has a next token in its context")
    pos = np.concatenate([np.nonzero(part.counted)[1] for part in read])
    rows = torch.cat([part.resid[part.contexts.keep.to(part.resid.device)] for part in read]).float()
    shared = Prepared(subject, source.site, read, doc, pos, np.concatenate(original), *(2 * [_Loss(doc, doc)]))
    zero = _losses(shared, torch.zeros_like)
    mean = _losses(shared, lambda raw: rows.mean(dim=0).expand_as(raw))
    return shared._replace(zero=zero, mean=mean)


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: Prepared
) -> Iterator[Measurement | LeftOut]:
    patched = _losses(prepared, trained.reconstruct)
    columns = {
        "tokens": np.ones(len(prepared.doc)), "original": prepared.original, "ce": patched.ce, "kl": patched.kl,
        "zero": prepared.zero.ce, "mean": prepared.mean.ce,
    }  # fmt: skip
    statistics: dict[str, Callable[[Sums], np.ndarray]] = {
        "kl": ratio("kl", "tokens"),
        "ce": ratio("ce", "tokens"),
        "ce_original": ratio("original", "tokens"),
        "ce_zero": ratio("zero", "tokens"),
        "ce_mean": ratio("mean", "tokens"),
        "ce_increase": _increase("ce"),
    }
    costs = {name: _increase(name) for name in ("zero", "mean")}
    for name, cost in by_document(prepared.doc, columns, costs).items():
        # A document alone has no interval.
        if (cost.value if cost.low is None else cost.low) > 0:
            statistics[f"recovered_{name}"] = _recovered(name)
        else:
            instead = "0" if name == "zero" else "the mean"
            yield LeftOut(f"recovered_{name}", f"with {instead} in place of x the loss may be no higher than with x")
    for name, found in by_document(prepared.doc, columns, statistics).items():
        yield Measurement(name, *found, n=len(prepared.doc), seed=SEED)
    begin = int(prepared.pos.min())
    width = -(-int(prepared.pos.max() + 1 - begin) // RANGES)
    of_position = {"kl": statistics["kl"], "ce_increase": statistics["ce_increase"]}
    for number in np.unique((prepared.pos - begin) // width):
        here = (prepared.pos - begin) // width == number
        first = begin + int(number) * width
        last = first + width - 1
        at = f"position {first}" if width == 1 else f"positions {first} to {last}"
        own = {name: column[here] for name, column in columns.items()}
        for name, found in by_document(prepared.doc[here], own, of_position).items():
            yield Measurement(name, *found, at=at, n=int(here.sum()), seed=SEED)


def _increase(of: str) -> Callable[[Sums], np.ndarray]:
    return lambda sums: np.asarray((sums[of] - sums["original"]) / sums["tokens"])


def _recovered(ablation: str) -> Callable[[Sums], np.ndarray]:
    return lambda sums: np.asarray((sums[ablation] - sums["ce"]) / (sums[ablation] - sums["original"]))


def _losses(prepared: Prepared, instead: Callable[[Tensor], Tensor]) -> _Loss:
    """With what `instead` gives for the rows x, float32 [rows, d_model], in their place."""
    ce, kl = [], []
    for part in prepared.read:
        ids, keep = part.contexts.ids, part.contexts.keep.to(part.resid.device)
        resid = part.resid.clone()
        resid[keep] = instead(part.resid[keep].float()).to(resid)
        logits = logits_from(prepared.subject, ids, prepared.site, resid)
        original = part.logits
        if original is None:
            original = logits_from(prepared.subject, ids, prepared.site, part.resid)
        ce.append(_cross_entropy(logits, ids)[part.counted])
        kl.append(_divergence(original[:, :-1], logits[:, :-1])[part.counted])
    return _Loss(np.concatenate(ce), np.concatenate(kl))


def _cross_entropy(logits: Tensor, ids: Tensor) -> np.ndarray:
    """Of each next token, float64 [contexts, length - 1]."""
    # One context at a time here and below: float32 copies of a batch are hundreds of megabytes.
    found = []
    for of_context, tokens in zip(logits[:, :-1], ids[:, 1:].long().to(logits.device), strict=True):
        whole = of_context.float()
        found.append(whole.logsumexp(dim=1) - whole.gather(1, tokens[:, None])[:, 0])
    return torch.stack(found).double().cpu().numpy()


def _divergence(original: Tensor, patched: Tensor) -> np.ndarray:
    """KL(original || patched) of each token, float64 [contexts, tokens]: sum p (logits - logits of the patched one),
    and the difference of the normalisers."""
    found = []
    for before, after in zip(original, patched, strict=True):
        p, q = before.float(), after.float()
        normaliser = p.logsumexp(dim=1)
        weighted = ((p - normaliser[:, None]).exp_() * (p - q)).sum(dim=1)
        found.append(weighted - normaliser + q.logsumexp(dim=1))
    return torch.stack(found).double().cpu().numpy()
