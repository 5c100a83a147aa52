"""refinement against an exact solver of non-negative least squares, token by token."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.evals import decoder, refinement
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from tests.trainers.evals.cases import a_source, a_trained, raw_rows

ROWS = 300


@pytest.fixture(scope="module")
def act() -> np.ndarray:
    return raw_rows(ROWS)


def measured(trained: Trained, act: np.ndarray) -> dict[str, Measurement]:
    return {row.metric: row for row in refinement.measure(trained, a_source(act), None)}  # type: ignore[arg-type]


def by_hand(trained: Trained, act: np.ndarray) -> dict[str, float]:
    x = normalise(torch.from_numpy(act))
    z = trained.sae.encode(x).double().numpy()
    W_dec, b_pre = (trained.sae.params[name].double().numpy() for name in ("W_dec", "b_pre"))
    rows = x.double().numpy()
    best = np.zeros_like(z)
    for i, row in enumerate(rows):
        active = np.flatnonzero(z[i])
        if len(active):
            best[i, active], _ = nnls(W_dec[active].T, row - b_pre)
    own, refined = (((rows - code @ W_dec - b_pre) ** 2).sum() for code in (z, best))
    variation = ((rows - rows.mean(axis=0)) ** 2).sum()
    return {
        "nmse": own / variation, "nmse_refined": refined / variation, "gain": 1 - refined / own,
        "ratio": best.sum() / z.sum(), "zeroed": float((best[z > 0] == 0).mean()),
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES.names())
def test_activations_are_the_best_that_there_are(
    architecture: str, act: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "CHUNK_ENTRIES", 130 * 48)  # in pieces, the last ones short
    monkeypatch.setattr(refinement, "_ENTRIES", 7 * 16**2)
    trained = a_trained(architecture, act)
    found, wanted = measured(trained, act), by_hand(trained, act)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert found[name].n == ROWS
    gain = found["gain"]
    assert gain.low is not None
    assert gain.high is not None
    assert 0 <= gain.low <= gain.value <= gain.high
    if architecture == "pca":  # orthogonal directions are projected on, which is the best already
        assert gain.value == pytest.approx(0, abs=1e-6)


def test_an_encoder_that_shrinks_by_half_is_told_to(act: np.ndarray) -> None:
    trained = a_trained("topk", act)
    params = trained.sae.params
    # Activations of a row that only b_pre and two orthogonal decoder rows make are what they were made with.
    params["W_dec"] = torch.eye(16).repeat(3, 1)
    params["W_enc"] = params["W_dec"] / 2
    params["W_enc"][16:] = 0
    params["b_pre"], params["b_enc"] = torch.zeros(16), torch.zeros(48)
    rows = torch.zeros(40, 16)
    rows[torch.arange(40), torch.arange(40) % 16] = 1
    x = rows.double()
    z = trained.sae.encode(rows)
    width = z.topk(4, dim=1)
    best = refinement.refine(decoder.Decoder(params["W_dec"], params["b_pre"]), rows, width.indices, width.values)
    assert torch.allclose(best.sum(dim=1), x.sum(dim=1))
    assert torch.allclose(best.sum() / z.sum(), torch.tensor(2.0, dtype=torch.float64))


def test_what_no_latent_fires_on_is_refused(act: np.ndarray) -> None:
    trained = a_trained("topk", act)
    trained.sae.params["b_enc"] -= 100
    with pytest.raises(SaescaleError, match="no latent is active"):
        measured(trained, act)


def test_a_decoder_of_any_name_will_do_and_one_that_is_not_linear_is_refused(toy: str, act: np.ndarray) -> None:
    trained = a_trained(toy, act, share=0.0)
    assert measured(trained, act)["ratio"].value > 0
    whole = trained.sae.forward

    class Squared:
        name, params, shape = "squared", trained.sae.params, trained.sae.shape

        def forward(self, x: torch.Tensor) -> object:
            forward = whole(x)
            return forward._replace(x_hat=forward.x_hat.square())

    class Signed(Squared):
        def forward(self, x: torch.Tensor) -> object:
            return whole(x)._replace(latents=-whole(x).latents)

    x = normalise(torch.from_numpy(act))
    with pytest.raises(SaescaleError, match=r"x_hat of squared is not z W \+ b"):
        decoder.linear_decoder(Squared(), x)  # type: ignore[arg-type]
    with pytest.raises(SaescaleError, match="latents of squared have signs"):
        decoder.linear_decoder(Signed(), x)  # type: ignore[arg-type]
