"""Known laws come back from data, with intervals that hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.estimate import fit_law
from scaling.fit import coefficient_rows, fit_all, predict
from scaling.laws import GPT4, N_D, N_FLOOR, N_K, N
from scaling.tables import Table
from storage.errors import SaescaleError

SIZES = tuple(2 ** np.arange(11, 22, 2))
KS = (8, 16, 32, 64, 128, 256, 512)
Rows = list[dict[str, Any]]


@pytest.mark.parametrize(("sizes", "ks"), [(SIZES, KS), ((512, 1024, 2048, 4096), (8, 16, 32, 64))])
def test_published_coefficients_without_noise(cells: Callable[..., Rows], sizes: Any, ks: Any) -> None:
    table = Table.from_rows(cells(sizes, ks))
    fit = fit_law(N_K, table.columns, table["nmse"], bootstraps=0)
    found = dict(zip(N_K.names, N_K.to_reported(fit.raw), strict=True))
    assert found == pytest.approx(GPT4, abs=1e-6)
    assert fit.agreeing > 1


def test_published_coefficients_within_intervals_under_noise(cells: Callable[..., Rows]) -> None:
    table = Table.from_rows(cells(SIZES, KS, noise=0.005, seed=1))
    document = fit_all(table, bootstraps=400, laws=("n_k",))
    entry = document["fits"][0]
    for name, value in entry["coefficients"].items():
        assert value["low"] <= GPT4[name] <= value["high"], name
    for k in KS:
        exponent = entry["exponent_of_n_at_k"][str(k)]
        true = GPT4["beta_n"] + GPT4["gamma"] * np.log(k)
        assert exponent["low"] <= true <= exponent["high"]
        assert exponent["value"] == pytest.approx(true, abs=0.01)
    assert entry["points"] == 42
    assert entry["rms_log_residual"] == pytest.approx(0.005, rel=0.4)
    assert entry["holdout"]["held_out"] == "n >= 2097152"
    assert entry["holdout"]["rms_log_error"] < 0.02


def test_published_chinchilla_refit() -> None:
    path = Path(__file__).parent / "data" / "chinchilla_points.csv"
    points = np.genfromtxt(path, delimiter=",", names=True)
    columns = {"n_latents": points["n_parameters"], "tokens": points["tokens"]}
    fit = fit_law(N_D, columns, points["loss"], bootstraps=0)
    found = dict(zip(N_D.names, N_D.to_reported(fit.raw), strict=True))
    assert len(points) == 234
    assert found["A"] == pytest.approx(442.2, abs=0.05)
    assert found["B"] == pytest.approx(1271.8, abs=0.05)
    assert found["E"] == pytest.approx(1.7839, abs=5e-5)
    assert found["a"] == pytest.approx(0.3426, abs=5e-5)
    assert found["b"] == pytest.approx(0.3420, abs=5e-5)


def test_floor_is_found_and_outliers_are_ignored() -> None:
    n = 2.0 ** np.arange(9, 20)
    nmse = N_FLOOR.value({"A": 3.0, "a": 0.4, "E": 0.1}, {"n_latents": n})
    nmse[3] *= 1.3
    fit = fit_law(N_FLOOR, {"n_latents": n}, nmse, bootstraps=0)
    np.testing.assert_allclose(N_FLOOR.to_reported(fit.raw), [3.0, 0.4, 0.1], rtol=0.01)


def test_document_is_deterministic_json_and_predicts(cells: Callable[..., Rows]) -> None:
    table = Table.from_rows(cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.005))
    document = fit_all(table, bootstraps=50, seed=3)
    assert json.dumps(document, allow_nan=False) == json.dumps(fit_all(table, bootstraps=50, seed=3))
    assert [fit["law"] for fit in document["fits"]] == ["n_k", "n", "n", "n", "n"]
    assert {s["law"] for s in document["skipped"]} == {"n", "c"}
    n_k, at_8 = document["fits"][:2]
    measured = table["nmse"][table["k"] == 8]
    sizes = table["n_latents"][table["k"] == 8]
    np.testing.assert_allclose(predict(n_k, n_latents=sizes, k=8), measured, rtol=0.02)
    np.testing.assert_allclose(predict(at_8, n_latents=sizes), measured, rtol=0.02)
    with pytest.raises(SaescaleError, match="law n_k needs k"):
        predict(n_k, n_latents=512)
    rows = coefficient_rows(document)
    assert rows[0].law == "n_k"
    assert "exponent of n at k = 8" in [row.coefficient for row in rows]
    assert "n at k = 64" in [row.law for row in rows]


def test_two_by_two_grid_gives_a_document_with_reasons(cells: Callable[..., Rows]) -> None:
    document = fit_all(Table.from_rows(cells((512, 1024), (8, 16))), bootstraps=10)
    assert document["fits"] == []
    reasons = [s["reason"] for s in document["skipped"] if s["law"] == "n_k"]
    assert len(reasons) == 1
    assert "4 points for 6 coefficients" in reasons[0]


def test_refusals_name_the_counts() -> None:
    n = 2.0 ** np.arange(9, 12)
    with pytest.raises(SaescaleError, match="3 points for 2 coefficients; it takes at least 4"):
        fit_law(N, {"n_latents": n}, 1 / n, bootstraps=0)
    grid = {"n_latents": np.tile(n, 4), "k": np.repeat([8.0, 16.0], 6)}
    with pytest.raises(SaescaleError, match="k takes 2 different values; it takes at least 3"):
        fit_law(N_K, grid, 1 / grid["n_latents"], bootstraps=0)
    with pytest.raises(SaescaleError, match="unknown law nk; there are n_k"):
        fit_all(Table.from_rows([{"n_latents": 1, "k": 1, "nmse": 1}]), laws=("nk",))


def test_degenerate_resamples_are_drawn_again() -> None:
    n = 2.0 ** np.arange(9, 14)
    nmse = N_FLOOR.value({"A": 3.0, "a": 0.4, "E": 0.1}, {"n_latents": n})
    fit = fit_law(N_FLOOR, {"n_latents": n}, nmse, bootstraps=300)
    assert fit.redrawn > 0
    assert np.isfinite(fit.draws).all()
