"""Laws of metrics, on simulated cells whose law is known."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.scaling.fit_sources import fit
from saescale.scaling.laws import over_cells
from saescale.scaling.laws.fit import LawsOfKinds, fit_laws
from saescale.scaling.laws.over_metrics import MetricLaws, distinct_metrics, fit_metrics
from saescale.scaling.laws.predict import metric_predictions, predict
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import Metric, declared, document
from saescale.scaling.sources import load_evals, load_sources
from saescale.scaling.tables import Table
from saescale.storage.columns import EVALS
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

NOTHING = EVALS.empty_table()
SIZES, KS = (512, 1024, 2048, 4096, 8192, 16384), (8, 16, 32, 64)
KINDS = {
    "falling": Metric("lower"),
    "to_one": Metric("higher", limit=1.0),
    "to_other": Metric("lower", limit="original"),
    "share": Metric("higher", bounded=True),
    "rising": Metric("higher"),
}


def distance(n: float, k: float) -> float:
    """The truth: a law of the form n_k, written out here."""
    return float(np.exp(3.0 - 0.55 * np.log(n) - 0.1 * np.log(k) - 0.01 * np.log(k) * np.log(n)) + 0.4 * k**-0.7)


def value(kind: str, d: float) -> float:
    """The metric of that distance, from what each kind means."""
    return {"falling": d, "to_one": 1 - d, "to_other": 3.2 + d, "share": 1 / (1 + d), "rising": 1 / d}[kind]


def write_run(folder: Path, noise: float = 0.01, seed: int = 0, declare: bool = True) -> RunDirectory:
    rng = np.random.default_rng(seed)
    run = RunDirectory(str(folder))
    rows, evals = [], []
    for n in SIZES:
        for k in KS:
            cell = {"cell_id": f"{n}x{k}", "n_latents": n, "k": k, "architecture": "topk", "seed": 0}
            nmse = 2.0 * n**-0.3 * k**-0.2 * np.exp(0.005 * rng.standard_normal())
            rows.append({**cell, "nmse": nmse, "flops": float(n * 1e6), "tokens": 1000, "status": "done"})
            d = distance(n, k) * np.exp(noise * rng.standard_normal())
            for name in (*KINDS, "original"):
                measured = 3.2 if name == "original" else value(name, d)
                evals.append({"cell_id": f"{n}x{k}", "evaluation": "sim", "metric": name, "value": measured, "at": ""})
    run.write_results(rows)
    for row in rows:
        own = [e for e in evals if e["cell_id"] == row["cell_id"]]
        run.write_evals(row["cell_id"], "sim", own, document("sim", KINDS) if declare else {})
    return run


def laws_of(run: RunDirectory, names: list[str], bootstraps: int = 60) -> tuple[MetricLaws, ...]:
    results, _ = load_sources([run.url])
    fitted = fit_laws(results, None, FitSettings(0, laws=("n_k",)))
    return fit_metrics(fitted, run.read_evals(), names, FitSettings(bootstraps, laws=("n_k",)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("run"))


def test_each_kind_of_metric_has_its_law(run: RunDirectory) -> None:
    names = [f"sim.{name}" for name in KINDS]
    found = laws_of(run, names)
    for name, laws in zip(KINDS, found, strict=True):
        (fitted,) = laws.fits
        assert fitted.rms_log_residual < 0.02
        # They are all one law, on five scales.
        np.testing.assert_allclose(fitted.raw, found[0].fits[0].raw, rtol=1e-6)
        for n, k in ((32768, 16), (4096, 64)):
            (row,) = metric_predictions([laws], {"n_latents": n, "k": k})
            truth = value(name, distance(n, k))
            assert row["predicts"] == f"sim.{name}"
            assert row["low"] < row["law_low"] < row["value"] < row["law_high"] < row["high"]
            assert row["low"] < truth < row["high"]
        entry = laws.document()["fits"][0]
        there = predict(entry, n_latents=4096, k=64)
        np.testing.assert_allclose(there, value(name, distance(4096, 64)), rtol=0.05)
        held = entry["holdout"]["predictions"][0]
        assert held["low"] < held["predicted"] < held["high"]
        measured = value(name, distance(held["n_latents"], held["k"]))
        np.testing.assert_allclose(held["measured"], measured, rtol=0.1)


def test_an_analysis_fits_what_is_not_another_metric_again(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for row in run.read_results().to_pylist():
        own = [{"metric": "same", "value": 1 - 3 * row["nmse"]}, {"metric": "other", "value": row["nmse"] * row["k"]}]
        metrics = {"same": Metric("higher", limit=1.0), "other": Metric("lower")}
        run.write_evals(row["cell_id"], "core", own, document("core", metrics))
    results, _ = load_sources([run.url])
    fitted = fit_laws(results, None, FitSettings(0, laws=("n_k",)))
    # The five of the simulation are one on five scales.
    assert distinct_metrics(fitted, run.read_evals()) == ["core.other", "sim.falling"]


def test_what_is_nmse_but_for_the_rounding_of_training_is_nmse(tmp_path: Path) -> None:
    run, rng = write_run(tmp_path), np.random.default_rng(1)
    metrics = document("core", {"nmse": Metric("lower"), "other": Metric("lower")})
    for row in run.read_results().to_pylist():
        off = 0.001 * rng.uniform(-1, 1)  # of nmse that spans a factor of 4
        own = [{"metric": "nmse", "value": row["nmse"] * (1 + off)}, {"metric": "other", "value": row["nmse"] ** 1.01}]
        run.write_evals(row["cell_id"], "core", own, metrics)
    results, _ = load_sources([run.url])
    fitted = fit_laws(results, None, FitSettings(0, laws=("n_k",)))
    assert distinct_metrics(fitted, run.read_evals()) == ["core.other", "sim.falling"]


def test_a_metric_of_a_part_has_its_law_too(tmp_path: Path) -> None:
    """With the direction, the limit and what stands beside it that were declared of its metric."""
    run = write_run(tmp_path)
    said = {"loss": Metric("lower", limit="original", beside=("loss_random",))}
    for row in run.read_results().to_pylist():
        d = distance(row["n_latents"], row["k"])
        values = {("loss", "k' = 0.5"): 2 + d, ("loss_random", "k' = 0.5"): 5.0, ("original", "k' = 0.5"): 2.0,
                  ("loss", "first"): 9 + d, ("original", "first"): 9.0, ("found", "strict"): 1 / d}  # fmt: skip
        own = [{"metric": name, "at": at, "value": v} for (name, at), v in values.items()]
        run.write_evals(row["cell_id"], "parts", own, document("parts", said))
    half, first, found = laws_of(run, ["parts.loss@k' = 0.5", "parts.loss@first", "parts.found@strict"], 0)
    assert half.scale.words == "parts.loss@k' = 0.5 - parts.original@k' = 0.5"
    for laws in (half, first, found):
        for size, k in ((32768, 16), (4096, 64)):
            (row,) = metric_predictions([laws], {"n_latents": size, "k": k})
            assert float(laws.scale.distance(np.array(row["value"]))) == pytest.approx(distance(size, k), rel=0.02)
    assert {name: values.tolist() for name, values in half.beside.items()} == {"loss_random": [5.0] * len(half.cells)}
    assert not first.beside
    assert "higher is taken for better" in found.warnings[0]
    for name, message in {
        "parts.found": r"of whole cells: it was measured of parts of them, parts.found@strict; name one",
        "parts.loss@frist": r"did you mean parts.loss@first\? \(there are parts.loss@k' = 0.5, parts.loss@first\)",
        "parts.los@first": r"has no metric parts.los@first",
    }.items():
        with pytest.raises(SaescaleError, match=message):
            laws_of(run, [name], 0)


def test_what_was_not_declared_is_read_off_the_cells(tmp_path: Path) -> None:
    run = write_run(tmp_path, declare=False)
    falling, rising = laws_of(run, ["sim.falling", "sim.rising"], 0)
    assert (falling.metric.better, rising.metric.better) == ("lower", "higher")
    assert (falling.scale.words, rising.scale.words) == ("sim.falling", "1 / sim.rising")
    assert "was not declared: higher is taken for better" in rising.warnings[0]


def test_the_law_of_a_metric_that_is_nmse_is_that_of_nmse(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    metrics = document("core", {"nmse": Metric("lower"), "explained": Metric("higher", limit=1.0)})
    for row in run.read_results().to_pylist():
        values = {"nmse": row["nmse"], "explained": 1 - row["nmse"]}
        own = [{"metric": name, "value": v} for name, v in values.items()]
        run.write_evals(row["cell_id"], "core", own, metrics)
    found = fit(run.url, laws=("n_k",), bootstraps=0, metric=("core.nmse", "core.explained"))
    (nmse,) = found["fits"]
    for entry in found["metrics"]:
        for name, of in entry["fits"][0]["coefficients"].items():
            assert of["value"] == pytest.approx(nmse["coefficients"][name]["value"], rel=1e-3, abs=1e-3)
    # nmse's own document is as it is without.
    assert {key: found[key] for key in found if key not in ("metrics", "peaks")} == fit(
        run.url, laws=("n_k",), bootstraps=0
    )


def fitted_with(values: Any) -> LawsOfKinds:
    """Cells of a table of one's own, whose column `mine` is a metric."""
    sizes, ks = (c.ravel() for c in np.meshgrid(SIZES, KS, indexing="ij"))
    rows = [
        {"n_latents": n, "k": k, "nmse": 2.0 * n**-0.3 * k**-0.2, "mine": v}
        for n, k, v in zip(sizes.tolist(), ks.tolist(), values, strict=True)
    ]
    return fit_laws(Table.from_rows(rows), None, FitSettings(0, laws=("n_k",)))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.exp(0.3 * np.random.default_rng(1).standard_normal(24)), "no law fits: cells scatter about it by"),
        (np.full(24, 0.25), "is 0.25 at all 24 points: there is nothing that a law could follow"),
        (np.zeros(24), "0 of 24 cells have a mine that a power law could follow"),
        ([np.nan] * 22 + [0.3, 0.2], "2 of 24 cells have a mine that a power law could follow"),
    ],
    ids=["noise", "constant", "nothing", "two cells"],
)
def test_a_metric_that_no_law_fits_is_one_line(values: Any, reason: str) -> None:
    fitted = fitted_with(values)
    (laws,) = fit_metrics(fitted, NOTHING, ["mine"], FitSettings(0, laws=("n_k",)))
    assert laws.fits == ()
    (skipped,) = laws.skipped
    assert reason in skipped.reason
    assert "\n" not in skipped.reason


def test_laws_of_compute_are_of_the_ends_of_cells(run: RunDirectory) -> None:
    results, curves = load_sources([run.url])
    few = FitSettings(0, laws=("c", "n_of_c"))
    (laws,) = fit_metrics(fit_laws(results, curves, few), run.read_evals(), ["sim.falling"], few)
    assert {(fit.law.name, fit.at["k"], len(fit.nmse)) for fit in laws.fits} == {("c", k, len(SIZES)) for k in KS}
    assert laws.fits[0].law.formula == "sim.falling = A C^-a"
    assert [(entry.law, entry.reason.split(",")[0]) for entry in laws.skipped] == [("n_of_c", "it takes curves")]


def test_cells_at_the_limit_are_left_out_and_named() -> None:
    sizes, ks = (c.ravel() for c in np.meshgrid(SIZES, KS, indexing="ij"))
    values = np.array([distance(n, k) for n, k in zip(sizes, ks, strict=True)])
    values[[0, 5]] = 0.0, -0.1
    values[7] = np.nan
    fitted = fitted_with(values)
    (laws,) = fit_metrics(fitted, NOTHING, ["mine"], FitSettings(0, laws=("n_k",)))
    assert len(laws.cells) == 21
    assert len(laws.fits) == 1
    said = "; ".join(laws.warnings)
    assert "1 of 24 cells have no mine" in said
    assert "2 cells have a mine at or beyond its limit and are left out" in said
    assert "N = 512, k = 8: 0; N = 1024, k = 16: -0.1" in said


@pytest.mark.parametrize(
    ("name", "hint"),
    [("falling", "did you mean sim.falling?"), ("sim.faling", "did you mean sim.falling?"), ("zzz", "there are sim.")],
)
def test_an_unknown_metric_is_one_line_with_the_nearest(run: RunDirectory, name: str, hint: str) -> None:
    with pytest.raises(SaescaleError, match=f"has no metric {name}.*{hint[:12]}") as raised:
        fit(run.url, metric=name, bootstraps=0)
    assert hint in str(raised.value)
    with pytest.raises(SaescaleError, match="nothing was measured on its cells; run saescale eval"):
        fit(str(Path(__file__).parents[1] / "data" / "run-0.1.0"), metric=name, bootstraps=0)


def test_metrics_of_several_runs_are_put_together(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    evals = load_evals([first.url, second.url, first.url])
    assert evals.num_rows == first.read_evals().num_rows + second.read_evals().num_rows
    assert list(declared(evals)) == [f"sim.{name}" for name in KINDS]
    again = [cell for cell in evals["cell_id"].unique().to_pylist() if " of " in cell]
    assert len(again) == len(SIZES) * len(KS)


@pytest.mark.slow
def test_intervals_hold_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 simulated sweeps; 95 % intervals hold in 32 or fewer by chance less than once in a thousand times."""
    # What is looked at besides takes most of the time, and moves no interval.
    monkeypatch.setattr(over_cells, "_checked", lambda fit, **_: fit)
    names, holds = ("falling", "share"), Counter[str]()
    for seed in range(40):
        run = write_run(tmp_path / str(seed), 0.02, seed)
        found = laws_of(run, [f"sim.{name}" for name in names], 100)
        for name, row in zip(names, metric_predictions(found, {"n_latents": 32768, "k": 16}), strict=True):
            holds[name] += row["law_low"] <= value(name, distance(32768, 16)) <= row["law_high"]
    assert min(holds[name] for name in names) > 32
