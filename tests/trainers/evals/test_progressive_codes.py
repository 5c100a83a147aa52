"""progressive_codes against loops over tokens with dense codes, and what its two ways have in common with an SAE's
own."""

import math

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.architecture import PenaltySettings
from saescale.trainers.evals import progressive_codes
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from tests.trainers.evals.cases import a_source, a_trained, raw_rows

ROWS, K, N_LATENTS = 300, 4, 48
KS = [1, 2, 3, 4, 6, 8, 11, 16]


@pytest.fixture(scope="module")
def act() -> np.ndarray:
    return raw_rows(ROWS)


def measured(trained: Trained, act: np.ndarray) -> dict[tuple[str, str], Measurement]:
    rows = progressive_codes.measure(trained, a_source(act), None)  # type: ignore[arg-type]
    return {(row.metric, row.at): row for row in rows}


def nmse(trained: Trained, x: np.ndarray, codes: np.ndarray) -> float:
    W_dec, b_pre = (trained.sae.params[name].double().numpy() for name in ("W_dec", "b_pre"))
    return float(((x - codes @ W_dec - b_pre) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


def chosen_from(trained: Trained, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores and values, float64 [rows, N_LATENTS], from the papers' formulas."""
    p = {name: tensor.double() for name, tensor in trained.sae.params.items()}
    rows = (x - p["b_pre"].float()).double()
    name = trained.cell.architecture
    if name == "pca":
        scores = rows @ p["W_dec"].T
        return scores.numpy(), scores.numpy()
    m = rows @ p["W_enc"].T
    scores = m + p["b_gate" if name == "gated" else "b_enc"]
    values = {"gated": lambda: m * p["r_mag"].exp() + p["b_mag"], "prolu": lambda: m}.get(name, lambda: scores)()
    if name == "jumprelu":
        scores = scores - p["threshold"].relu()
    if name == "switch":
        routed = torch.softmax((x.double() - p["b_router"]) @ p["W_router"].T, dim=1)
        for row, probabilities in enumerate(routed):
            expert = int(probabilities.argmax())
            outside = np.arange(N_LATENTS) // (N_LATENTS // 8) != expert
            scores[row] *= probabilities[expert]
            scores[row, outside] = -math.inf
        values = scores
    return scores.numpy(), values.numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES.names())
def test_codes_are_those_of_loops(architecture: str, act: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressive_codes, "CHUNK_ENTRIES", 70 * N_LATENTS)  # in pieces, the last one short
    trained = a_trained(architecture, act, N_LATENTS, K)
    x = normalise(torch.from_numpy(act))
    scores, values = chosen_from(trained, x)
    found, rows = measured(trained, act), x.double().numpy()
    scores = np.where(values > 0, scores, -np.inf)
    for k in KS:
        codes = np.zeros_like(values)
        for row in range(ROWS):
            best = np.argsort(-scores[row])[:k]
            best = best[np.isfinite(scores[row, best])]
            codes[row, best] = values[row, best]
        row = found["topk", f"k' = {k}"]
        assert row.value == pytest.approx(nmse(trained, rows, codes), rel=1e-5)
        assert (row.n, row.seed) == (ROWS, 0)
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high
        above = np.sort(scores[np.isfinite(scores)])[::-1]
        if len(above) < k * ROWS:
            assert ("jumprelu", f"k' = {k}") not in found
            continue
        codes = np.where(scores >= above[k * ROWS - 1], values, 0)
        assert (codes > 0).sum() == k * ROWS
        assert found["jumprelu", f"k' = {k}"].value == pytest.approx(nmse(trained, rows, codes), rel=1e-5)
    own = nmse(trained, rows, trained.sae.encode(x).double().numpy())
    assert found["nmse", ""].value == pytest.approx(own, rel=1e-5)
    for way in ("topk", "jumprelu"):
        for name, k in (("half", 2), ("same", 4), ("twice", 8)):
            whole, single = found.get((f"{way}_{name}", "")), found.get((way, f"k' = {k}"))
            assert (whole is None) == (single is None)
            assert whole is None or single is None or whole[1:4] == single[1:4]
        if (way, "k' = 16") in found:
            rise = found[way, "k' = 16"].value / found[way, "k' = 4"].value
            assert found[f"{way}_rise", ""].value == pytest.approx(rise)
    # The SAE's own code is one of them.
    if isinstance(trained.cell.whole_settings, PenaltySettings):
        assert found["jumprelu_same", ""].value == pytest.approx(own, rel=1e-4)
    elif architecture not in ("batchtopk", "matryoshka"):
        assert found["topk_same", ""].value == pytest.approx(own, rel=1e-5)


def test_a_threshold_that_some_tokens_exceed_often_is_exact(act: np.ndarray) -> None:
    trained = a_trained("topk", act, N_LATENTS, 1)
    # Three tokens have a direction that the others lack, and with it all latents far above the threshold: more of them
    # than were kept of a token at first.
    act = act.copy()
    act[:, 14] = act[:, 15]
    act[-3:] = np.eye(16)[14] - np.eye(16)[15]
    x = normalise(torch.from_numpy(act))
    trained.sae.params["b_pre"] = torch.zeros(16)
    trained.sae.params["W_enc"] += 5 * x[-1]
    scores, values = chosen_from(trained, x)
    scores = np.where(values > 0, scores, -np.inf)
    threshold = np.sort(scores.ravel())[::-1][4 * len(x) - 1]
    counts = (scores >= threshold).sum(axis=1)
    assert counts.max() > 8
    assert threshold > -np.inf
    codes = np.where(scores >= threshold, values, 0)
    wanted = nmse(trained, x.double().numpy(), codes)
    assert measured(trained, act)["jumprelu", "k' = 4"].value == pytest.approx(wanted, rel=1e-4)


def test_relu_has_nothing_beyond_its_own_latents(act: np.ndarray) -> None:
    found = measured(a_trained("relu", act, N_LATENTS, K), act)
    assert ("jumprelu_same", "") in found
    assert ("jumprelu_twice", "") not in found
    assert found["topk_rise", ""].value <= 1


def test_around_k_it_ends_with_the_latents() -> None:
    assert progressive_codes.around(4, 10) == [1, 2, 3, 4, 6, 8, 10]
    assert progressive_codes.around(1, 64) == [1, 2, 3, 4]


def test_latents_that_are_no_pre_activations_are_refused(toy: str, act: np.ndarray) -> None:
    trained = a_trained(toy, act, N_LATENTS, K, share=0.0)
    assert measured(trained, act)["nmse", ""].value > 0
    whole = trained.sae.forward
    trained.sae.forward = lambda x: whole(x)._replace(pre_activations=whole(x).pre_activations - 1)  # type: ignore
    with pytest.raises(SaescaleError, match="it has to define `candidates`"):
        measured(trained, act)


def test_rows_that_are_all_the_same_are_refused(act: np.ndarray) -> None:
    with pytest.raises(SaescaleError, match="nmse has no meaning"):
        measured(a_trained("topk", act, N_LATENTS, K), np.repeat(act[:1], 50, axis=0))
