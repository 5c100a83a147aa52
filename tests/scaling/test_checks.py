"""Each warning appears where the data cannot carry the claim, and only there."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.kinds import without_diverged
from saescale.scaling.laws.checks import data_warnings
from saescale.scaling.laws.fit import fit_all, fit_laws
from saescale.scaling.laws.law import forms_of
from saescale.scaling.laws.leading import far_cells
from saescale.scaling.laws.notes import fit_notes
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.scaling.words import listed

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096), (8, 16, 32, 64)


def test_a_good_grid_has_no_warning_about_its_cells(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS)
    document = fit_all(Table.from_rows(rows), Table.from_rows(curves_of(rows)), settings=FitSettings(0, laws=("n_k",)))
    assert document["warnings"] == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda rows: [r for r in rows if r["n_latents"] < 4096], "N spans only a factor of 4"),
        (lambda rows: [r for r in rows if r["k"] < 64], "k spans only a factor of 4"),
        (lambda rows: [r | {"d_model": 128} for r in rows], "k = 64 is above d_model / 4 = 32"),
        (lambda rows: [rows[0] | {"dead_fraction": 0.4}, *rows[1:]], "N = 512, k = 8: 40%"),
        (
            lambda rows: [rows[0] | {"l0": 9.0}, *(r | {"l0": r["k"] * 1.05} for r in rows[1:])],
            "1 cells .* k = 8: L0 9",
        ),
        (lambda rows: [*rows[:-1], rows[-1] | {"nmse": 0.9}], r"in these steps: k = 64, N = 2048 to 4096; those"),
    ],
)
def test_warnings_about_cells(cells: Callable[..., Rows], change: Callable[[Rows], Rows], warning: str) -> None:
    document = fit_all(Table.from_rows(change(cells(SIZES, KS))), settings=FitSettings(0, laws=("n_k",)))
    assert len(document["warnings"]) == 1
    assert re.search(warning, document["warnings"][0])


def test_unconverged_cells(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS)
    curves = Table.from_rows(curves_of(rows, late_fall=0.2))
    (warning,) = fit_all(Table.from_rows(rows), curves, settings=FitSettings(0, laws=("n_k",)))["warnings"]
    assert warning.startswith("16 cells are not converged")


def test_floor_and_exponent_traded_off(cells: Callable[..., Rows]) -> None:
    rows = cells(tuple(2 ** np.arange(9, 15)), (32,), noise=0.01)
    fits = fit_laws(Table.from_rows(rows), settings=FitSettings(200, laws=("n",))).fits
    assert [fit.law.has_floor for fit in fits] == [False, True]
    assert not any("floor" in w for w in fits[0].warnings)
    assert any("traded off" in w or "not told apart" in w for w in fits[1].warnings)


def test_exponent_swamped_by_noise(cells: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS, noise=1.2)
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(200, laws=("n_k",)))["fits"]
    assert any("cannot be told from 0" in w for w in entry["warnings"])


def test_nothing_left_to_hold_out(cells: Callable[..., Rows]) -> None:
    document = fit_all(Table.from_rows(cells(SIZES, (8,))), settings=FitSettings(0, laws=("n",)))
    (entry,) = document["fits"]
    assert entry["holdout"] is None
    assert any("nothing was held out" in w for w in entry["warnings"])


def test_sizes_that_rise_are_said_once_for_all_k(cells: Callable[..., Rows]) -> None:
    rows = [r | {"nmse": 0.9} if r["n_latents"] == 4096 and r["k"] < 32 else r for r in cells(SIZES, KS)]
    (warning,) = fit_all(Table.from_rows(rows), settings=FitSettings(0, laws=("n_k",)))["warnings"]
    assert "in these steps: k = 8, N = 2048 to 4096; k = 16, N = 2048 to 4096; those cells" in warning


def test_steps_are_those_of_tables_whose_tokens_are_alike_or_grow(cells: Callable[..., Rows]) -> None:
    """A table of many budgets is one for L(N, D): there a larger SAE of fewer tokens may well do worse."""
    rows = [r | {"nmse": 0.9} if r["n_latents"] == 4096 else r for r in cells(SIZES, KS)]
    for tokens, said in (
        (lambda row: 10**6, True),
        (lambda row: 100 * row["n_latents"], True),
        (lambda row: 10**9 // row["n_latents"], False),
        (lambda row: 10**6 + row["seed"], False),
    ):
        table = [row | {"seed": seed} for row in rows for seed in (0, 1)]
        found = fit_all(Table.from_rows([row | {"tokens": tokens(row)} for row in table]), settings=FitSettings(0))
        assert any("does not fall with N" in w for w in found["warnings"]) == said


def test_warnings_name_five_cases_at_most(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> None:
    """Every cell of a large table is at fault in every way: no note names more than five of them."""
    sizes, ks = tuple(2 ** np.arange(9, 18)), tuple(2 ** np.arange(3, 10))
    rows = [
        row | {"nmse": 0.1 + 0.01 * np.log2(row["n_latents"]), "dead_fraction": 0.5, "d_model": 8}
        for row in cells(sizes, ks)
    ]
    curves = Table.from_rows(curves_of(rows, evaluations=8, late_fall=0.3))
    document = fit_all(Table.from_rows(rows), curves, settings=FitSettings(5, laws=("n",)))
    notes = fit_notes(document)
    for said in ("dead latents", "does not fall with N", "not converged", "d_model / 4"):
        assert any(said in note for note in notes), said
    for note in notes:
        assert len(re.findall(r"N = \d+(?: to \d+)?", note)) <= 5, note
        assert not re.search(r"k = (\d+, ){5}\d", note), note
    assert sum("... and 58 more" in note for note in notes) == 2  # of 63 cells
    assert listed(map(str, range(5))) == "0; 1; 2; 3; 4"
    assert listed(map(str, range(59)), ", ") == "0, 1, 2, 3, 4, ... and 54 more"


def test_a_diverged_cell_is_said_and_kept_out(cells: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS, noise=0.003)
    alone = fit_all(Table.from_rows([row for row in rows if row["cell_id"] != "4096x64"]), settings=FitSettings(20))
    diverged = [row | {"nmse": 1e27} if row["cell_id"] == "4096x64" else row for row in rows]
    found = fit_all(Table.from_rows(diverged), settings=FitSettings(20))
    assert [entry["coefficients"] for entry in found["fits"]] == [entry["coefficients"] for entry in alone["fits"]]
    assert found["warnings"][0] == (
        "1 cell with nmse above 1, worse than the mean alone, diverged and is kept out of the fits "
        "(cell 4096x64, N = 4096, k = 64: nmse 1e+27); --keep-diverged fits it too"
    )
    assert found["excluded"] == found["warnings"][:1]
    kept = fit_all(Table.from_rows(diverged), settings=FitSettings(0, keep_diverged=True))
    assert kept["cells"] == found["cells"] + 1
    assert any(
        "nmse is above 1, worse than that of the mean alone, in 1 of the cells" in warning
        for warning in kept["warnings"]
    )
    # Of another loss than nmse every value may be above 1: nothing has diverged.
    other = fit_all(Table.from_rows([row | {"nmse": 5 * row["nmse"] + 1} for row in rows]), settings=FitSettings(0))
    assert other["cells"] == len(rows)
    assert any("taken for another loss" in warning for warning in other["warnings"])


def test_most_cells_above_1_have_not_diverged(cells: Callable[..., Rows]) -> None:
    """Mean squared errors of which a few happen to be small, and one that is infinite."""
    rows = cells(SIZES, KS)
    scale = 1 / np.quantile([row["nmse"] for row in rows], 0.3)
    rows = [row | {"nmse": scale * row["nmse"]} for row in rows]
    table = without_diverged(Table.from_rows([*rows[:-1], rows[-1] | {"nmse": np.inf}]))
    assert len(table) == len(rows) - 1
    assert "--keep-diverged" not in table.excluded[0]
    (warning,) = data_warnings(table, [table], (), ())
    assert re.match(r"nmse is above 1 in 11 of 15 cells: it is another loss, or the sweep is broken; none is", warning)


@pytest.mark.parametrize(
    ("tokens", "laws", "said"),
    [
        (lambda row, i: (1 + i % 3) * 10**6, "n_k", "cells of one N differ in tokens (1000000 to 3000000): n_k mix"),
        (
            lambda row, i: (1 + i % 3) * 10**6,
            "n_k n",
            "(1000000 to 3000000): n_k and n mix what that does to nmse; ask",
        ),
        (lambda row, i: (1 + i % 3) * 10**6, "n_k n_d", None),
        (lambda row, i: (1 + i % 3) * 10**6, "c", None),
        (lambda row, i: 10**6 + i % 3, "n_k", None),  # rounded to batches
        (lambda row, i: 10**5 * row["k"], "n", None),  # a law at each k
        (lambda row, i: 10**5 * row["k"], "n_k n", "cells of one N differ in tokens (800000 to 6400000)"),
        (lambda row, i: 10**3 * row["n_latents"], "n_k n", None),
        (lambda row, i: 10**9 // row["n_latents"], "n_k n", None),
        (lambda row, i: 10**6 * (1 + (row["n_latents"] == 1024)), "n_k", "tokens go up and down with N (1000000 to"),
        (lambda row, i: None if i else 10**6, "n_k", None),
    ],
)
def test_tokens_that_no_law_of_n_knows(
    cells: Callable[..., Rows], tokens: Callable[[dict[str, Any], int], int | None], laws: str, said: str | None
) -> None:
    rows = [row | {"tokens": tokens(row, i)} for i, row in enumerate(cells(SIZES, KS))]
    forms = [form for law in laws.split() for form in forms_of(law)]
    table = Table.from_rows(rows)
    warnings = [text for text in data_warnings(table, [table], (), forms) if "tokens" in text]
    assert len(warnings) == (said is not None)
    assert all(str(said) in text for text in warnings)


def test_a_size_that_is_the_only_one(cells: Callable[..., Rows]) -> None:
    table = Table.from_rows(cells((512,), KS))
    assert data_warnings(table, [table], (), ()) == ["all cells have N = 512: they say nothing of other N"]


def test_an_exponent_on_its_bound_is_said(cells: Callable[..., Rows]) -> None:
    """A fourth power is steeper than any law here may be."""
    rows = [{"n_latents": n, "k": 8, "nmse": n**-4.0} for n in 2.0 ** np.arange(9, 16)]
    plain = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=("n",)))["fits"][0]
    assert plain["coefficients"]["a"] == {"value": pytest.approx(3), "low": None, "high": None}
    assert plain["bounds_reached"] == [{"name": "a", "value": 3.0, "interval_only": False}]
    assert any("exponents stand on the bound" in w and "(a = 3)" in w for w in plain["warnings"])
    for entry in fit_all(Table.from_rows(cells(SIZES, KS, noise=0.004)), settings=FitSettings(50))["fits"]:
        assert "bounds_reached" not in entry, entry["law"]


def test_a_wrong_cell_that_leads_a_fit_is_named(cells: Callable[..., Rows]) -> None:
    """At a corner of a small grid one cell bends the whole law; in the middle it is passed by."""
    for wrong, leads in (("2048x8", True), ("1024x16", False), (None, False)):
        rows = [row | {"nmse": 0.95} if row["cell_id"] == wrong else row for row in cells(SIZES[:3], KS[:3], 0.002, 1)]
        (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(0, laws=("n_k",)))["fits"]
        steepest = min(value["value"] for value in entry["exponent_of_n_at_k"].values())
        assert (steepest < -1) == leads
        said = [w for w in entry["warnings"] if "single cells lead this fit" in w]
        assert bool(said) == leads
        assert all("others agree far better: N = 2048, k = 8, nmse 0.95" in w for w in said)


def test_a_wrong_cell_that_is_passed_by_is_named(cells: Callable[..., Rows]) -> None:
    for wrong, value in (("4096x8", 0.97), ("512x64", 0.97), ("1024x16", 1.7), ("4096x64", 0.1), (None, 0)):
        rows = [row | {"nmse": value} if row["cell_id"] == wrong else row for row in cells(SIZES, KS, 0.01, 1)]
        fits = fit_all(Table.from_rows(rows), settings=FitSettings(0, laws=("n_k",), keep_diverged=True))["fits"]
        said = [w for w in fits[0]["warnings"] if "single cells" in w]
        assert len(said) == (wrong is not None)
        for warning in said:
            assert f"nmse {value}" in warning
            assert f"leave them out, as with --where 'cell_id!={wrong}'" in warning


@pytest.mark.parametrize(
    ("residuals", "far"),
    [
        ([0.01, -0.02, 0.01, 0.02, -0.01, 0.4], [5]),
        ([0.01, -0.5, 0.01, 0.02, -0.01, 0.7, 0.01, 0.01, 0.02], [5, 1]),
        ([0.01, -0.02, 0.01, 0.02, -0.01, 0.03], []),
        ([0, 1e-9, 1e-9, 1e-9, 1e-9, 1e-3], []),  # nothing that a sweep's seeds would not do
        ([0.0, 0.0, 0.4], []),  # two coefficients meet two cells
    ],
)
def test_far_cells(residuals: list[float], far: list[int]) -> None:
    assert far_cells(np.array(residuals), 2).tolist() == far


def test_held_out_cells_outside_their_intervals(cells: Callable[..., Rows]) -> None:
    """A law that bends at the end: the last size is half as good as the others say it should be."""
    sizes = tuple(2 ** np.arange(9, 16))
    rows = [row | {"nmse": row["nmse"] * (1.3 if row["n_latents"] == sizes[-1] else 1)}
            for row in cells(sizes, KS, noise=0.002)]  # fmt: skip
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(50, laws=("n_k",)))["fits"]
    assert any("only 0 of 4 held-out cells (n >= 32768) lie in their 95 % intervals" in w for w in entry["warnings"])
    (good,) = fit_all(Table.from_rows(cells(sizes, KS, noise=0.002)), settings=FitSettings(50, laws=("n_k",)))["fits"]
    assert not any("held-out" in w for w in good["warnings"])


def test_few_degrees_of_freedom(cells: Callable[..., Rows]) -> None:
    fits = fit_all(
        Table.from_rows(cells((512, 1024, 2048), (8, 16, 32), noise=0.01)), settings=FitSettings(20, laws=("n_k",))
    )
    assert any("9 points for 6 coefficients: with 3 degrees of freedom" in w for w in fits["fits"][0]["warnings"])


def test_exponent_of_one_k_swamped_by_noise(cells: Callable[..., Rows]) -> None:
    rows = cells(tuple(2 ** np.arange(9, 15)), (8,), noise=0.5)
    fits = fit_all(Table.from_rows(rows), settings=FitSettings(100, laws=("n",)))["fits"]
    assert "the exponent of n cannot be told from 0" in fits[0]["warnings"]


def test_scatter_that_grows_with_n(cells: Callable[..., Rows]) -> None:
    sizes = tuple(2 ** np.arange(9, 19))
    quiet, loud = (cells(sizes, KS, noise=noise) for noise in (0.0005, 0.05))
    rows = [b if a["n_latents"] >= 2**14 else a for a, b in zip(quiet, loud, strict=True)]
    (entry,) = fit_all(Table.from_rows(rows), settings=FitSettings(20, laws=("n_k",)))["fits"]
    assert any(w.startswith("cells scatter more about the law at large n") for w in entry["warnings"])
    (even,) = fit_all(Table.from_rows(loud), settings=FitSettings(20, laws=("n_k",)))["fits"]
    assert not any("scatter more" in w for w in even["warnings"])
