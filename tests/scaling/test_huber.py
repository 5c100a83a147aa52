"""Amplitudes by exact non-negative least squares, exponents by search."""

import numpy as np
import pytest
from scipy.optimize import nnls

from saescale.scaling.laws.estimate import centred, fit_law
from saescale.scaling.laws.forms.n import N_FLOOR
from saescale.scaling.laws.forms.n_d import N_D
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.huber import _nnls, losses, minimise, solve_amplitudes
from saescale.scaling.laws.settings import FitSettings

GRID = {
    name: values.ravel()
    for name, values in zip(
        ("n_latents", "k"),
        np.meshgrid(2.0 ** np.arange(11, 22, 2), 2.0 ** np.arange(3, 10), indexing="ij"),
        strict=True,
    )
}


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_batched_nnls_is_scipys(terms: int) -> None:
    rng = np.random.default_rng(terms)
    matrices, targets = rng.normal(size=(200, 8, terms)), rng.normal(size=(200, 8))
    found = _nnls(matrices.transpose(0, 2, 1) @ matrices, (matrices * targets[..., None]).sum(axis=1))
    expected = np.array([nnls(a, b)[0] for a, b in zip(matrices, targets, strict=True)])
    assert (expected == 0).any()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_amplitudes_follow_from_the_exponents() -> None:
    log_nmse = np.log(N_K.value(GPT4, GRID))
    problem, to_raw = centred(N_K, GRID, log_nmse)
    truth = np.linalg.solve(to_raw, N_K.to_raw(GPT4))
    away = truth.copy()
    away[problem.amplitudes] += [0.5, -0.8]
    for _ in range(6):
        away = solve_amplitudes(problem, away[None], log_nmse, np.ones((1, len(log_nmse))))[0]
    np.testing.assert_allclose(away, truth, atol=1e-6)


def test_a_term_that_the_data_do_not_have_is_switched_off() -> None:
    n = 2.0 ** np.arange(9, 17)
    log_nmse = np.log(3.0 * n**-0.3)
    fit = fit_law(N_FLOOR, {"n_latents": n}, np.exp(log_nmse), FitSettings(0))
    floor = N_FLOOR.to_reported(fit.raw)[2]
    assert floor < 1e-3 * np.exp(log_nmse.min())
    assert N_FLOOR.to_reported(fit.raw)[1] == pytest.approx(0.3, abs=1e-3)


def test_equal_bounds_hold_a_coefficient_in_each_fit_of_its_own() -> None:
    n = 2.0 ** np.arange(9, 17)
    log_nmse = np.log(N_FLOOR.value({"A": 3.0, "a": 0.4, "E": 0.1}, {"n_latents": n}))
    problem, to_raw = centred(N_FLOOR, {"n_latents": n}, log_nmse)
    best = np.linalg.solve(to_raw, N_FLOOR.to_raw({"A": 3.0, "a": 0.4, "E": 0.1}))
    floors = np.log([0.05, 0.1, 0.12])
    low, high = (np.tile(bound, (3, 1)) for bound in (problem.low, problem.high))
    low[:, 2] = high[:, 2] = floors
    from dataclasses import replace

    found, loss = minimise(replace(problem, low=low, high=high), np.tile(best, (3, 1)), log_nmse, np.ones(8))
    np.testing.assert_allclose(found[:, 2], floors)
    assert loss[1] < 1e-12 < min(loss[0], loss[2])
    np.testing.assert_allclose(loss[0], losses(problem, found[:1], log_nmse, np.ones(8))[0])


def test_projection_takes_the_conditioning_out() -> None:
    """From the formula's coefficients to what is searched, condition numbers of J^T J fall by orders of magnitude."""
    rng = np.random.default_rng(0)
    n, tokens = (10 ** rng.uniform(low, low + 2.5, 100) for low in (7.5, 9))
    loss = N_D.value({"A": 400.0, "a": 0.34, "B": 1300.0, "b": 0.34, "E": 1.8}, {"n_latents": n, "tokens": tokens})
    for law, columns, values, least in ((N_K, GRID, N_K.value(GPT4, GRID), 1e3),
                                        (N_D, {"n_latents": n, "tokens": tokens}, loss, 1e10)):  # fmt: skip
        conditioning = fit_law(law, columns, values, settings=FitSettings(0)).conditioning
        assert conditioning is not None
        assert conditioning.coefficients > least * conditioning.projected
        assert conditioning.projected < 500
