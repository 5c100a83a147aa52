"""On how few logits a latent acts: what is left of the subject's logits when it is taken out (Gao et al. 2024, 4.4).

One active latent is set to zero at one position, x' = x - z_i ||x - mean(x)|| W_dec,i with all else of x as it is (what
the SAE does not reconstruct too), and the rest of the subject is run. Of the differences of the logits at that position
and the 15 that follow (V tokens of the vocabulary, T = 16 positions) the median of each position is taken off, as what
is common to all tokens changes nothing, and

    sparsity = (L1 / L2)^2 / (V T)

is the share of the V T numbers that it acts on: 1 where all are alike, 1 / (V T) of one alone, 2 / pi of noise.

| metric | what |
|---|---|
| `sparsity` | mean over latents of that of each, itself a mean over up to 3 contexts; `at` a latent: its own |
| `sparsity_channels` | the same of single channels of the residual stream, set to their mean over rows; of no cell |

Latents are drawn among those that fire (sample.py); each is looked at in the first contexts, in an order that is drawn
once, in which it is active with 15 tokens behind it. So cells are compared on the same text as far as that goes.
Intervals are over latents (channels). A channel is set to its mean and not to zero, which a latent is when it is taken
out: zero is far from where some channels ever are.

Differences are of the subject's own arithmetic. Those of a bfloat16 subject have rounding noise on all logits, which
hides sparsity of small effects: compare cells of one subject on one kind of machine. Cost: a pass through the blocks
behind the site over a whole context for each latent and context, and for each context, 96 and some 30 of them a cell.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.firing import firing
from saescale.trainers.evals.intervals import SEED, mean_of
from saescale.trainers.evals.sample import latents_to_look_at
from saescale.trainers.evals.splice import TOKENS_AT_A_TIME, logits_from, places_of
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.retrace import Places
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import Subject

ROWS = 8_192  # of the store among which latents are looked for, at most
POSITIONS = 16  # T: the one at which something is ablated among them
CONTEXTS = 3  # of each latent
CHANNELS = 32
KEPT_BYTES = 2**29  # of streams of contexts; then they are run again

needs: frozenset[Need] = frozenset({"subject"})
latents = 32
metrics = {"sparsity": Metric("lower", bounded=True)}


class Prepared(NamedTuple):
    subject: Subject
    site: Site
    places: Places  # of the rows
    raw: Tensor  # [rows, d_model], 16 bits, as stored
    turn: np.ndarray  # int64 [rows], see `first_rows`; -1 where too few tokens follow
    streams: dict[int, Tensor]  # at the site, [length, d_model], of the contexts that were needed so far
    channels: dict[int, np.ndarray]  # sparsities of each at its rows


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """What cells share, the channels among it. Raises SaescaleError where no row has 15 tokens behind it, and where the
    subject gives no logits."""
    assert subject is not None, "it is in `needs`"
    places = places_of(source, subject, ROWS)
    raw = to_tensor(source.heldout(len(places.pos)).act, source.dtype)
    draw = np.random.default_rng(SEED)
    order = np.lexsort((draw.permutation(len(raw)), draw.permutation(len(places.contexts))[places.context]))
    turn = np.empty(len(raw), np.int64)
    turn[order] = np.arange(len(raw))
    lengths = np.array([len(ids) for ids in places.contexts])
    turn[places.pos + POSITIONS > lengths[places.context]] = -1
    if not (turn >= 0).any():
        raise SaescaleError(
            f"no held-out row has {POSITIONS - 1} tokens behind it in its context; harvest longer contexts"
        )
    prepared = Prepared(subject, source.site, places, raw, turn, {}, {})
    mean, everywhere = raw.float().mean(dim=0), np.arange(len(raw))
    for number, channel in enumerate(np.sort(draw.permutation(raw.shape[1])[:CHANNELS]).tolist()):
        rows = first_rows(prepared, everywhere, skip=number)
        change = torch.zeros(len(rows), raw.shape[1])
        change[:, channel] = mean[channel] - raw[rows, channel].float()
        prepared.channels[channel] = sparsities(prepared, rows, change)
    return prepared


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: Prepared, latents: int
) -> Iterator[Measurement]:
    active, directions = firing(trained, prepared.raw), directions_of(trained, prepared.raw).cpu()
    # Of all ablations those in one context are run together, so all are listed first.
    of_each: dict[int, int] = {}
    rows: list[int] = []
    changes: list[Tensor] = []
    for latent in latents_to_look_at(active.fired_on(prepared.turn >= 0), latents).tolist():
        where, values = active.of(latent)
        chosen = first_rows(prepared, where)
        raw = prepared.raw[chosen].float()
        norm = (raw - raw.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
        z = torch.from_numpy(values[np.searchsorted(where, chosen)])[:, None]
        changes.append(-z * norm * directions[latent])
        rows += chosen
        of_each[latent] = len(chosen)
    if not rows:
        raise SaescaleError(f"no latent is active on a held-out row with {POSITIONS - 1} tokens behind it")
    ends = np.cumsum(list(of_each.values()))[:-1]
    found = dict(zip(of_each, np.split(sparsities(prepared, rows, torch.cat(changes)), ends), strict=True))
    yield from _summary("sparsity", found)
    for latent, values in found.items():
        if np.isfinite(values).any():
            yield Measurement("sparsity", float(np.nanmean(values)), at=str(latent), n=len(values), seed=SEED)
    yield from _summary("sparsity_channels", prepared.channels)


def first_rows(prepared: Prepared, rows: np.ndarray, skip: int = 0) -> list[int]:
    """Of `rows` one of each of the first contexts that have any; `skip`: the order begins so many contexts later.

    Contexts come in an order that was drawn, the same for all latents and cells, and rows of one by lot.
    """
    rows = rows[prepared.turn[rows] >= 0]
    rows = rows[np.argsort(prepared.turn[rows])]
    _, firsts = np.unique(prepared.places.context[rows], return_index=True)
    of_contexts = rows[np.sort(firsts)]
    return np.roll(of_contexts, -skip)[:CONTEXTS].tolist()


def sparsities(prepared: Prepared, rows: list[int], changes: Tensor) -> np.ndarray:
    """(L1 / L2)^2 / (V T), float64 [rows], of what each of `changes` [rows, d_model], alone, does to that row of the
    stream; NaN where that is nothing at all."""
    found = np.full(len(rows), np.nan)
    context, pos = prepared.places.context[rows], prepared.places.pos[rows]
    for number in np.unique(context):
        here = np.flatnonzero(context == number)
        ids = torch.from_numpy(prepared.places.contexts[number][: pos[here].max() + POSITIONS])
        stream = _stream(prepared, int(number))[: len(ids)]
        at_a_time = max(1, TOKENS_AT_A_TIME // len(ids) - 1)
        for some in np.split(here, range(at_a_time, len(here), at_a_time)):
            patched = stream.repeat(len(some) + 1, 1, 1)  # as it is, and with each ablation: one pass, one rounding
            patched[torch.arange(1, len(patched)), pos[some]] += changes[some].to(stream)
            logits = logits_from(prepared.subject, ids.expand(len(patched), -1), prepared.site, patched)
            for place, changed in zip(some, logits[1:], strict=True):
                after = slice(pos[place], pos[place] + POSITIONS)
                found[place] = _sparsity(changed[after].float() - logits[0, after].float())
    return found


def _sparsity(difference: Tensor) -> float:
    """Of logits [T, V]."""
    effect = (difference - difference.median(dim=1, keepdim=True).values).flatten().double()
    l1, l2 = effect.abs().sum(), effect.square().sum()
    return float(l1.square() / l2 / len(effect)) if l2 > 0 else np.nan


def _stream(prepared: Prepared, context: int) -> Tensor:
    """The stream at the site, [length, d_model]."""
    if context not in prepared.streams:
        if sum(stream.nbytes for stream in prepared.streams.values()) > KEPT_BYTES:
            prepared.streams.clear()
        ids = torch.from_numpy(prepared.places.contexts[context])[None]
        prepared.streams[context] = prepared.subject.run(ids, [prepared.site]).resid[0][0]
    return prepared.streams[context]


def _summary(metric: str, found: Mapping[int, np.ndarray]) -> Iterator[Measurement]:
    """The mean over latents or channels, each of which counts as one."""
    means = np.array([np.nanmean(values) for values in found.values() if np.isfinite(values).any()])
    if len(means):
        yield Measurement(metric, *mean_of(means), n=sum(map(len, found.values())), seed=SEED)
