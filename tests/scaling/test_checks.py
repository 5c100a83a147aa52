"""Each warning appears where the data cannot carry the claim, and only there."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from saescale.scaling.laws.fit import fit_all, fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

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
        (lambda rows: [*rows[:-1], rows[-1] | {"nmse": 0.9}], r"nmse does not fall with N at k = 64 \(from N = 2048"),
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
    assert "at k = 8 (from N = 2048 to 4096) or at k = 16 (from N = 2048 to 4096): those cells" in warning


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
