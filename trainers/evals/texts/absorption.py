"""Feature absorption of first letters: where the latent of a letter is silent as that of a word has taken its part.

Chanin et al. 2024 (2409.14507), with the scores of SAEBench 0.6 (absorption). Words are tokens of held-out text that
are a space and letters; their types (not their documents) are halved, and of a type up to 4 tokens count.

1. On one half a linear probe (logistic regression over letters) learns the first letter from rows x, preprocessed and
   less their mean; p is a letter's direction, of norm 1. Only letters with 8 types and more in each half count.
2. Main latents of a letter: the one whose firing tells the letter best, by F1 on that half, and more as long as that
   any of them fires tells it better by more than 0.03 (a feature that is split).
3. On words of the other half whose letter the probe finds, with p x > 0:
   - absorbed in full: no main latent fires, and the latent of the largest z_i d_i p (d_i its decoder row) has
     cos(d_i, p) >= 0.025 and z_i d_i p >= 0.4 p x;
   - absorbed to a fraction a / (a + m): m is the sum of z_i d_i p over main latents, a over the three largest of those
     others with cos >= 0.1, but at most p x - m; 0 where that sum is below 0.4 p x or m >= p x, and 1 where m <= 0.

| metric | what |
|---|---|
| `full`, `fraction` | share of the words, and mean of the fractions; over letters |
| `silent` | share of the words on which no main latent fires, absorbed or not; over letters |
| `mains` | number of main latents of a letter; mean over letters |
| `main_f1` | F1 of "any main latent fires" on the other half; mean over letters |
| `probe_accuracy` | of the probe on words of the other half; of no cell |

`at` is a letter. Where `main_f1` is low no latent stands for a letter, and then `full` says little. SAEBench asks for
the letter of words of the vocabulary in a prompt with examples, has rows uncentred, and finds main latents by k-sparse
probes; here words stand in their text, so that the rows are those of the store and no forward pass is needed. Intervals
are over types. Cost: one encoding of some 3,000 rows a cell.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.firing import Firing, firing
from saescale.trainers.evals.intervals import SEED, Sums, by_document, mean_of
from saescale.trainers.evals.texts.spelling import token_texts
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject

ROWS = 32_768  # of the store among which words are found, at most
TOKENS = 4  # of a type
TYPES = 8  # of a letter in each half, at least
SPLIT_GAIN, SPLITS = 0.03, 10  # of F1 that another main latent has to bring; main latents, at most
CANDIDATES = 32  # for those, by their own F1
DECAY, ITERATIONS = 1e-3, 60  # of the probe
FULL_COSINE, FRACTION_COSINE, SHARE, ABSORBERS = 0.025, 0.1, 0.4, 3

needs: frozenset[Need] = frozenset({"subject", "text"})
metrics = {
    "full": Metric("lower", bounded=True),
    "fraction": Metric("lower", bounded=True),
    "silent": Metric("lower", bounded=True),
    "main_f1": Metric("higher", bounded=True),
}


class Prepared(NamedTuple):
    """Words of both halves, each a row."""

    raw: Tensor  # [words, d_model], 16 bits, as stored
    type: np.ndarray  # int64 [words], token ids
    letter: np.ndarray  # int64 [words], a place in `letters`
    letters: str  # those that count
    learns: np.ndarray  # bool [words]: of the half that probe and main latents are found on
    directions: Tensor  # [letters, d_model], of norm 1
    projection: np.ndarray  # float64 [words]: of the centred row on its own letter's direction
    correct: np.ndarray  # bool [words]: the probe finds the letter


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Raises SaescaleError where the text has too few words."""
    assert subject is not None, "it is in `needs`"
    number = len(source.heldout(columns=("token",)).token)
    rows = source.heldout(min(ROWS, number), ("act", "token"))
    return prepared_of(to_tensor(rows.act, source.dtype), rows.token, token_texts(subject, np.unique(rows.token)))


def prepared_of(raw: Tensor, token: np.ndarray, texts: dict[int, str]) -> Prepared:
    """From rows [rows, d_model], their tokens and what these spell."""
    first = {number: text[1].lower() for number, text in texts.items() if re.fullmatch(" [A-Za-z]{2,}", text)}
    draw = np.random.default_rng(SEED)
    learning, letters = set(), ""
    for letter in sorted(set(first.values())):
        types = [number for number in sorted(first) if first[number] == letter]
        if len(types) >= 2 * TYPES:
            letters += letter
            learning.update(draw.permutation(types)[: len(types) // 2].tolist())
    if len(letters) < 2:
        raise SaescaleError(
            f"fewer than two letters begin {2 * TYPES} words of the held-out text each; harvest more held-out tokens"
        )
    counted = np.flatnonzero([first.get(number, "-") in letters for number in token.tolist()])
    counted = draw.permutation(counted)
    by_type = counted[np.argsort(token[counted], kind="stable")]
    _, starts, numbers = np.unique(token[by_type], return_index=True, return_counts=True)
    words = by_type[np.arange(len(by_type)) - np.repeat(starts, numbers) < TOKENS]
    of_words = np.array([letters.index(first[number]) for number in token[words].tolist()])
    learns = np.isin(token[words], list(learning))
    x = normalise(raw[words])
    x -= x[learns].mean(dim=0)
    weights, bias = _probe(x[learns], torch.from_numpy(of_words[learns]), len(letters))
    directions = torch.nn.functional.normalize(weights, dim=1)
    projection = (x * directions[of_words]).sum(dim=1).double().numpy()
    correct = (x @ weights.T + bias).argmax(dim=1).numpy() == of_words
    return Prepared(
        raw[words], token[words].astype(np.int64), of_words, letters, learns, directions, projection, correct
    )


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    active = firing(trained, prepared.raw)
    W = directions_of(trained, prepared.raw).cpu()
    towards = (W @ prepared.directions.T).numpy()  # [n_latents, letters]
    cosines = towards / W.norm(dim=1, keepdim=True).clamp_min(1e-20).numpy()
    mains, f1 = [], []
    columns: dict[str, np.ndarray] = {}
    for place, letter in enumerate(prepared.letters):
        mains.append(main_latents(active, prepared, place))
        judged = prepared.correct & (prepared.letter == place) & ~prepared.learns & (prepared.projection > 0)
        words = np.flatnonzero(judged)
        absorbed = absorption(
            active, words, prepared.projection[words], mains[-1], towards[:, place], cosines[:, place]
        )
        for name, values in absorbed._asdict().items():
            columns[f"{name} {letter}"] = np.zeros(len(judged))
            columns[f"{name} {letter}"][words] = values
        columns[f"words {letter}"] = judged
        any_fires = _any(active, mains[-1], len(judged))[~prepared.learns]
        f1.append(_f1(any_fires, (prepared.letter == place)[~prepared.learns]))
    counted = [letter for letter in prepared.letters if columns[f"words {letter}"].any()]
    if not counted:
        raise SaescaleError(
            "the probe finds the first letter of no word that it has not seen; there is nothing to absorb"
        )
    names = Absorbed._fields
    n = int(sum(columns[f"words {letter}"].sum() for letter in counted))
    statistics = {name: _mean_over(name, counted) for name in names}
    judged = np.any([columns[f"words {letter}"] for letter in counted], axis=0)
    shown = {name: column[judged] for name, column in columns.items()}
    for name, found in by_document(prepared.type[judged], shown, statistics).items():
        yield Measurement(name, *found, n=n, seed=SEED)
    for letter in counted:
        own = {f"{name} {letter}": columns[f"{name} {letter}"] for name in (*names, "words")}
        of_letter = {name: _mean_over(name, [letter]) for name in names}
        words = columns[f"words {letter}"]
        for name, found in by_document(prepared.type[words], {k: v[words] for k, v in own.items()}, of_letter).items():
            yield Measurement(name, *found, at=letter, n=int(words.sum()), seed=SEED)
    yield Measurement("mains", *mean_of(np.array([len(latents) for latents in mains], float)), n=len(mains), seed=SEED)
    yield Measurement("main_f1", *mean_of(np.array(f1)), n=len(f1), seed=SEED)
    judged = ~prepared.learns
    yield Measurement("probe_accuracy", float(prepared.correct[judged].mean()), n=int(judged.sum()), seed=SEED)


def main_latents(active: Firing, prepared: Prepared, letter: int) -> list[int]:
    """Those whose firing tells that letter on the half that learns, the best one first; none where no latent fires."""
    own = prepared.letter == letter
    positive = own[prepared.learns]
    hits = active.fired_on(prepared.learns & own)
    f1 = 2 * hits / np.maximum(active.fired_on(prepared.learns) + positive.sum(), 1)
    candidates = np.argsort(-f1, kind="stable")[:CANDIDATES]
    fires = {
        i: _any(active, [i], len(prepared.learns))[prepared.learns] for i in candidates[f1[candidates] > 0].tolist()
    }
    found: list[int] = []
    so_far, best = np.zeros(len(positive), bool), 0.0
    while fires and len(found) < SPLITS:
        scores = {i: _f1(so_far | also, positive) for i, also in fires.items()}
        latent = max(scores, key=lambda i: scores[i])
        if scores[latent] <= best + (SPLIT_GAIN if found else 0):
            break
        best = scores[latent]
        so_far = so_far | fires.pop(latent)
        found.append(latent)
    return found


class Absorbed(NamedTuple):
    """Of each word, float64 [words]."""

    full: np.ndarray
    fraction: np.ndarray
    silent: np.ndarray


def absorption(
    active: Firing, words: np.ndarray, projection: np.ndarray, mains: list[int], towards: np.ndarray, cosine: np.ndarray
) -> Absorbed:
    """Of `words`, rows of `active` that ascend, whose `projection` on the letter's direction is above 0.

    `towards` float32 [n_latents] is d_i p, `cosine` that of d_i and p.
    """
    latent = active.latents
    place = np.searchsorted(words, active.rows)
    here = np.isin(active.rows, words)
    latent, place = latent[here], place[here]
    part = active.values[here].astype(np.float64) * towards[latent]  # z_i d_i p of each active pair
    main = np.isin(latent, mains)
    silent = np.bincount(place[main], minlength=len(words)) == 0
    by_mains = np.bincount(place[main], part[main], len(words))

    largest = np.full(len(words), -1, np.int64)
    order = np.lexsort((part, place))
    ends = np.cumsum(np.bincount(place, minlength=len(words))) - 1
    some = np.bincount(place, minlength=len(words)) > 0
    largest[some] = order[ends[some]]
    strong = np.zeros(len(words), bool)
    top = largest[some]
    strong[some] = (cosine[latent[top]] >= FULL_COSINE) & (part[top] >= SHARE * projection[some])

    others = np.flatnonzero(~main & (cosine[latent] >= FRACTION_COSINE) & (part > 0))
    others = others[np.lexsort((-part[others], place[others]))]
    _, starts, numbers = np.unique(place[others], return_index=True, return_counts=True)
    others = others[np.arange(len(others)) - np.repeat(starts, numbers) < ABSORBERS]
    by_others = np.bincount(place[others], part[others], len(words))
    taken = np.minimum(by_others, projection - by_mains)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(by_mains <= 0, 1.0, taken / (taken + by_mains))
    fraction[(by_mains >= projection) | (by_others < SHARE * projection)] = 0
    return Absorbed((silent & strong).astype(float), fraction, silent.astype(float))


def _probe(x: Tensor, letter: Tensor, letters: int) -> tuple[Tensor, Tensor]:
    """Weights [letters, d_model] and bias [letters] of a logistic regression over letters."""
    scale = x.std()
    weights = torch.zeros(letters, x.shape[1], requires_grad=True)
    bias = torch.zeros(letters, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        cross_entropy = torch.nn.functional.cross_entropy(x / scale @ weights.T + bias, letter)
        total: Tensor = cross_entropy + DECAY * weights.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach() / scale, bias.detach()


def _any(active: Firing, latents: list[int], rows: int) -> np.ndarray:
    """Whether any of the latents fires, bool [rows]."""
    found = np.zeros(rows, bool)
    for latent in latents:
        found[active.of(latent)[0]] = True
    return found


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    both = int((predicted & true).sum())
    return 2 * both / max(1, int(predicted.sum() + true.sum()))


def _mean_over(name: str, letters: list[str]) -> Callable[[Sums], np.ndarray]:
    """The share of words of each letter, and of those the mean; letters without a word in a resample are left out."""
    return lambda sums: np.nanmean([sums[f"{name} {letter}"] / sums[f"words {letter}"] for letter in letters], axis=0)
