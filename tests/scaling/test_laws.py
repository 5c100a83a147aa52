"""Laws as data: values, gradients, and the way to reported coefficients and back."""

import numpy as np
import pytest

from scaling.law import Law, log_sum
from scaling.laws import GPT4, LAWS, N_FLOOR, N_K, find_law
from storage.errors import SaescaleError


def test_n_k_is_the_published_formula() -> None:
    n, k = np.array([2.0**15, 2.0**20]), np.array([32.0, 256.0])
    ln, lk = np.log(n), np.log(k)
    expected = np.exp(-0.50 + 0.26 * lk - 0.017 * ln - 0.042 * lk * ln) + np.exp(-1.32 - 0.085 * lk)
    np.testing.assert_allclose(N_K.value(GPT4, {"n_latents": n, "k": k}), expected, rtol=1e-12)


@pytest.mark.parametrize(("k", "exponent"), [(8, -0.104), (32, -0.163), (128, -0.221), (512, -0.279)])
def test_exponent_at_k_as_in_the_paper(k: float, exponent: float) -> None:
    assert float(N_K.exponent_of(N_K.to_raw(GPT4), "n_latents", {"k": k})) == pytest.approx(exponent, abs=5e-4)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.formula)
def test_gradients_are_exact(law: Law) -> None:
    rng = np.random.default_rng(0)
    design = law.design({c: rng.normal(size=5) for c in law.columns})
    raw = rng.normal(size=len(law.names))
    _, gradient = log_sum(raw, design, law.term_of, law.join)
    for i in range(len(raw)):
        step = np.zeros_like(raw)
        step[i] = 1e-6
        up, down = (log_sum(raw + s, design, law.term_of, law.join)[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[:, i], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.formula)
def test_reported_coefficients_lead_back(law: Law) -> None:
    raw = np.linspace(-1.0, 1.0, len(law.names))
    reported = dict(zip(law.names, law.to_reported(raw), strict=True))
    np.testing.assert_allclose(law.to_raw(reported), raw, atol=1e-14)
    assert find_law(law.name, reported) is law


def test_an_exponent_written_with_a_minus_is_positive() -> None:
    value = N_FLOOR.value({"A": 2.0, "a": 0.5, "E": 0.1}, {"n_latents": np.array([4.0])})
    np.testing.assert_allclose(value, [2.0 * 4.0**-0.5 + 0.1])


def test_unknown_law() -> None:
    with pytest.raises(SaescaleError, match="no law n with coefficients B"):
        find_law("n", {"B": 1})
