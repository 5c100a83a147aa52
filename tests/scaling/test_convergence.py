"""Tokens to convergence and iso-FLOP minima of curves whose answers are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.laws.convergence import WITHIN, find_convergence
from saescale.scaling.laws.fit import fit_all, fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096, 8192), (8, 16, 32)


def test_tokens_to_convergence_grow_as_they_were_made(
    cells: Callable[..., Rows], curves_of: Callable[..., Rows]
) -> None:
    rows = cells(SIZES, KS)
    found = find_convergence(Table.from_rows(rows), Table.from_rows(curves_of(rows, evaluations=200)), FitSettings(100))
    assert found.unconverged == 0
    exponent = found.document()["exponent_of_n"]
    assert exponent["low"] <= exponent["value"] <= exponent["high"]
    assert exponent["value"] == pytest.approx(0.5, abs=0.03)
    # exp(-tokens / scale) is WITHIN at scale * ln(1 / WITHIN).
    tokens = {row["n_latents"]: row["tokens"] for row in found.rows if row["k"] == 8}
    assert tokens[2048] == pytest.approx(8_000_000 * 0.02 * 2 * np.log(1 / WITHIN), rel=0.05)


def test_cells_that_still_fall_do_not_count(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> None:
    rows = cells(SIZES, KS)
    found = find_convergence(Table.from_rows(rows), Table.from_rows(curves_of(rows, late_fall=0.3)), FitSettings(10))
    assert (found.rows, found.unconverged) == ((), 15)
    assert found.document()["reason"] == "no cell with a curve converged (15 did not)"


def test_cells_that_converged_before_their_first_evaluation(
    cells: Callable[..., Rows], curves_of: Callable[..., Rows]
) -> None:
    rows = cells(SIZES, KS)
    curves = curves_of(rows)
    for curve in curves:
        if curve["cell_id"].startswith("512x"):
            curve["nmse"] = 0.2
    found = find_convergence(Table.from_rows(rows), Table.from_rows(curves), FitSettings(0))
    assert (len(found.rows), found.unconverged, found.early) == (12, 0, 3)
    assert found.document()["converged_before_first_evaluation"] == 3
    flat = Table.from_rows([curve | {"nmse": 0.2} for curve in curves])
    assert find_convergence(Table.from_rows(rows), flat, FitSettings(0)).reason == (
        "15 cells converged before their first evaluation: evaluate earlier"
    )


def test_what_is_said_of_convergence_never_disagrees() -> None:
    """Of any curves, flat, noisy, rising or still falling: each is converged or is not, in the law of tokens and in the
    warning alike, and by brute force on a fine line through the curve."""
    rng = np.random.default_rng(0)
    rows, curves, expected = [], [], {}
    for i in range(150):
        count = int(rng.integers(3, 12))
        tokens = np.sort(rng.uniform(0.05, 1.0, count)) * 1e6
        nmse = np.exp(rng.uniform(0, 0.3) * (tokens / 1e6) ** -rng.uniform(0, 0.5) + rng.choice([0, 0.02]) *
                      rng.standard_normal(count) - 2)  # fmt: skip
        rows.append({"cell_id": f"cell {i}", "n_latents": 2.0 ** (9 + i % 5), "k": 8.0, "nmse": nmse[-1]})
        curves += [{"cell_id": f"cell {i}", "n_latents": 512, "k": 8, "tokens": t, "flops": t, "nmse": v}
                   for t, v in zip(tokens, nmse, strict=True)]  # fmt: skip
        fine = np.geomspace(0.75 * tokens[-1], tokens[-1], 4_001)
        expected[f"cell {i}"] = bool(
            (np.exp(np.interp(np.log(fine), np.log(tokens), np.log(nmse))) <= 1.02 * nmse[-1]).all()
        )
    laws = fit_laws(Table.from_rows(rows), Table.from_rows(curves), FitSettings(0, laws=("n",)))
    found = laws.document()["tokens_to_convergence"]
    converged = {row["cell_id"] for row in found["cells"]}
    unconverged = 150 - sum(expected.values())
    assert 30 < unconverged < 120
    assert found["unconverged"] == unconverged
    assert len(converged) + found["converged_before_first_evaluation"] == sum(expected.values())
    assert all(expected[cell] for cell in converged)
    said = [warning for warning in laws.warnings if "not converged" in warning]
    assert [warning.split()[0] for warning in said] == [str(unconverged)]
    last = {row["cell_id"]: row["tokens"] for row in curves}
    assert all(row["tokens"] <= 0.75 * last[row["cell_id"]] * (1 + 1e-12) for row in found["cells"])


def chinchilla_curves() -> tuple[Rows, Rows]:
    """Cells of L = n^-0.3 + D^-0.3 with C = 2 n D: the best n is (C / 2)^0.5, the best D as much."""
    cells, curves = [], []
    for n in 2.0 ** np.arange(8, 20):
        cell = {"cell_id": f"{n:g}", "n_latents": n, "k": 8, "tokens": 2.0**16, "flops": 2 * n * 2.0**16}
        cells.append(cell | {"nmse": n**-0.3 + cell["tokens"] ** -0.3})
        curves += [
            {"cell_id": cell["cell_id"], "tokens": d, "flops": 2 * n * d, "nmse": n**-0.3 + d**-0.3}
            for d in 2.0 ** np.arange(8, 16.1, 0.125)
        ]
    return cells, curves


def test_compute_optimal_laws() -> None:
    cells, curves = chinchilla_curves()
    document = fit_all(
        Table.from_rows(cells), Table.from_rows(curves), settings=FitSettings(50, laws=("n_of_c", "d_of_c"))
    )
    by_name = {entry["law"]: entry for entry in document["fits"]}
    g, h = by_name["n_of_c"]["coefficients"]["g"], by_name["d_of_c"]["coefficients"]["h"]
    assert g["value"] == pytest.approx(0.5, abs=0.03)
    assert h["value"] == pytest.approx(0.5, abs=0.03)
    assert g["low"] < g["value"] < g["high"]
    assert by_name["n_of_c"]["target"] == "n_latents"
    assert any("biased" in warning for warning in by_name["n_of_c"]["warnings"])
    (view,) = document["iso_flop"]
    for minimum in view["minima"]:
        assert minimum["n_latents"] == pytest.approx(np.sqrt(minimum["flops"] / 2), rel=0.2)
        assert minimum["tokens"] == pytest.approx(minimum["flops"] / 2 / minimum["n_latents"], rel=0.01)


def test_isoflop_does_without_the_cells_that_lack_compute() -> None:
    cells, curves = chinchilla_curves()
    settings = FitSettings(0, laws=("n_of_c",))
    (whole,) = fit_laws(Table.from_rows(cells), Table.from_rows(curves), settings).largest.isoflops
    cells[3] |= {"tokens": None}
    cells[5] |= {"flops": None}
    (holes,) = fit_laws(Table.from_rows(cells), Table.from_rows(curves), settings).largest.isoflops
    assert holes.slope == pytest.approx(whole.slope, abs=1e-9)


def test_minima_at_the_edge_are_dropped() -> None:
    cells, curves = chinchilla_curves()
    small = [cell for cell in cells if cell["n_latents"] <= 2**10]
    laws = fit_laws(Table.from_rows(small), Table.from_rows(curves), FitSettings(0, laws=("n_of_c",)))
    (view,) = laws.largest.isoflops
    assert (view.n_latents < 2**10).all()
    assert view.dropped
    few = fit_laws(Table.from_rows(small[:2]), Table.from_rows(curves), FitSettings(0, laws=("n_of_c",)))
    assert few.fits == ()
    assert "curves of 2 different n" in few.skipped[0].reason
