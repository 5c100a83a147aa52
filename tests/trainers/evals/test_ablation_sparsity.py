"""ablation_sparsity against plain transformers, one ablation at a time, and by hand where the effect is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.evals import ablation_sparsity
from saescale.trainers.evals.ablation_sparsity import POSITIONS, Prepared, prepare, sparsities
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.retrace import Places
from saescale.trainers.subjects.subject import Subject
from tests.trainers.evals.cases import a_trained

V, LENGTH = 7, 20


def direct(unembed: torch.Tensor) -> Prepared:
    """Two contexts of a subject without blocks behind the site: the logits are the stream times `unembed`."""
    draw = torch.Generator().manual_seed(0)
    streams = {number: torch.randn(LENGTH, len(unembed), generator=draw) for number in (0, 1)}
    contexts = [np.full(LENGTH, number, np.int32) for number in (0, 1)]
    subject = SimpleNamespace(resume=lambda ids, site, resid: resid @ unembed)
    context, pos = np.array([0, 1, 0, 0]), np.array([2, 4, 3, 2])
    raw = torch.stack([streams[c][p] for c, p in zip(context.tolist(), pos.tolist(), strict=True)])
    places = Places(contexts, context, pos)
    return Prepared(subject, Site(layer=0, positions="all"), places, raw, np.arange(4), streams, {})  # type: ignore[arg-type]


def test_the_sparsity_of_effects_that_are_known() -> None:
    """Each direction of the stream acts on logits of its own: on one, on three alike, on none, on all."""
    unembed = torch.zeros(5, V)
    unembed[0, 3] = 2
    unembed[1, [0, 1, 6]] = torch.tensor([1.0, -1.0, 1.0])
    unembed[3] = torch.tensor([5.0, 5, 5, 5, 5, 2, 1])
    prepared = direct(unembed)
    found = sparsities(prepared, [0, 1, 2, 3], torch.diag(torch.tensor([-0.7, -1.4, -2.1, -2.8, 0]))[:4])
    numbers = V * POSITIONS
    assert found[0] == pytest.approx(1 / numbers, rel=1e-4)  # one logit at one position, whatever its size
    assert found[1] == pytest.approx(3 / numbers, rel=1e-4)
    assert np.isnan(found[2])
    # Five of seven have the median, which is taken off: -3 and -4 are left, (3 + 4)^2 / (9 + 16).
    assert found[3] == pytest.approx(49 / 25 / numbers, rel=1e-4)


def test_ablations_are_those_of_plain_transformers(
    text_store: ActivationStore, text_subject: Subject, tiny_subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_sparsity, "TOKENS_AT_A_TIME", 60)  # a batch of one context in several passes
    monkeypatch.setattr(ablation_sparsity, "KEPT_BYTES", 1)  # no stream is kept for the next context
    monkeypatch.setattr(ablation_sparsity, "CHANNELS", 5)
    model = AutoModelForCausalLM.from_pretrained(tiny_subject.removeprefix("hf:"), dtype=torch.float32).eval()
    prepared = prepare(text_store, text_subject)
    trained = a_trained("topk", text_store.heldout(512).act, n_latents=40)
    rows = list(ablation_sparsity.measure(trained, text_store, text_subject, prepared, latents=6))
    found = {row.at: row for row in rows if row.metric == "sparsity" and row.at}
    assert len(found) == 6

    def logits(ids: np.ndarray, pos: int | None = None, change: torch.Tensor | None = None) -> torch.Tensor:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            stream = (output[0] if isinstance(output, tuple) else output).clone()
            stream[0, pos] += change
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = model.model.layers[1].register_forward_hook(hook) if change is not None else None
        with torch.no_grad():
            result: torch.Tensor = model(torch.from_numpy(ids)[None].long()).logits[0]
        if handle is not None:
            handle.remove()
        return result

    def sparsity(ids: np.ndarray, pos: int, change: torch.Tensor) -> float:
        effect = (logits(ids, pos, change) - logits(ids))[pos : pos + 16].double().numpy()
        lower = np.sort(effect, axis=1)[:, (effect.shape[1] - 1) // 2]
        effect = (effect - lower[:, None]).ravel()
        return float(np.abs(effect).sum() ** 2 / (effect**2).sum() / len(effect))

    act = torch.from_numpy(text_store.heldout().act).float()
    places = prepared.places
    params = trained.sae.params
    for at, row in found.items():
        latent, values, contexts = int(at), [], []
        x = act - act.mean(dim=1, keepdim=True)
        norm = x.norm(dim=1, keepdim=True)
        pre = (x / norm - params["b_pre"]) @ params["W_enc"].T + params["b_enc"]
        kth = pre.topk(4, dim=1).values[:, -1]
        active = ((pre[:, latent] >= kth) & (pre[:, latent] > 0)).numpy()
        chosen = ablation_sparsity.first_rows(prepared, np.flatnonzero(active))
        for number in chosen:
            z = pre[number, latent]
            change = -z * norm[number] * params["W_dec"][latent]
            ids = places.contexts[places.context[number]]
            assert places.pos[number] + 16 <= len(ids)
            contexts.append(int(places.context[number]))
            values.append(sparsity(ids, int(places.pos[number]), change))
        assert len(set(contexts)) == len(contexts) == row.n
        assert row.value == pytest.approx(np.mean(values), rel=2e-3)
    whole = {row.metric: row for row in rows if not row.at}
    assert whole["sparsity"].value == pytest.approx(np.mean([row.value for row in found.values()]))
    assert whole["sparsity"].low is not None
    assert whole["sparsity"].low < whole["sparsity"].value < whole["sparsity"].high  # type: ignore[operator]

    wanted = []
    mean = act.mean(dim=0)
    everywhere = np.arange(len(act))
    for number, channel in enumerate(prepared.channels):
        of_channel = []
        for row_number in ablation_sparsity.first_rows(prepared, everywhere, skip=number):
            change = torch.zeros(len(mean))
            change[channel] = mean[channel] - act[row_number, channel]
            place = int(places.context[row_number]), int(places.pos[row_number])
            of_channel.append(sparsity(places.contexts[place[0]], place[1], change))
        wanted.append(np.mean(of_channel))
    assert len(wanted) == 5
    assert whole["sparsity_channels"].value == pytest.approx(np.mean(wanted), rel=2e-3)


def test_where_no_position_has_enough_behind_it_it_is_one_line(
    text_store: ActivationStore, text_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_sparsity, "POSITIONS", 25)
    with pytest.raises(SaescaleError, match="no held-out row has 24 tokens behind it"):
        prepare(text_store, text_subject)


def test_latents_that_never_fire_are_one_line(text_store: ActivationStore, text_subject: Subject) -> None:
    trained = a_trained("relu", text_store.heldout(512).act)
    trained.sae.params["b_enc"].fill_(-100)
    silent = Trained(trained.sae.like(trained.sae.params), trained.cell)
    with pytest.raises(SaescaleError, match="no latent is active"):
        list(ablation_sparsity.measure(silent, text_store, text_subject, prepare(text_store, text_subject), latents=4))
