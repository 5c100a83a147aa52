"""absorption of a dictionary in which it was planted, and against loops over words that follow the definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.firing import firing
from saescale.trainers.evals.texts import absorption
from saescale.trainers.evals.texts.absorption import Prepared, main_latents, measure, prepared_of
from saescale.trainers.exchange.trained import Trained
from tests.trainers.evals.cases import a_trained

D_MODEL, WORDS, ROWS = 256, 64, 5  # of a letter; of a word
LETTERS = "abc"
ABSORBED = 0.3


def basis() -> torch.Tensor:
    """Orthonormal directions [D_MODEL - 1, D_MODEL] of zero mean, which preprocessing leaves as they are."""
    draw = torch.Generator().manual_seed(0)
    columns = torch.cat([torch.ones(D_MODEL, 1), torch.randn(D_MODEL, D_MODEL - 1, generator=draw)], dim=1)
    return torch.linalg.qr(columns).Q.T[1:]


def rows() -> tuple[torch.Tensor, np.ndarray, dict[int, str]]:
    """Rows that are a letter's direction and their word's; a word is a token, and some tokens begin no word."""
    directions = basis()
    token = np.repeat(np.arange(len(LETTERS) * WORDS), ROWS)
    texts = {
        number: f" {LETTERS[number // WORDS]}{'xyz'[number % 3]}{'q' * (number % WORDS)}" for number in token.tolist()
    }
    texts[0] = texts[0].upper()
    draw = torch.Generator().manual_seed(1)
    noise = 0.005 * torch.randn(len(token), len(directions), generator=draw) @ directions
    raw = directions[token // WORDS] + directions[3 + token] + noise
    odd = {900: "ax", 901: " a1", 902: "\n", 903: " b"}
    raw = torch.cat([raw, torch.randn(len(odd), D_MODEL, generator=draw)])
    order = torch.randperm(len(raw), generator=draw)
    return raw[order].half(), np.concatenate([token, list(odd)])[order.numpy()], texts | odd


def planted(absorbed: dict[str, set[int]]) -> Trained:
    """A latent for each letter, silent on the absorbed words, and one for each of those, that decodes to both."""
    directions = basis()
    W_enc, W_dec = directions[:3].clone(), directions[:3].clone()
    of_words = []
    for place, letter in enumerate(LETTERS):
        for word in sorted(absorbed[letter]):
            W_enc[place] -= 4 * directions[3 + word]
            of_words.append((2 * directions[3 + word], directions[3 + word] + directions[place]))
    W_enc = torch.cat([W_enc, *[enc[None] for enc, _ in of_words]])
    W_dec = torch.nn.functional.normalize(torch.cat([W_dec, *[dec[None] for _, dec in of_words]]), dim=1)
    params = {"W_enc": W_enc, "b_enc": torch.full((len(W_enc),), -0.3), "W_dec": W_dec, "b_pre": torch.zeros(D_MODEL)}
    cell = Cell(
        store="s", architecture="relu", d_model=D_MODEL, n_latents=len(W_enc), k=2, tokens=64, batch_tokens=64, lr=1e-3,
        dead_after_tokens=64, ema=0.9,
    )  # fmt: skip
    return Trained(SAE("relu", Shape(D_MODEL, len(W_enc)), cell.whole_settings, params), cell)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepared_of(*rows())


def measured(trained: Trained, prepared: Prepared) -> dict[tuple[str, str], Measurement]:
    found = measure(trained, SimpleNamespace(), None, prepared)  # type: ignore[arg-type]
    return {(row.metric, row.at): row for row in found}


def test_words_are_halved_by_type_and_the_probe_tells_new_ones(prepared: Prepared) -> None:
    assert prepared.letters == LETTERS
    learned, others = set(prepared.type[prepared.learns].tolist()), set(prepared.type[~prepared.learns].tolist())
    assert not learned & others
    assert learned | others == set(range(len(LETTERS) * WORDS))  # and no token that begins no word
    assert len(learned) == len(others) == len(LETTERS) * WORDS // 2
    assert np.bincount(prepared.type).max() == absorption.TOKENS
    assert prepared.correct.all()
    cosines = prepared.directions @ basis()[:3].T
    assert (cosines.argmax(dim=1) == torch.arange(3)).all()
    assert (cosines.diagonal() > 0.7).all()


def test_planted_absorption_is_found(prepared: Prepared) -> None:
    words = {letter: np.unique(prepared.type[prepared.letter == i]) for i, letter in enumerate(LETTERS)}
    rng = np.random.default_rng(3)
    absorbed = {
        letter: set(rng.choice(own, round(ABSORBED * len(own)), replace=False)) for letter, own in words.items()
    }
    absorbed["c"] = set()
    found = measured(planted(absorbed), prepared)
    judged = ~prepared.learns
    for place, letter in enumerate(LETTERS):
        own = prepared.type[judged & (prepared.letter == place)]
        share = np.isin(own, list(absorbed[letter])).mean()
        assert found["silent", letter].value == pytest.approx(share)
        assert found["full", letter].value == pytest.approx(share)
        assert found["fraction", letter].value == pytest.approx(share)
        assert found["full", letter].n == len(own)
    assert found["full", "c"].value == 0 < found["full", "a"].value
    assert found["full", ""].value == pytest.approx(np.mean([found["full", letter].value for letter in LETTERS]))
    assert found["full", ""].low < found["full", ""].value < found["full", ""].high  # type: ignore[operator]
    assert found["mains", ""].value == 1
    assert found["probe_accuracy", ""].value == 1
    # A latent that is silent without another in its place is no absorption.
    silent = planted(absorbed)
    silent.sae.params["W_enc"][3:] = 0
    without = measured(silent, prepared)
    assert without["silent", "a"].value == found["silent", "a"].value
    assert without["full", ""].value == without["fraction", ""].value == 0


def test_scores_are_those_of_loops_over_words(prepared: Prepared) -> None:
    """A random dictionary, whose latents are active in part, aligned in part and split: every branch is taken."""
    trained = a_trained("batchtopk", prepared.raw.numpy(), n_latents=60, k=12)
    found = measured(trained, prepared)
    latents = trained.encode(prepared.raw).double().numpy()
    W = trained.sae.params["W_dec"].double().numpy()
    kinds = set()
    for place, letter in enumerate(LETTERS):
        true = prepared.letter == place
        mains: list[int] = []
        best = 0.0
        while len(mains) < 10:  # the definition, over all latents
            scores = []
            for latent in range(60):
                fires = (latents[:, [*mains, latent]] > 0).any(axis=1)[prepared.learns]
                own = true[prepared.learns]
                scores.append(2 * (fires & own).sum() / (fires.sum() + own.sum()))
            if max(scores) <= best + (0.03 if mains else 0):
                break
            best = max(scores)
            mains.append(int(np.argmax(scores)))
        assert main_latents(firing(trained, prepared.raw), prepared, place) == mains
        p = prepared.directions[place].double().numpy()
        cosine = W @ p / np.linalg.norm(W, axis=1)
        full, fractions, silent = [], [], []
        for word in np.flatnonzero(true & prepared.correct & ~prepared.learns):
            x_p = prepared.projection[word]
            if x_p <= 0:
                continue
            part = latents[word] * (W @ p)
            m = part[mains].sum()
            silent.append((latents[word, mains] == 0).all())
            top = int(part.argmax())
            full.append(bool(silent[-1] and cosine[top] >= 0.025 and part[top] >= 0.4 * x_p))
            a = sum(sorted(part[i] for i in range(60) if i not in mains and cosine[i] >= 0.1 and part[i] > 0)[-3:])
            if m >= x_p or a < 0.4 * x_p:
                fractions.append(0.0)
            elif m <= 0:
                fractions.append(1.0)
            else:
                fractions.append(min(a, x_p - m) / (min(a, x_p - m) + m))
            kinds.add((full[-1], 0 < fractions[-1] < 1, fractions[-1] == 1))
        assert found["full", letter].value == pytest.approx(np.mean(full))
        assert found["fraction", letter].value == pytest.approx(np.mean(fractions))
        assert found["silent", letter].value == pytest.approx(np.mean(silent))
        assert found["full", letter].n == len(full)
    assert len(kinds) > 2


def test_too_little_text_and_no_spelling_are_one_line() -> None:
    raw, token, texts = rows()
    few = token < 10
    spelt = {number: texts[number] for number in token[few].tolist()}
    with pytest.raises(SaescaleError, match="fewer than two letters begin 16 words"):
        prepared_of(raw[few], token[few], spelt)
    stored = SimpleNamespace(act=raw.numpy(), token=token)
    source = SimpleNamespace(heldout=lambda rows=None, columns=(): stored, dtype="float16")
    with pytest.raises(SaescaleError, match="mute has no `tokenizer`"):
        absorption.prepare(source, SimpleNamespace(name="mute"))  # type: ignore[arg-type]
