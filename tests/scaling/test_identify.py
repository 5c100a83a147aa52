"""How well coefficients are determined: profile of the floor, comparison without it, hold-outs, predictions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.figures.views import Points
from saescale.scaling.figures.views_profile import profile
from saescale.scaling.laws.checks import fit_warnings
from saescale.scaling.laws.estimate import centred, fit_law
from saescale.scaling.laws.fit import fit_all, fit_laws
from saescale.scaling.laws.forms.n import N_FLOOR
from saescale.scaling.laws.forms.n_flattens import N_FLATTENS
from saescale.scaling.laws.holdout import compare_without_last, hold_out
from saescale.scaling.laws.identify import profile_floor
from saescale.scaling.laws.law import Exponent, Law, Term
from saescale.scaling.laws.predict import parse_point, predictions
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

Rows = list[dict[str, Any]]
TRUE = {"A": 3.0, "a": 0.4, "E": 0.1}


def eight_widths(noise: float = 0.004, seed: int = 3, truth: dict[str, float] = TRUE) -> tuple[np.ndarray, np.ndarray]:
    n = 2.0 ** np.arange(9, 17)
    rng = np.random.default_rng(seed)
    return n, N_FLOOR.value(truth, {"n_latents": n}) * np.exp(noise * rng.standard_normal(8))


def as_rows(n: np.ndarray, nmse: np.ndarray) -> Rows:
    return [{"n_latents": a, "k": 8, "nmse": b} for a, b in zip(n, nmse, strict=True)]


def test_profile_of_a_floor_that_is_there() -> None:
    fit = fit_laws(Table.from_rows(as_rows(*eight_widths())), settings=FitSettings(50, laws=("n",))).fits[1]
    profile = fit.document()["profile_of_floor"]
    assert profile["low"] < 0.1 < profile["high"]
    assert profile["low"] > 0.05
    rows = profile["values"]
    assert rows[0]["floor"] == 0
    assert rows[0]["ratio"] > profile["limit"]
    best = min(rows, key=lambda row: row["ratio"])
    assert best["ratio"] < 0.01
    assert best["exponent"] == pytest.approx(-0.4, abs=0.05)
    # A higher floor goes with a steeper law.
    exponents = [row["exponent"] for row in rows]
    assert exponents == sorted(exponents, reverse=True)


def test_profile_reaches_zero_where_the_floor_is_not_determined() -> None:
    n, nmse = eight_widths(noise=0.05, truth={"A": 3.0, "a": 0.2, "E": 0.02})
    fit = fit_laws(Table.from_rows(as_rows(n, nmse)), settings=FitSettings(50, laws=("n",))).fits[1]
    assert fit.profile is not None
    assert fit.profile.low == 0.0
    assert fit.profile.high > 0.05


def test_profile_that_is_open_above() -> None:
    """Where even a floor just under the lowest point is not refused, its interval has no upper end."""
    n, nmse = eight_widths(noise=0.3, seed=1, truth={"A": 0.25, "a": 0.01, "E": 0.25})
    document = fit_laws(Table.from_rows(as_rows(n, nmse)), settings=FitSettings(50, laws=("n",))).document()
    found = document["fits"][1]["profile_of_floor"]
    assert found["values"][-1]["ratio"] <= found["limit"]
    assert found["high"] is None
    view = profile(document, (8.0,))
    assert view is not None
    assert "Open above at the lowest measured nmse, where floors end: k = 8." in view.caption
    (points,) = (layer for layer in view.layers if isinstance(layer, Points))
    assert "open above)" in points.texts[0]


def test_profile_of_a_law_whose_first_term_lacks_its_first_column() -> None:
    """Its exponent is that of the first column which the first term has."""
    law = Law(
        "mine", "nmse = A k^-b + B n^-a", ("n_latents", "k"),
        (Term("A", (Exponent("b", ("k",), sign=-1.0),)), Term("B", (Exponent("a", ("n_latents",), sign=-1.0),))),
    )  # fmt: skip
    n, k = (grid.ravel() for grid in np.meshgrid([512.0, 1024, 2048, 4096], [8.0, 16, 32, 64]))
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(16))
    fit = fit_law(law, {"n_latents": n, "k": k}, (0.6 * k**-0.3 + 2 * n**-0.4) * noise, settings=FitSettings(20))
    problem, to_raw = centred(law, fit.columns, np.log(fit.nmse))
    found = profile_floor(law, problem, np.linalg.solve(to_raw, fit.raw), np.log(fit.nmse))
    assert found is not None
    assert found.exponent[np.argmin(found.ratio)] == pytest.approx(-0.3, abs=0.05)
    assert "exponent_of_n_at_k" not in fit.document()
    assert fit_warnings(fit) == []


def test_with_and_without_a_floor() -> None:
    n, nmse = eight_widths()
    held = n == n.max()
    needed = compare_without_last(fit_law(N_FLOOR, {"n_latents": n}, nmse, FitSettings(0)), held)
    assert needed is not None
    assert needed["aicc_difference"] > 10
    assert needed["words"].startswith("the cells need the last term (AICc")
    assert needed["rms_log_error_held_out"]["with"] < needed["rms_log_error_held_out"]["without"]
    plain = 3 * n**-0.3 * nmse / N_FLOOR.value(TRUE, {"n_latents": n})
    without = compare_without_last(fit_law(N_FLOOR, {"n_latents": n}, plain, FitSettings(0)), held)
    assert without is not None
    assert "do without" in without["words"]


def test_curvature_shows_in_the_same_comparison() -> None:
    n = 2.0 ** np.arange(9, 21)
    bent = N_FLATTENS.value({"A": 300.0, "a": 0.9, "B": 1.0, "b": 0.1}, {"n_latents": n})
    curved = compare_without_last(fit_law(N_FLATTENS, {"n_latents": n}, bent, FitSettings(0)), None)
    straight = compare_without_last(fit_law(N_FLATTENS, {"n_latents": n}, 3 * n**-0.3, FitSettings(0)), None)
    assert curved is not None
    assert straight is not None
    assert curved["aicc_difference"] > 10
    assert straight["aicc_difference"] < 2


def test_hold_out_says_how_many_it_covers() -> None:
    n, nmse = eight_widths()
    fit = fit_law(N_FLOOR, {"n_latents": n}, nmse, FitSettings(100))
    document = hold_out(fit, n >= n[-2], "n >= 32768")
    assert document is not None
    assert (document["points"], document["coverage"]) == (2, document["covered"] / 2)
    for row in document["predictions"]:
        assert row["low"] < row["law_low"] < row["law_high"] < row["high"]
    assert hold_out(fit, n >= n[3], "n >= 4096") is None


def test_compute_is_held_out_too(cells: Callable[..., Rows]) -> None:
    rows = cells((512, 1024, 2048, 4096), (8, 16, 32, 64))
    for row in rows:
        row["flops"] *= 4 if row["k"] == 8 else 1  # other cells than those of the largest n
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=("n_k",)))["fits"]
    assert entry["holdout"]["held_out"] == "n >= 4096"
    assert {row["k"] for row in entry["holdout_compute"]["predictions"]} >= {8.0}
    assert min(row["n_latents"] for row in entry["holdout_compute"]["predictions"]) < 4096
    same = fit_all(
        Table.from_rows(cells((512, 1024, 2048, 4096), (8, 16, 32, 64))), settings=FitSettings(0, laws=("n_k",))
    )
    holdout, compute = (same["fits"][0][key] for key in ("holdout", "holdout_compute"))
    assert compute["predictions"] == holdout["predictions"]


def test_a_point_in_words() -> None:
    assert parse_point("n=65536, k=64") == {"n_latents": 65536, "k": 64}
    assert parse_point("flops=1e15") == {"flops": 1e15}
    for text, message in (
        ("m=3", "'m' is none of n, k"),
        ("n=x", "n is 'x', not a number"),
        ("n=-1", "must be positive"),
        ("n=0,k=8", "must be positive"),
        ("n=nan", "must be positive"),
        ("n=inf", "must be positive"),
        ("n=1e300", "no more than 1e"),
        ("n=1000,N=1000", "N is given twice"),
        ("n=512.5", "n is 512.5, and counts latents: give a whole number"),
        ("n=1e6,k=2e6", "k is above n; an SAE has no more"),
        ("", "'' is none of n, k"),
    ):
        with pytest.raises(SaescaleError, match=message):
            parse_point(text)


def test_predictions_of_the_laws_that_apply(cells: Callable[..., Rows]) -> None:
    table = Table.from_rows(cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.003))
    fits = fit_laws(table, settings=FitSettings(100)).fits
    rows = predictions(fits, {"n_latents": 65536, "k": 32}, table)
    assert [(row["law"], row["floor"]) for row in rows] == [("n_k", False), ("n", False)]
    for row in rows:
        assert row["low"] < row["law_low"] < row["value"] < row["law_high"] < row["high"]
    assert rows[0]["far"] == [
        "n is 16 times above the largest in the fit: an interval says nothing of whether the law still holds there"
    ]
    with pytest.raises(SaescaleError, match=r"no fitted law applies at k = 32; there are n_k \(needs n, k\)"):
        predictions(fits, {"k": 32}, table)
    # All cells have these tokens, so the laws hold for them; of others they know nothing.
    assert predictions(fits, {"n_latents": 65536, "k": 32, "tokens": 8e6}, table)[0]["value"] == rows[0]["value"]
    with pytest.raises(SaescaleError, match=r"no fitted law applies at n = 65536, k = 32, D = 2000000; .*--law n_d"):
        predictions(fits, {"n_latents": 65536, "k": 32, "tokens": 2e6}, table)


def test_correlations_are_those_of_repeated_fits() -> None:
    """Of least squares about the truth: the inverse of J^T J says how estimates of A, a and E move together."""
    n, _ = eight_widths()
    fits = [fit_law(N_FLOOR, {"n_latents": n}, eight_widths(0.001, seed)[1], FitSettings(0)) for seed in range(60)]
    estimates = np.stack([N_FLOOR.to_reported(fit.raw) for fit in fits])
    expected = fits[0].conditioning
    assert expected is not None
    np.testing.assert_allclose(np.corrcoef(estimates.T), expected.correlation, atol=0.1)
