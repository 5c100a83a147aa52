"""Published laws by another route: a loss written out by hand, minimised by scipy from other starts."""

import io
from importlib.resources import files

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from saescale.scaling.laws.estimate import fit_law
from saescale.scaling.laws.forms.n_d import N_D
from saescale.scaling.laws.forms.n_k import N_K
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.reproduce import PUBLISHED
from saescale.scaling.tables import load_results


def best_of(loss: object, starts: np.ndarray) -> tuple[np.ndarray, float]:
    """(coefficients, loss) of the best of scipy's searches, by derivatives and without."""
    found = []
    for start in starts:
        once = minimize(loss, start, method="L-BFGS-B", options={"maxiter": 3000, "ftol": 1e-14})  # type: ignore[call-overload]
        found.append((once.fun, once.x))
    lowest = min(found, key=lambda pair: pair[0])[1]
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-10, "fatol": 1e-15, "adaptive": True}
    for _ in range(3):
        lowest = minimize(loss, lowest, method="Nelder-Mead", options=options).x  # type: ignore[call-overload]
    return lowest, float(loss(lowest))  # type: ignore[operator]


def test_the_published_cells_are_fitted_as_scipy_fits_them() -> None:
    cells = load_results(str(PUBLISHED / "results.csv"))
    ln, lk, y = (np.log(cells[name]) for name in ("n_latents", "k", "nmse"))
    x, z = ln - ln.mean(), lk - lk.mean()

    def loss(c: np.ndarray) -> float:
        power = c[0] + c[1] * z + c[2] * x + c[3] * x * z
        return float(huber(1e-3, np.logaddexp(power, c[4] + c[5] * z) - y).sum() * 1e6)

    rng = np.random.default_rng(7)
    lowest = y.min()
    starts = np.column_stack([rng.uniform(lowest - 1, lowest + 1, 8), rng.uniform(-0.5, 0.5, (8, 3)),
                              rng.uniform(lowest - 2, lowest, 8), rng.uniform(-0.5, 0.5, 8)])  # fmt: skip
    found, least = best_of(loss, starts)
    fit = fit_law(N_K, cells.columns, cells["nmse"], FitSettings(0))
    ours = float(huber(1e-3, N_K.log_value(fit.raw, cells.columns) - y).sum() * 1e6)
    assert ours <= least * (1 + 1e-6)
    assert least <= 1.02 * ours
    for k in (8, 64):
        slope = found[2] + found[3] * (np.log(k) - lk.mean())
        assert slope == pytest.approx(float(N_K.exponent_of(fit.raw, "n_latents", {"k": k})), rel=0.03)


def test_chinchilla_is_fitted_as_scipy_fits_it() -> None:
    content = files("saescale.scaling").joinpath("data/chinchilla_points.csv").read_text()
    points = np.genfromtxt(io.StringIO(content), delimiter=",", names=True)
    n, d, y = (np.log(points[name]) for name in ("n_parameters", "tokens", "loss"))

    def loss(c: np.ndarray) -> float:
        terms = np.stack([c[0] - c[1] * n, c[2] - c[3] * d, np.full_like(n, c[4])])
        return float(huber(1e-3, np.logaddexp.reduce(terms, axis=0) - y).sum() * 1e6)

    starts = np.array([[a, e, a + 1, e, 0.5] for a in (4.0, 9.0) for e in (0.25, 0.45)])
    found, _ = best_of(loss, starts)
    columns = {"n_latents": points["n_parameters"], "tokens": points["tokens"]}
    fit = fit_law(N_D, columns, points["loss"], FitSettings(0))
    reported = np.array([np.exp(found[0]), found[1], np.exp(found[2]), found[3], np.exp(found[4])])
    np.testing.assert_allclose(N_D.to_reported(fit.raw), reported, rtol=2e-3)
