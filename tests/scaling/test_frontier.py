"""The compute frontier of curves whose envelope is known."""

from typing import Any

import numpy as np
import pytest

import saescale.scaling.laws.estimate
import saescale.scaling.laws.frontier
from saescale.scaling.laws.forms.c import C
from saescale.scaling.laws.frontier import Curve, find_frontier, fit_frontier, frontier_of_ends, read_curves
from saescale.scaling.laws.huber import Problem
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError


def tangent_curves(sizes: int = 7) -> tuple[Curve, ...]:
    """Curves that touch L = C^-0.1 from above, each at a point that grows with its size."""
    curves = []
    for i in range(sizes):
        flops = 10.0**12 * 4.0**i * np.geomspace(0.02, 8, 300)
        distance = np.log(flops) - np.log(1e12 * 4.0**i)
        curves.append(Curve(f"cell{i}", 512.0 * 2**i, flops, -0.1 * np.log(flops) + 0.05 * distance**2))
    return tuple(curves)


def test_envelope_of_tangent_curves() -> None:
    frontier = find_frontier({"k": 8.0}, tangent_curves())
    fit = fit_frontier(C, frontier, FitSettings(200, seed=0))
    middle = frontier.flops < 1e12 * 4.0**6
    np.testing.assert_allclose(np.log(frontier.nmse[middle]), -0.1 * np.log(frontier.flops[middle]), atol=0.03)
    assert fit.at == {"k": 8}
    assert C.to_reported(fit.raw)[1] == pytest.approx(0.1, abs=0.01)
    low, high = np.percentile(C.to_reported(fit.draws)[:, 1], [2.5, 97.5])
    assert low < high


def test_points_that_bend_the_law_are_dropped() -> None:
    curves = tangent_curves()
    frontier = find_frontier({"k": 8.0}, curves)
    assert all(frontier.curves[i].cell_id != "cell0" for i in frontier.winner[frontier.kept])
    assert (np.diff(frontier.nmse) < 0).all()
    for curve, row in zip(curves, frontier.envelope, strict=True):
        assert np.isinf(row[frontier.grid < 0.05 * curve.flops[-1]]).all()


def test_many_resamples_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand cells would else take gigabytes: the same numbers come out of temporaries of a bounded size."""
    frontier = find_frontier({"k": 8.0}, tangent_curves())
    whole = fit_frontier(C, frontier, FitSettings(40, seed=0))
    largest = []
    keep, minimise = saescale.scaling.laws.frontier._keep, saescale.scaling.laws.estimate.minimise

    def watched_keep(envelope: np.ndarray, edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        largest.append(envelope.size)
        return keep(envelope, edge)

    def watched_minimise(problem: Problem, raw: np.ndarray, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
        largest.append(len(raw) * len(problem.design) if len(raw) != 64 else 0)
        return minimise(problem, raw, *rest)

    monkeypatch.setattr(saescale.scaling.laws.estimate, "_AT_ONCE", 2000)
    monkeypatch.setattr(saescale.scaling.laws.frontier, "_keep", watched_keep)
    monkeypatch.setattr(saescale.scaling.laws.estimate, "minimise", watched_minimise)
    parts = fit_frontier(C, frontier, FitSettings(40, seed=0))
    assert 1000 < max(largest) <= 2000
    np.testing.assert_allclose(parts.draws, whole.draws, rtol=1e-6)
    flops = np.geomspace(1e12, 1e15, 30)
    predicted = parts.predict({"flops": flops})
    monkeypatch.undo()
    np.testing.assert_allclose(predicted, parts.predict({"flops": flops}))


def test_too_few_sizes() -> None:
    with pytest.raises(SaescaleError, match="curves of 2 different n"):
        find_frontier({"k": 8.0}, tangent_curves(2))


def test_curves_of_the_cells_alone() -> None:
    cells = Table.from_rows([{"cell_id": "a", "n_latents": 512, "k": 8}])
    rows = [{"cell_id": c, "flops": f, "nmse": 1 / f} for c in "ab" for f in (1e8, 5e8, 1e9)]
    curves = Table.from_rows(
        [*rows, {"cell_id": "a", "flops": 7e8, "nmse": None}, {"cell_id": "a", "flops": 0, "nmse": 1}]
    )
    (curve,) = read_curves(cells, curves)
    assert (curve.cell_id, curve.n_latents) == ("a", 512)
    np.testing.assert_allclose(curve.flops, [1e8, 5e8, 1e9])


def test_frontier_of_ends_keeps_what_no_cheaper_cell_equals() -> None:
    flops = 10.0 ** np.array([9, 10, 11, 12, 13, 14])
    nmse = 5 * flops**-0.1
    worse = {"flops": 3e11, "nmse": 0.9}
    cells = Table.from_rows([*({"flops": c, "nmse": v} for c, v in zip(flops, nmse, strict=True)), worse])
    frontier = frontier_of_ends({}, cells)
    np.testing.assert_allclose(frontier.flops, flops)
    np.testing.assert_allclose(frontier.nmse, nmse)
    fit = fit_frontier(C, frontier, FitSettings(100, seed=0))
    np.testing.assert_allclose(C.to_reported(fit.raw), [5, 0.1], rtol=1e-6)
    assert np.isfinite(fit.draws).all()
    assert fit.excluded == ("1 of 7 points of compute: no better than with less compute",)


def test_what_a_penalty_has_not_taken_yet_is_no_point_of_its_k() -> None:
    """Both have the same nmse; one has k for a target, which its fourth evaluation is the first to meet."""
    l0 = [200.0, 100.0, 40.0, 8.7, 7.5, 8.1]
    curves = Table.from_rows(
        {"cell_id": name, "flops": 1e9 * (step + 1), "nmse": 0.2 + 0.01 * step, "l0": value}
        for name in ("gated", "topk")
        for step, value in enumerate(l0)
    )
    cells = Table.from_rows(
        {"cell_id": name, "n_latents": 512, "k": 8, "nmse": 0.25, "l0_error": off}
        for name, off in (("gated", 0.01), ("topk", None))
    )
    found = {curve.cell_id: curve for curve in read_curves(cells, curves)}
    assert found["gated"].flops.tolist() == [4e9, 5e9, 6e9]
    assert len(found["topk"].flops) == 6
