"""Known laws come back from data, with intervals that hold them."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.laws.estimate import fit_law
from saescale.scaling.laws.fit import fit_all
from saescale.scaling.laws.forms.n import N_FLOOR, N
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.notes import coefficient_rows, fit_notes
from saescale.scaling.laws.predict import predict
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

SIZES = tuple(2 ** np.arange(11, 22, 2))
KS = (8, 16, 32, 64, 128, 256, 512)
Rows = list[dict[str, Any]]


@pytest.mark.parametrize(("sizes", "ks"), [(SIZES, KS), ((512, 1024, 2048, 4096), (8, 16, 32, 64))])
def test_published_coefficients_without_noise(cells: Callable[..., Rows], sizes: Any, ks: Any) -> None:
    table = Table.from_rows(cells(sizes, ks))
    fit = fit_law(N_K, table.columns, table["nmse"], FitSettings(0))
    found = dict(zip(N_K.names, N_K.to_reported(fit.raw), strict=True))
    assert found == pytest.approx(GPT4, abs=1e-6)
    assert fit.agreeing > 1


def test_published_coefficients_within_intervals_under_noise(cells: Callable[..., Rows]) -> None:
    table = Table.from_rows(cells(SIZES, KS, noise=0.005, seed=1))
    document = fit_all(table, settings=FitSettings(400, laws=("n_k",)))
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


def test_floor_is_found_and_outliers_are_ignored() -> None:
    n = 2.0 ** np.arange(9, 20)
    nmse = N_FLOOR.value({"A": 3.0, "a": 0.4, "E": 0.1}, {"n_latents": n})
    nmse[3] *= 1.3
    fit = fit_law(N_FLOOR, {"n_latents": n}, nmse, FitSettings(0))
    np.testing.assert_allclose(N_FLOOR.to_reported(fit.raw), [3.0, 0.4, 0.1], rtol=0.01)


def test_document_is_deterministic_json_and_predicts(cells: Callable[..., Rows]) -> None:
    rows = [row | {"flops": None} for row in cells((512, 1024, 2048, 4096), (8, 16, 32, 64), noise=0.005)]
    table = Table.from_rows(rows)
    document = fit_all(table, settings=FitSettings(50, seed=3))
    assert json.dumps(document, allow_nan=False) == json.dumps(fit_all(table, settings=FitSettings(50, seed=3)))
    assert [fit["law"] for fit in document["fits"]] == ["n_k", "n", "n", "n", "n"]
    assert {s["law"] for s in document["skipped"]} == {"n", "c"}
    n_k, at_8 = document["fits"][:2]
    measured = table["nmse"][table["k"] == 8]
    sizes = table["n_latents"][table["k"] == 8]
    np.testing.assert_allclose(predict(n_k, n_latents=sizes, k=8), measured, rtol=0.02)
    np.testing.assert_allclose(predict(at_8, n_latents=sizes), measured, rtol=0.02)
    with pytest.raises(SaescaleError, match="law n_k needs k"):
        predict(n_k, n_latents=512)
    table_rows = coefficient_rows(document)
    assert table_rows[0].law == "n_k"
    assert "exponent of n at k = 8" in [row.coefficient for row in table_rows]
    assert "n at k = 64" in [row.law for row in table_rows]


def test_two_by_two_grid_gives_a_document_with_reasons(cells: Callable[..., Rows]) -> None:
    document = fit_all(Table.from_rows(cells((512, 1024), (8, 16))), settings=FitSettings(10))
    assert document["fits"] == []
    reasons = [s["reason"] for s in document["skipped"] if s["law"] == "n_k"]
    assert len(reasons) == 1
    assert "4 points for 6 coefficients" in reasons[0]


def test_refusals_name_the_counts() -> None:
    n = 2.0 ** np.arange(9, 12)
    with pytest.raises(SaescaleError, match="3 points for 2 coefficients; it takes at least 4"):
        fit_law(N, {"n_latents": n}, 1 / n, FitSettings(0))
    grid = {"n_latents": np.tile(n, 4), "k": np.repeat([8.0, 16.0], 6)}
    with pytest.raises(SaescaleError, match="k takes 2 different values; it takes at least 3"):
        fit_law(N_K, grid, 1 / grid["n_latents"], FitSettings(0))
    with pytest.raises(SaescaleError, match=r"unknown law 'nk': did you mean n_k\? there are c, d_of_c, n, n_d"):
        fit_all(Table.from_rows([{"n_latents": 1, "k": 1, "nmse": 1}]), settings=FitSettings(laws=("nk",)))


def test_notes_say_each_thing_once() -> None:
    def entry(law: str, k: float | None, floor: bool, **more: Any) -> dict[str, Any]:
        return {"law": law, "at": {} if k is None else {"k": k}, "floor": floor, **more}

    document = {
        "skipped": [entry("n", k, True, reason="4 points") for k in (8.0, 16.0, 32.0)] +
                   [entry("n_d", None, False, reason="no column tokens"), entry("n", 64.0, True, reason="3 points")],
        "warnings": ["k spans only a factor of 2"],
        "fits": [entry("n_k", None, False, warnings=["few starts"])] +
                [entry("c", k, floor, warnings=["upper bound"]) for k in (8.0, 16.0) for floor in (False, True)] +
                [entry("c", 32.0, False, warnings=["few starts"])],
    }  # fmt: skip
    assert fit_notes(document) == [
        "not fitted: n at k = 8, 16, 32, with floor: 4 points",
        "not fitted: n_d: no column tokens",
        "not fitted: n at k = 64, with floor: 3 points",
        "k spans only a factor of 2",
        "n_k; c at k = 32: few starts",
        "c at k = 8, 16; c at k = 8, 16, with floor: upper bound",
    ]


@pytest.mark.parametrize(
    ("law", "columns", "fits"),
    [
        ("n", ("n_latents",), 1),
        ("n", ("n_latents", "k"), 2),
        ("c", ("flops",), 1),
        ("c", ("flops", "k"), 2),
        ("n_k", ("n_latents", "k"), 1),
    ],
)
def test_a_law_takes_its_own_columns_alone(
    cells: Callable[..., Rows], law: str, columns: tuple[str, ...], fits: int
) -> None:
    ks = (8, 32, 128) if law == "n_k" else (8, 32) if "k" in columns else (8,)
    rows = [{name: row[name] for name in (*columns, "nmse")} for row in cells(SIZES, ks)]
    document = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=(law,)))
    forms = 1 if law == "n_k" else 2
    assert [entry["law"] for entry in document["fits"]] == [law] * (fits if law == "n_k" else fits * forms)
    assert document["skipped"] == []
    assert ("no column k: all cells are taken for cells of one k" in document["warnings"]) == ("k" not in columns)
    assert any("made of the ends of cells" in note for note in fit_notes(document)) == (law == "c")


@pytest.mark.parametrize(
    ("law", "reason"),
    [
        ("n_k", "rows: no column n_latents, k; it has nmse, flops. Add what is missing"),
        ("n", "rows: no column n_latents;"),
        ("n_d", "rows: no column n_latents, tokens;"),
    ],
)
def test_a_law_without_its_columns_is_skipped(law: str, reason: str) -> None:
    document = fit_all(Table.from_rows([{"nmse": 0.5, "flops": 1e9}]), settings=FitSettings(0, laws=(law,)))
    assert document["fits"] == []
    (skipped,) = document["skipped"]
    assert (skipped["law"], skipped["at"]) == (law, {})
    assert skipped["reason"].startswith(reason)
    without = fit_all(Table.from_rows([{"nmse": 0.5, "n_latents": 8}]), settings=FitSettings(0, laws=("c",)))
    assert without["skipped"][0]["reason"].startswith("without curves law c takes the flops of cells: rows: no column")
