"""downstream_loss against plain transformers with a hook on the block, one context at a time."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from saescale.storage.errors import SaescaleError
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals import downstream_loss
from saescale.trainers.evals.evaluation import LeftOut, Measurement
from saescale.trainers.evals.splice import heldout_contexts
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import Subject, get_subject

LAYER, LENGTH, K = 1, 16, 4


@pytest.fixture(scope="module")
def store(tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = str(tmp_path_factory.mktemp("store") / "s")
    harvest(
        HarvestSpec(
            subject=tiny_subject, layer=LAYER, corpus=tiny_corpus, out=out, tokens=1_024, heldout_tokens=512,
            context_length=LENGTH, shard_rows=256, row_group_rows=64, compute_dtype="float32",
        )
    )  # fmt: skip
    return ActivationStore.open(out)


@pytest.fixture(scope="module")
def subject(store: ActivationStore) -> Subject:
    return get_subject(store.subject, dtype="float32")


@pytest.fixture(scope="module")
def trained(store: ActivationStore) -> Trained:
    d_model, n_latents = store.d_model, 64
    cell = Cell(
        store="s",
        d_model=d_model,
        n_latents=n_latents,
        k=K,
        tokens=64,
        batch_tokens=64,
        lr=1e-3,
        dead_after_tokens=64,
        ema=0.9,
    )
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, d_model, generator=draw), dim=1)
    params = {"W_enc": W_dec.clone(), "b_enc": torch.zeros(n_latents), "W_dec": W_dec, "b_pre": torch.zeros(d_model)}
    return Trained(SAE("topk", Shape(d_model, n_latents), cell.whole_settings, params), cell)


def measured(
    store: ActivationStore, subject: Subject, trained: Any, costs: float = 0.0
) -> dict[tuple[str, str], Measurement]:
    """`costs`: nats a token that ablations cost beyond what they cost a model of random weights."""
    prepared = downstream_loss.prepare(store, subject)
    zero, mean = (each._replace(ce=each.ce + costs) for each in (prepared.zero, prepared.mean))
    rows = downstream_loss.measure(trained, store, subject, prepared._replace(zero=zero, mean=mean))
    return {(row.metric, row.at): row for row in rows if isinstance(row, Measurement)}


def x_hat(trained: Trained, x: torch.Tensor) -> torch.Tensor:
    """Row by row, from the definitions."""
    rows = []
    for row in x:
        mean = row.mean()
        norm = (row - mean).pow(2).sum().sqrt()
        unit = (row - mean) / norm
        pre = trained.sae.params["W_enc"] @ unit
        values, indices = pre.topk(K)
        rows.append((values.clamp_min(0) @ trained.sae.params["W_dec"][indices]) * norm + mean)
    return torch.stack(rows)


def test_losses_are_those_of_plain_transformers(
    store: ActivationStore, subject: Subject, trained: Trained, tiny_subject: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_subject.removeprefix("hf:"), dtype=torch.float32).eval()
    rows = store.heldout(columns=("act", "token", "pos", "doc"))
    # The contexts, found by what stands in the rows alone: each is a chain of tokens that follow each other.
    contexts = [context for part in heldout_contexts(store, subject) for context in part.ids.tolist()]
    assert sum(map(len, contexts)) == len(rows.token) + len(contexts)
    assert {context[0] for context in contexts} == {subject.bos_token_id}  # type: ignore[attr-defined]
    assert sorted(token for context in contexts for token in context[1:]) == sorted(rows.token.tolist())

    def run(ids: list[int], instead: Any = None) -> torch.Tensor:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            seen.append(stream[0, 1:].clone())
            if instead is None:
                return None
            stream = torch.cat([stream[:, :1], instead(stream[0, 1:])[None]], dim=1)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = model.model.layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        handle.remove()
        return logits[1:-1]  # what x_hat at a position says of the next token

    seen: list[torch.Tensor] = []
    original = [run(ids) for ids in contexts]
    mean = torch.cat(seen).mean(dim=0)
    patches = {
        "ce": lambda x: x_hat(trained, x), "ce_zero": torch.zeros_like, "ce_mean": lambda x: mean.expand_as(x),
    }  # fmt: skip
    targets = [torch.tensor(ids[2:]) for ids in contexts]
    cross_entropy = torch.nn.functional.cross_entropy
    wanted = {"ce_original": float(cross_entropy(torch.cat(original), torch.cat(targets)))}
    patched = {name: [run(ids, patch) for ids in contexts] for name, patch in patches.items()}
    for name, logits in patched.items():
        wanted[name] = float(cross_entropy(torch.cat(logits), torch.cat(targets))) + (name != "ce")
    before, after = torch.cat(original).log_softmax(1), torch.cat(patched["ce"]).log_softmax(1)
    wanted["kl"] = float(torch.nn.functional.kl_div(after, before, reduction="batchmean", log_target=True))
    wanted["ce_increase"] = wanted["ce"] - wanted["ce_original"]
    for name, ablated in (("recovered_zero", "ce_zero"), ("recovered_mean", "ce_mean")):
        wanted[name] = (wanted[ablated] - wanted["ce"]) / (wanted[ablated] - wanted["ce_original"])

    found = measured(store, subject, trained, costs=1.0)
    whole = {metric: row for (metric, at), row in found.items() if not at}
    assert whole.keys() == wanted.keys()
    for name, value in wanted.items():
        assert whole[name].value == pytest.approx(value, abs=1e-4, rel=2e-3 if "recovered" in name else 1e-4), name
        assert whole[name].n == len(torch.cat(targets))
    # By position, all of them; those of a position are all contexts' tokens there.
    each = {at: row for (metric, at), row in found.items() if metric == "kl" and at}
    assert [int(at.split()[1]) for at in each] == list(range(1, LENGTH))
    assert sum(row.value * row.n for row in each.values()) / whole["kl"].n == pytest.approx(whole["kl"].value)
    third = [torch.nn.functional.kl_div(a[2:3].log_softmax(1), b[2:3].log_softmax(1), log_target=True, reduction="sum")
             for a, b in zip(patched["ce"], original, strict=True)]  # fmt: skip
    assert each["position 3"].value == pytest.approx(float(torch.stack(third).mean()), abs=1e-4)


def test_the_identity_recovers_all_and_zero_nothing(store: ActivationStore, subject: Subject) -> None:
    same = measured(store, subject, SimpleNamespace(reconstruct=lambda raw: raw), costs=1.0)
    assert same["recovered_zero", ""].value == same["recovered_mean", ""].value == 1
    assert same["kl", ""].value == same["ce_increase", ""].value == 0
    nothing = measured(store, subject, SimpleNamespace(reconstruct=torch.zeros_like), costs=1.0)
    lost = nothing["ce_zero", ""].value - nothing["ce_original", ""].value
    assert nothing["recovered_zero", ""].value == pytest.approx(1 / lost)  # of what ablations cost here, 1 was added
    assert nothing["kl", ""].value > 0


def test_nothing_is_recovered_where_nothing_is_lost(store: ActivationStore, subject: Subject, trained: Trained) -> None:
    # A model of random weights says no more of the next token with its stream than without.
    prepared = downstream_loss.prepare(store, subject)
    rows = list(downstream_loss.measure(trained, store, subject, prepared))
    assert [row.metric for row in rows if isinstance(row, LeftOut)] == ["recovered_zero", "recovered_mean"]
    assert not [row for row in rows if isinstance(row, Measurement) and "recovered" in row.metric]


def test_what_does_not_fit_is_computed_again(
    store: ActivationStore, subject: Subject, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = measured(store, subject, trained)
    monkeypatch.setattr(downstream_loss, "KEPT_BYTES", 0)
    assert measured(store, subject, trained) == kept


def test_only_so_many_contexts_are_read(
    store: ActivationStore, subject: Subject, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream_loss, "TOKENS", 5 * LENGTH - 1)
    found = measured(store, subject, trained)
    assert found["kl", ""].n == 5 * (LENGTH - 1)


def test_without_logits_it_is_one_line(store: ActivationStore, subject: Subject) -> None:
    silent = SimpleNamespace(name="silent", bos_token_id=subject.bos_token_id, eos_token_id=subject.eos_token_id,  # type: ignore[attr-defined]
                             run=lambda ids, sites, logits: subject.run(ids, sites), tokenize=len)  # fmt: skip
    with pytest.raises(SaescaleError, match="silent gives no logits"):
        downstream_loss.prepare(store, silent)  # type: ignore[arg-type]


def test_long_contexts_are_given_in_ranges(
    store: ActivationStore, subject: Subject, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream_loss, "RANGES", 5)
    found = measured(store, subject, trained)
    assert [at for metric, at in found if metric == "kl" and at] == [
        "positions 1 to 3", "positions 4 to 6", "positions 7 to 9", "positions 10 to 12", "positions 13 to 15",
    ]  # fmt: skip
    assert np.sum([row.n for (metric, at), row in found.items() if metric == "kl" and at]) == found["kl", ""].n
