"""How well patterns of tokens explain latents: Neuron to Graph (Foote et al. 2023) as Gao et al. 2024, section 4.3.

A latent is explained by up to 8 tokens on which it is active, of one half of the held-out documents:

1. the context is cut behind the token, and before it as far as the latent keeps half of its activation there: the
   shortest such piece of 1 to 8 tokens (behind BOS, as in the harvest);
2. each token of the piece, the last one too, is replaced by a padding token (EOS); where 1 - new / old is below 0.5,
   any token may stand there;
3. what is left is a pattern, such as `of * the`, and the latent is predicted to be active wherever one of its patterns
   ends. (A trie of reversed patterns, as in the paper, walks them together and predicts the same.)

A token for which no such piece is found gives no pattern. On the other half of the documents:

| metric | what |
|---|---|
| `recall` | share of the tokens on which it is active that are predicted |
| `precision` | share of the predicted tokens on which it is active; without a prediction there is none |
| `f1` | their harmonic mean, 0 without a prediction |
| `explained` | share of the tokens looked at that gave a pattern |

Each is given of every latent (`at`), with the tokens behind it as `n`, and as the mean over latents, with an interval
over them. Latents are drawn among those that fire in both halves (sample.py). The tokens are drawn uniformly, not the
strongest, as it is recall over all activations that is asked for; the paper looks at whole contexts, where 8 tokens are
the most here. Cost: a latent takes some 100 short forward passes to the site, and those of a piece of text are
shared by all latents and cells that ask for it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.firing import Firing, firing
from saescale.trainers.evals.intervals import SEED, mean_of
from saescale.trainers.evals.sample import latents_to_look_at
from saescale.trainers.evals.splice import TOKENS_AT_A_TIME, places_of
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.make_shard import prefix_of
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import ReadsText, Subject

ROWS = 16_384  # of the store, at most; those of half of the documents explain, the others judge
EXAMPLES = 8  # tokens of a latent that explanations are made of
LONGEST = 8  # tokens of a pattern
KEPT = 0.5  # share of the activation that a piece has to keep, and below which a token's weight is none
KEPT_BYTES = 2**28  # of streams at the end of pieces; then they are run again
ANY = -1  # in a pattern: whatever token; there is one, though

needs: frozenset[Need] = frozenset({"subject", "text"})
latents = 16
metrics = {
    "recall": Metric("higher", bounded=True),
    "precision": Metric("higher", bounded=True),
    "f1": Metric("higher", bounded=True),
    "explained": Metric("higher", bounded=True),
}

Pattern = tuple[int, ...]  # token ids or ANY, in the order of the text
Piece = tuple[int, ...]  # token ids without the prefix


class Prepared(NamedTuple):
    subject: Subject
    site: Site
    prefix: Piece  # what stands before the tokens of each context and is no row: BOS
    pad: int
    raw: Tensor  # [rows, d_model], 16 bits, as stored
    tails: np.ndarray  # int64 [rows, LONGEST]: each row's token and those before it, the row's last; -2 before the text
    judges: np.ndarray  # bool [rows]: of the documents that judge
    turn: np.ndarray  # int64 [rows], an order that was drawn
    seen: dict[Piece, Tensor]  # the stream at the last token of pieces that were run so far, [d_model]


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Raises SaescaleError where the subject has no token to pad with, or all rows are of one document."""
    assert isinstance(subject, ReadsText), "it is in `needs`"
    pad = subject.bos_token_id if subject.eos_token_id is None else subject.eos_token_id
    if pad is None:
        raise SaescaleError(f"the tokenizer of {subject.name} has neither EOS nor BOS, so there is nothing to pad with")
    places = places_of(source, subject, ROWS)
    rows = source.heldout(len(places.pos), ("act", "doc"))
    prefix = tuple(prefix_of(subject)[0])
    length = max(map(len, places.contexts))
    padded = np.full((len(places.contexts), LONGEST - 1 + length), -2, np.int64)
    for line, ids in enumerate(places.contexts):
        padded[line, LONGEST - 1 + len(prefix) : LONGEST - 1 + len(ids)] = ids[len(prefix) :]
    tails = padded[places.context[:, None], places.pos[:, None] + np.arange(LONGEST)]
    draw = np.random.default_rng(SEED)
    documents, of_row = np.unique(rows.doc, return_inverse=True)
    judges = (draw.permutation(len(documents)) < len(documents) // 2)[of_row]
    if not judges.any():
        raise SaescaleError("all held-out rows are of one document, and one explains while another judges")
    raw, turn = to_tensor(rows.act, source.dtype), draw.permutation(len(rows.doc))
    return Prepared(subject, source.site, prefix, pad, raw, tails, judges, turn, {})


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: Prepared, latents: int
) -> Iterator[Measurement]:
    active = firing(trained, prepared.raw)
    in_both = np.minimum(active.fired_on(prepared.judges), active.fired_on(~prepared.judges))
    chosen = latents_to_look_at(in_both, latents)
    if not len(chosen):
        raise SaescaleError("no latent is active in both halves of the held-out documents; harvest more held-out rows")
    examples = _examples(active, chosen, prepared)
    patterns = explain(trained, prepared, examples)
    tails = prepared.tails[prepared.judges]
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for latent in chosen.tolist():
        own = [pattern for example, pattern in zip(examples, patterns, strict=True) if example.latent == latent]
        given = [pattern for pattern in own if pattern is not None]
        fires = np.zeros(len(prepared.judges), bool)
        fires[active.of(latent)[0]] = True
        fires, predicted = fires[prepared.judges], matches(given, tails)
        both = int((fires & predicted).sum())
        n_fires, n_predicted = int(fires.sum()), int(predicted.sum())
        of_latent = {
            "recall": (both / n_fires, n_fires),
            "precision": (both / n_predicted if n_predicted else np.nan, n_predicted),
            "f1": (2 * both / (n_fires + n_predicted), n_fires + n_predicted),
            "explained": (len(given) / len(own), len(own)),
        }
        for name, (value, n) in of_latent.items():
            if np.isfinite(value):
                found[name].append(value)
                yield Measurement(name, value, at=str(latent), n=n, seed=SEED)
    for name, values in found.items():
        if values:
            yield Measurement(name, *mean_of(np.array(values)), n=len(values), seed=SEED)


class Example(NamedTuple):
    """A token on which a latent is active, `value` of it; `tail`: that token and those before it, the oldest first."""

    latent: int
    value: float
    tail: Piece


def explain(trained: Trained, prepared: Prepared, examples: Sequence[Example]) -> list[Pattern | None]:
    """The pattern of each example; None where no piece of up to 8 tokens keeps half of the activation."""
    pieces: dict[int, tuple[Piece, float]] = {}  # of each example that is done, with the activation that it keeps
    for length in range(1, LONGEST + 1):
        left = [i for i, example in enumerate(examples) if i not in pieces and len(example.tail) >= length]
        tried = [examples[i].tail[-length:] for i in left]
        kept = activations(trained, prepared, tried, [examples[i].latent for i in left])
        for i, piece, value in zip(left, tried, kept.tolist(), strict=True):
            if value >= KEPT * examples[i].value:
                pieces[i] = piece, value
    padded = [
        (i, place, (*piece[:place], prepared.pad, *piece[place + 1 :]))
        for i, (piece, _) in pieces.items()
        for place in range(len(piece))
    ]
    without = activations(trained, prepared, [piece for *_, piece in padded], [examples[i].latent for i, *_ in padded])
    found: list[list[int] | None] = [list(pieces[i][0]) if i in pieces else None for i in range(len(examples))]
    for (i, place, _), value in zip(padded, without.tolist(), strict=True):
        pattern = found[i]
        if pattern is not None and 1 - value / pieces[i][1] < KEPT:
            pattern[place] = ANY
    return [None if pattern is None else tuple(pattern) for pattern in found]


def activations(trained: Trained, prepared: Prepared, pieces: Sequence[Piece], latents: Sequence[int]) -> np.ndarray:
    """What the latent of each piece is at its last token, float32 [pieces]."""
    if not pieces:
        return np.empty(0, np.float32)
    if len(prepared.seen) * prepared.raw.shape[1] * 4 > KEPT_BYTES:
        prepared.seen.clear()
    new: dict[int, list[Piece]] = {}
    for piece in dict.fromkeys(pieces):
        if piece not in prepared.seen:
            new.setdefault(len(piece), []).append(piece)
    for length, of_length in new.items():
        at_a_time = max(1, TOKENS_AT_A_TIME // (len(prepared.prefix) + length))
        for start in range(0, len(of_length), at_a_time):
            some = of_length[start : start + at_a_time]
            ids = torch.tensor([prepared.prefix + piece for piece in some], dtype=torch.int32)
            stream = prepared.subject.run(ids, [prepared.site]).resid[0][:, -1]
            prepared.seen.update(zip(some, stream.clone(), strict=True))
    found = np.empty(len(pieces), np.float32)
    at_a_time = max(1, CHUNK_ENTRIES // trained.sae.shape.n_latents)
    for start in range(0, len(pieces), at_a_time):
        part = slice(start, start + at_a_time)
        encoded = trained.encode(torch.stack([prepared.seen[piece] for piece in pieces[part]])).cpu()
        found[part] = encoded[torch.arange(len(encoded)), torch.tensor(latents[part])].numpy()
    return found


def matches(patterns: Sequence[Pattern], tails: np.ndarray) -> np.ndarray:
    """Whether any of the patterns ends at the token, bool [rows]; `tails` as in Prepared."""
    found = np.zeros(len(tails), bool)
    for pattern in set(patterns):
        here = np.array(pattern)
        last = tails[:, len(tails[0]) - len(here) :]
        found |= ((last == here) | ((here == ANY) & (last >= 0))).all(axis=1)
    return found


def _examples(active: Firing, chosen: np.ndarray, prepared: Prepared) -> list[Example]:
    """Of each latent the first tokens, in the drawn order, of the documents that explain."""
    found = []
    for latent in chosen.tolist():
        rows, values = active.of(latent)
        explains = ~prepared.judges[rows]
        rows, values = rows[explains], values[explains]
        for place in np.argsort(prepared.turn[rows])[:EXAMPLES]:
            tail = prepared.tails[rows[place]]
            found.append(Example(latent, float(values[place]), tuple(tail[tail >= 0].tolist())))
    return found
