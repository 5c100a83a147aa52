"""n2g on latents whose patterns were planted, and against plain transformers, a piece at a time, and a walked trie."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.texts import n2g
from saescale.trainers.evals.texts.n2g import ANY, Pattern, explain, matches, measure, prepare
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.retrace import Places
from saescale.trainers.subjects.subject import Subject
from tests.trainers.evals.cases import a_trained

V, LENGTH, CONTEXTS = 8, 40, 250  # tokens 0 to 5 are text, 6 is BOS, 7 EOS
TRIGRAM, GAPPED, UNIGRAM, LATE = range(4)


class LastThree:
    """A subject whose stream holds the last three tokens, one-hot, and whether 20 came before."""

    name, labels = "last-three", ()
    bos_token_id, eos_token_id = 6, 7

    def tokenize(self, texts: object) -> list[np.ndarray]:
        raise AssertionError

    def run(self, ids: torch.Tensor, sites: object) -> SimpleNamespace:
        one_hot = torch.nn.functional.one_hot(ids.long(), V).float()
        parts = [torch.nn.functional.pad(one_hot, (0, 0, back, 0))[:, : ids.shape[1]] for back in range(3)]
        late = (torch.arange(ids.shape[1]) > 20).float()[None, :, None].expand(len(ids), -1, 1)
        return SimpleNamespace(resid=(torch.cat([*parts, late / 2, -late / 2], dim=2),))


def planted() -> Trained:
    """Latents for 2 1 0, for 4 * 3, for 5, and for whatever is late. Rows are of zero mean and norm 1 here: with three
    tokens a one-hot entry is near 0.58, so thresholds lie between the sums that count."""
    d_model = 3 * V + 2
    W_enc = torch.zeros(4, d_model)
    W_enc[TRIGRAM, [0, V + 1, 2 * V + 2]] = 1
    W_enc[GAPPED, [3, 2 * V + 4]] = 1
    W_enc[UNIGRAM, 5] = 1
    W_enc[LATE, -2] = 1
    b_enc = -torch.tensor([1.2, 0.8, 0.05, 0.1])
    params = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_enc, "b_pre": torch.zeros(d_model)}
    cell = Cell(
        store="s", architecture="relu", d_model=d_model, n_latents=4, k=1, tokens=64, batch_tokens=64, lr=1e-3,
        dead_after_tokens=64, ema=0.9,
    )  # fmt: skip
    return Trained(SAE("relu", Shape(d_model, 4), cell.whole_settings, params), cell)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> tuple[SimpleNamespace, LastThree]:
    """Random tokens, five contexts a document."""
    monkeypatch.setattr(n2g, "CHUNK_ENTRIES", 4 * 7)  # latents of seven pieces at a time
    subject, rng = LastThree(), np.random.default_rng(0)
    ids = rng.integers(6, size=(CONTEXTS, LENGTH)).astype(np.int32)
    ids[:, 0] = 6
    context, pos = (index.ravel() for index in np.indices((CONTEXTS, LENGTH - 1)))
    order = rng.permutation(len(context))
    context, pos = context[order], pos[order] + 1
    monkeypatch.setattr(n2g, "places_of", lambda source, subject, most: Places(list(ids), context, pos))
    act = subject.run(torch.from_numpy(ids), []).resid[0][context, pos].half().numpy()
    rows = SimpleNamespace(act=act, doc=context // 5)
    return SimpleNamespace(
        heldout=lambda rows_, columns: rows, dtype="float16", site=Site(layer=0, positions="all")
    ), subject


def measured(text: tuple[Any, Any]) -> dict[tuple[str, str], Measurement]:
    source, subject = text
    return {
        (row.metric, row.at): row for row in measure(planted(), source, subject, prepare(source, subject), latents=4)
    }


def test_planted_patterns_are_found(text: tuple[Any, Any]) -> None:
    source, subject = text
    prepared, trained = prepare(source, subject), planted()
    active = n2g.firing(trained, prepared.raw)
    examples = n2g._examples(active, np.arange(3), prepared)
    found: dict[int, set[Pattern | None]] = {latent: set() for latent in range(3)}
    for example, pattern in zip(examples, explain(trained, prepared, examples), strict=True):
        found[example.latent].add(pattern)
    assert found == {TRIGRAM: {(2, 1, 0)}, GAPPED: {(4, ANY, 3)}, UNIGRAM: {(5,)}}


def test_planted_patterns_explain_all_and_what_is_no_token_nothing(text: tuple[Any, Any]) -> None:
    found = measured(text)
    for latent in (TRIGRAM, GAPPED, UNIGRAM):
        for metric in ("precision", "recall", "f1", "explained"):
            assert found[metric, str(latent)].value == 1, (metric, latent)
        assert found["recall", str(latent)].n > 5
    # Pieces are never as long as what LATE waits for: nothing is predicted, so that there is no precision.
    assert found["f1", str(LATE)].value == found["recall", str(LATE)].value == found["explained", str(LATE)].value == 0
    assert ("precision", str(LATE)) not in found
    whole = {metric: row for (metric, at), row in found.items() if not at}
    assert {metric: row.value for metric, row in whole.items()} == {
        "precision": 1, "recall": 0.75, "f1": 0.75, "explained": 0.75,
    }  # fmt: skip
    assert whole["precision"].n == 3
    assert whole["f1"].low is not None
    assert whole["f1"].low < 0.75 < whole["f1"].high  # type: ignore[operator]


def walked(patterns: list[Pattern], tail: list[int]) -> bool:
    """By the trie of reversed patterns, from the token on backwards."""
    trie: dict[Any, Any] = {}
    for pattern in patterns:
        node = trie
        for token in reversed(pattern):
            node = node.setdefault(token, {})
        node["end"] = True
    nodes = [trie]
    for token in reversed(tail):
        nodes = [node[key] for node in nodes for key in (token, ANY) if key in node]
        if any("end" in node for node in nodes):
            return True
    return False


def test_matching_is_that_of_a_trie() -> None:
    rng = np.random.default_rng(1)
    tails = rng.integers(3, size=(400, 5))
    tails[:100, :3] = -2  # the beginning of a context
    patterns = [tuple(rng.choice([ANY, 0, 1, 2], size=length).tolist()) for length in (2, 3, 3, 4, 5)]
    found = matches(patterns, tails)
    assert found.tolist() == [walked(patterns, [token for token in tail if token >= 0]) for tail in tails.tolist()]
    assert 0.1 < found.mean() < 0.9
    assert not matches([], tails).any()


def test_patterns_are_those_of_plain_transformers(
    text_store: ActivationStore, text_subject: Subject, tiny_subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece after the other, through the whole model with a hook, and documents halved by hand."""
    monkeypatch.setattr(n2g, "TOKENS_AT_A_TIME", 13)
    monkeypatch.setattr(n2g, "KEPT_BYTES", 20_000)
    model = AutoModelForCausalLM.from_pretrained(tiny_subject.removeprefix("hf:"), dtype=torch.float32).eval()
    trained = a_trained("jumprelu", text_store.heldout(512).act, n_latents=40)
    prepared = prepare(text_store, text_subject)
    places, rows = n2g.places_of(text_store, text_subject), text_store.heldout(columns=("act", "doc"))
    latents = trained.encode(torch.from_numpy(rows.act)).numpy()
    found = list(measure(trained, text_store, text_subject, prepared, latents=5))
    bos, pad = text_subject.bos_token_id, text_subject.eos_token_id  # type: ignore[attr-defined]
    judging = set(rows.doc[prepared.judges].tolist())
    assert not judging & set(rows.doc[~prepared.judges].tolist())
    assert abs(len(judging) - len(set(rows.doc.tolist())) / 2) < 1

    def activation(piece: list[int], latent: int) -> float:
        seen: list[torch.Tensor] = []

        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output)[0, -1:])

        handle = model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            model(torch.tensor([[bos, *piece]]))
        handle.remove()
        return float(trained.encode(seen[0])[0, latent])

    ats = {row.at for row in found if row.at}
    assert len(ats) == 5
    for latent in map(int, ats):
        explains = np.flatnonzero((latents[:, latent] > 0) & ~prepared.judges)
        patterns: list[Pattern] = []
        examples = explains[np.argsort(prepared.turn[explains])][: n2g.EXAMPLES]
        for number in examples:
            before = places.contexts[places.context[number]][1 : places.pos[number] + 1].tolist()
            for length in range(1, 9):
                piece = before[-length:]
                old = activation(piece, latent)
                if len(piece) == length and old >= latents[number, latent] / 2:
                    new = [activation([*piece[:i], pad, *piece[i + 1 :]], latent) for i in range(length)]
                    patterns.append(
                        tuple(ANY if 1 - value / old < 0.5 else token for value, token in zip(new, piece, strict=True))
                    )
                    break
        judged = np.flatnonzero(prepared.judges)
        fires = latents[judged, latent] > 0
        predicted = np.array(
            [
                walked(patterns, places.contexts[places.context[number]][1 : places.pos[number] + 1].tolist())
                for number in judged
            ]
        )
        of_latent = {row.metric: row.value for row in found if row.at == str(latent)}
        assert of_latent["explained"] == len(patterns) / len(examples)
        assert of_latent["recall"] == pytest.approx((fires & predicted).sum() / fires.sum())
        assert of_latent["f1"] == pytest.approx(2 * (fires & predicted).sum() / (fires.sum() + predicted.sum()))
        if predicted.any():
            assert of_latent["precision"] == pytest.approx((fires & predicted).sum() / predicted.sum())


def test_what_cannot_be_explained_is_one_line(text_store: ActivationStore, text_subject: Subject) -> None:
    nothing = SimpleNamespace(name="mute", bos_token_id=None, eos_token_id=None, tokenize=len)
    with pytest.raises(SaescaleError, match="mute has neither EOS nor BOS"):
        prepare(text_store, nothing)  # type: ignore[arg-type]
    trained = a_trained("relu", text_store.heldout(512).act)
    trained.sae.params["b_enc"].fill_(-100)
    with pytest.raises(SaescaleError, match="no latent is active in both halves"):
        list(measure(trained, text_store, text_subject, prepare(text_store, text_subject), latents=4))
