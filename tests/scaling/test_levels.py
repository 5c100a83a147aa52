"""Levels of a cell stand in for cells where none was trained, and a measured L0 for a k that was a target."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.figures.figures import views_of
from saescale.scaling.figures.views import Points
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.levels import with_levels
from saescale.scaling.tables import Table

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096), (8, 16, 32, 64)


def levels(rows: Rows, at: int) -> str:
    """What a cell of the row's size would say of all k up to its own, from cells of these k."""
    own = [row for row in rows if row["n_latents"] == at]
    return json.dumps([{"k": row["k"], "nmse": row["nmse"], "l0": row["l0"] - 0.1} for row in own])


def test_levels_give_the_law_of_cells_of_their_k(cells: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS, noise=0.002)
    top = [row | {"levels": levels(rows, row["n_latents"])} for row in rows if row["k"] == 64]
    settings = FitSettings(40, laws=("n_k",))
    laws, of_cells = (fit_laws(Table.from_rows(each), settings=settings) for each in (top, rows))
    # Rows stand in another order, which moves a sum by its rounding.
    found, expected = (each.fits[0].coefficients() for each in (laws, of_cells))
    assert {n: c["value"] for n, c in found.items()} == pytest.approx(
        {n: c["value"] for n, c in expected.items()}, 1e-4
    )
    assert len(laws.results) == 4
    assert [note for note in laws.warnings if note.startswith("nmse at k = 8, 16, 32 is that of 12 levels of cells")]


def test_a_level_gives_way_to_a_cell_of_its_own(cells: Callable[..., Rows]) -> None:
    rows = cells((512,), KS)
    told = levels(rows, 512)
    table = with_levels(
        Table.from_rows([row | {"levels": told if row["k"] in (32, 64) else None} for row in rows if row["k"] != 16])
    )
    assert sorted(table["k"]) == [8, 16, 32, 64]
    assert table["cell_id"].tolist()[-1] == "512x32 at k = 16"  # of two that have it the nearer one
    assert table["l0"][-1] == pytest.approx(15.9)
    assert table["n_latents"].tolist() == [512] * 4


@pytest.mark.parametrize("text", ["", "null", "{", "7", '["a"]', '[{"k": 8}]', '[{"k": "8", "nmse": 1}]', "[{}]"])
def test_levels_that_say_nothing(cells: Callable[..., Rows], text: str) -> None:
    rows = [row | {"levels": text} for row in cells((512, 1024), (16,))]
    assert with_levels(Table.from_rows(rows))["k"].tolist() == [16, 16]


def test_laws_take_the_measured_l0_of_a_target(cells: Callable[..., Rows]) -> None:
    """Cells that miss their k by up to 20 % and lie on the law at what they have: the law comes back."""
    rng = np.random.default_rng(0)
    rows = []
    for row in cells(SIZES, KS):
        l0 = row["k"] * rng.uniform(0.8, 1.2)
        nmse = N_K.value(GPT4, {"n_latents": np.array([row["n_latents"]]), "k": np.array([l0])})[0]
        rows.append(row | {"l0": l0, "nmse": nmse, "l0_error": l0 / row["k"] - 1})
    laws = fit_laws(Table.from_rows(rows), settings=FitSettings(0, laws=("n_k", "n")))
    joint, *at_k = laws.fits
    assert {n: c["value"] for n, c in joint.coefficients().items()} == pytest.approx(GPT4, abs=1e-4)
    assert list(joint.document()["exponent_of_n_at_k"]) == ["8", "16", "32", "64"]
    assert {fit.at["k"] for fit in at_k} == set(KS)
    (note,) = [text for text in laws.warnings if "active latents" in text or "target" in text]
    assert "miss the k that was their target, by more than 10%" in note
    points = {view.name: [p for p in view.layers if isinstance(p, Points)] for view in views_of(laws.largest)}
    assert max(np.abs(layer.y).max() for layer in points["residuals"]) < 0.1  # per cent
    assert {layer.level for layer in points["holdout"]} == set(KS)
    exact = fit_laws(
        Table.from_rows([row | {"l0_error": None} for row in rows]), settings=FitSettings(0, laws=("n_k",))
    )
    assert joint.rms_log_residual < 1e-4 < exact.fits[0].rms_log_residual
