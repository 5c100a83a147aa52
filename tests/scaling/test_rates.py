"""Best rates of simulated sweeps whose best rate is known."""

from typing import Any

import numpy as np
import pytest

from saescale.scaling.laws.fit import fit_all
from saescale.scaling.laws.rates import Rates, find_rates
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

SIZES, KS = (256, 512, 1024, 2048, 4096), (8, 32)
RATES = tuple(1e-4 * 2.0 ** np.arange(9))
G, H = -0.4, 0.15
Rows = list[dict[str, Any]]


def best_rate(n: float, k: float) -> float:
    return float(2e-3 * (n / 1024) ** G * (k / 16) ** H)


def swept(rng: np.random.Generator, noise: float = 0.003, seeds: int = 1, skew: float = 0.0, **only: Any) -> Rows:
    """nmse about a well in ln lr, which `skew` makes steeper above than below."""
    rows = []
    for n in only.get("sizes", SIZES):
        for k in only.get("ks", KS):
            for lr in only.get("rates", RATES):
                x = np.log(lr / best_rate(n, k))
                for seed in range(seeds):
                    well = 0.03 * x**2 + skew * 0.01 * x**3
                    nmse = 0.4 * (n / 256) ** -0.1 * np.exp(well + noise * rng.standard_normal())
                    rows.append({"n_latents": n, "k": k, "lr": lr, "seed": seed, "nmse": nmse})
    return rows


def rates_of(rows: Rows) -> Rates:
    table = Table.from_rows(rows)
    found = find_rates(table, table["nmse"] > 1)
    assert found is not None
    return found


def test_the_law_of_the_best_rate_comes_back() -> None:
    found = rates_of(swept(np.random.default_rng(0), noise=0.0))
    for minimum in found.minima:
        assert minimum.k is not None
        assert np.exp(minimum.value) == pytest.approx(best_rate(minimum.n_latents, minimum.k), rel=1e-9)
    assert [law.k for law in found.laws] == [8, 32, None]
    assert [law.value[1] for law in found.laws] == pytest.approx([G] * 3)
    assert found.laws[-1].value[2] == pytest.approx(H)
    assert "lr* ~ N^-0.40" in found.laws[0].words
    # The well is known: the rate of N = 256 at N = 4096 lies G ln 16 off the best, up to how nmse bends between rates.
    for transfer in found.transfer:
        assert transfer["nmse_higher_by"] == pytest.approx(np.expm1(0.03 * (G * np.log(16)) ** 2), abs=0.006)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("seeds", "skew", "least", "most"),
    [(1, 0.0, 0.91, 0.995), (3, 0.0, 0.91, 0.995), (1, 0.5, 0.91, 1.0)],
)
def test_intervals_hold_the_truth(seeds: int, skew: float, least: float, most: float) -> None:
    """Of 200 sweeps each: the exponents, and the best rate at each N and k, in about 95 %."""
    rng = np.random.default_rng(1)
    exponents, minima = [], []
    for _ in range(200):
        found = rates_of(swept(rng, seeds=seeds, skew=skew, sizes=SIZES[:4], ks=(8,)))
        (law,) = found.laws
        exponents.append(law.low[1] <= G <= law.high[1])
        minima += [m.low <= np.log(best_rate(m.n_latents, 8)) <= m.high for m in found.minima if m.found]
    assert least <= np.mean(exponents) <= most
    assert least <= np.mean(minima) <= most


def test_minima_at_the_edge_are_bounds_and_enter_no_law() -> None:
    rng = np.random.default_rng(2)
    low = rates_of(swept(rng, noise=1e-4, rates=RATES[:5], sizes=(256, 512, 1024, 2048, 4096, 8192, 16384)))
    bounds = {(m.n_latents, m.k): m.bound for m in low.minima if not m.found}
    assert set(bounds.values()) == {"above"}
    assert (256, 8) in bounds
    assert any("no best rate at N = 256, k = 8" in text and "largest that was tried" in text for text in low.warnings)
    for law in low.laws:
        assert law.low[1] <= G <= law.high[1]
        assert law.value[1] == pytest.approx(G, abs=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"nmse": 50.0} if row["lr"] > 3e-3 else row, "rates that diverged are left out"),
        (lambda row: row | {"nmse": 0.5 - 0.01 * np.log(row["lr"] / 1e-3) ** 2}, "that was tried"),
        (lambda row: row if row["n_latents"] < 1000 else row | {"lr": 1e-3}, "it takes minima at 3 N"),
    ],
)
def test_what_is_wrong_with_rates_is_said(change: Any, said: str) -> None:
    found = rates_of([change(row) for row in swept(np.random.default_rng(3))])
    assert any(said in text for text in found.warnings)
    assert all(np.isfinite(m.value) == m.found for m in found.minima)


def test_three_rates_and_one_seed_have_no_interval() -> None:
    rows = swept(np.random.default_rng(4), noise=0.001, ks=(8,))
    found = rates_of([row for row in rows if abs(np.log2(row["lr"] / best_rate(row["n_latents"], 8))) < 1.5])
    assert all(len(m.log_lr) == 3 for m in found.minima)
    assert not np.isfinite([m.low for m in found.minima if m.found]).any()
    assert any("have no intervals" in text for text in found.warnings)
    (law,) = found.laws  # how the minima scatter about it is known all the same
    assert law.low[1] < G < law.high[1]


def test_rates_in_the_document() -> None:
    rows = swept(np.random.default_rng(5)) + [
        row | {"architecture": "gated"} for row in swept(np.random.default_rng(6), ks=(8,))
    ]
    rows = [{"architecture": "topk"} | row for row in rows]
    topk, gated = fit_all(Table.from_rows(rows), settings=FitSettings(0, laws=("n",)))["rates"]
    assert (gated["of"], topk["of"]) == ({"architecture": "gated"}, {"architecture": "topk"})
    assert [law["law"] for law in topk["laws"]] == ["lr_n", "lr_n", "lr_n_k"]
    assert topk["laws"][-1]["coefficients"]["g"]["low"] < G < topk["laws"][-1]["coefficients"]["g"]["high"]
    assert len(gated["minima"]) == 5
    assert fit_all(Table.from_rows(rows[:1]), settings=FitSettings(0, laws=("n",)))["rates"] == []
    ruled = [row | {"lr": 1e-3 * row["n_latents"] ** -0.5} for row in rows[:45:9]]
    assert fit_all(Table.from_rows(ruled), settings=FitSettings(0, laws=("n",)))["rates"] == []
