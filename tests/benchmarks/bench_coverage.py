"""How often a 95 % interval holds the truth: simulated sweeps of known laws, fitted as `saescale fit` fits them.

    python tests/benchmarks/bench_coverage.py [--sweeps 300] [--bootstraps 400] [--only gpt4-42] [--cells]

Columns: the exponent of n (at the smallest and largest k), the law at 4 times the largest n, and one new cell there.
The standard error of a share of 95 % over 300 sweeps is 1.3 %. Of a metric in [0, 1] ("share") a law is of the odds
of failure (scaling/laws/scales.py): cells scatter in these, and each is measured on samples of its own. `--cells` draws
cells with replacement in place of their residuals, which is what was measured against.
"""

import argparse
import os
import time
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from saescale.scaling.laws.estimate import Fitted, Resamples, draw_counts, fit_law
from saescale.scaling.laws.forms.n import N_FLOOR, N
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.law import Law
from saescale.scaling.laws.scales import scale_of
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import Metric

GRIDS = {
    "42": (2.0 ** np.arange(11, 22, 2), 2.0 ** np.arange(3, 10)),
    "24": (2.0 ** np.arange(9, 15), 2.0 ** np.arange(3, 7)),
    "16": (2.0 ** np.arange(9, 13), 2.0 ** np.arange(3, 7)),
    "8": (2.0 ** np.arange(9, 17), np.ones(1)),
    "6": (2.0 ** np.arange(9, 15), np.ones(1)),
}


class Case(NamedTuple):
    law: Law
    truth: dict[str, float]
    grid: str
    noise: float
    kind: str = "normal"
    samples: int = 0  # behind a share of which the law is; 0: the law is of nmse


CASES = {
    "gpt4-42": Case(N_K, GPT4, "42", 0.005),
    "gpt4-24": Case(N_K, GPT4, "24", 0.005),
    "gpt4-16": Case(N_K, GPT4, "16", 0.005),
    "gpt4-42, 2 % noise": Case(N_K, GPT4, "42", 0.02),
    "gpt4-42, Student t3": Case(N_K, GPT4, "42", 0.005, "t3"),
    "gpt4-42, noise grows with n": Case(N_K, GPT4, "42", 0.005, "growing"),
    "n with floor, 8 sizes": Case(N_FLOOR, {"A": 3.0, "a": 0.4, "E": 0.1}, "8", 0.005),
    "n, 6 sizes": Case(N, {"A": 3.0, "a": 0.2}, "6", 0.01),
    "share 0.57 to 0.68, 24 cells": Case(N_K, GPT4, "24", 0.01, samples=20_000),
    "share 0.57 to 0.68, few samples": Case(N_K, GPT4, "24", 0.01, samples=500),
    "share 0.58 to 0.96, 8 sizes": Case(N, {"A": 30.0, "a": 0.6}, "8", 0.05, samples=5_000),
    "share 0.97 to 0.998, few samples": Case(N, {"A": 1.3, "a": 0.6}, "8", 0.05, samples=5_000),
}
SHARE = scale_of("share", Metric("higher", bounded=True))


def simulate(case: Case, sweeps: int, bootstraps: int, cells: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of sweeps whose intervals hold the truth, and median widths, by quantity."""
    n, k = (v.ravel() for v in np.meshgrid(*GRIDS[case.grid], indexing="ij"))
    columns = whole = {"n_latents": n, "k": k}
    raw = case.law.to_raw(case.truth)
    log_law = case.law.log_value(raw, columns)
    ks = sorted({k.min(), k.max()}) if "k" in case.law.columns else [1.0]
    beyond = {"n_latents": np.full(len(ks), 4 * n.max()), "k": np.array(ks)}
    true_there = np.exp(case.law.log_value(raw, beyond))
    rng = np.random.default_rng(1)
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for seed in range(sweeps):
        nmse = _measured(case, log_law, n, rng)
        kept = np.isfinite(nmse) & (nmse > 0)  # a share of 0 or 1 is left out, as `fit --metric` does
        nmse, columns = nmse[kept], {name: values[kept] for name, values in whole.items()}
        # Cells drawn with replacement keep no intervals wider than percentiles, as a classical bootstrap would.
        resampler = draw_cells(np.log(nmse), columns) if cells else None
        fit = fit_law(
            case.law, columns, nmse, settings=FitSettings(bootstraps, seed=seed), agree=False, resampler=resampler
        )
        there = fit.predict(beyond)
        new = _measured(case, np.log(true_there), np.full(len(ks), n.max()), rng)
        for i, value in enumerate(ks):
            at = f" at k = {value:g}" if len(ks) > 1 else ""
            exponent = fit.exponent("n_latents", {"k": value})
            ends = {
                f"exponent{at}": (
                    exponent["low"],
                    exponent["high"],
                    case.law.exponent_of(raw, "n_latents", {"k": value}),
                ),
                f"law at 4 n{at}": (there.low[i], there.high[i], true_there[i]),
                f"new cell at 4 n{at}": (there.cell_low[i], there.cell_high[i], new[i]),
            }
            for name, (low, high, true) in ends.items():
                held.setdefault(name, []).append(bool(low <= true <= high))
                widths.setdefault(name, []).append(float(high - low))
    return {n: float(np.mean(v)) for n, v in held.items()}, {n: float(np.median(v)) for n, v in widths.items()}


def draw_cells(log_nmse: np.ndarray, columns: dict[str, np.ndarray]) -> object:
    levels = [np.unique(v, return_inverse=True)[1] for v in columns.values() if len(np.unique(v)) > 1]

    def resample(fitted: Fitted, bootstraps: int, rng: np.random.Generator) -> Resamples:
        def enough(counts: np.ndarray) -> np.ndarray:
            good = (counts > 0).sum(axis=1) >= fitted.coefficients
            for level in levels:
                seen = np.stack([(counts[:, level == v] > 0).any(axis=1) for v in range(level.max() + 1)], axis=1)
                good &= seen.sum(axis=1) >= min(3, fitted.coefficients)
            return good

        counts, redrawn = draw_counts(len(log_nmse), bootstraps, enough, rng)
        return Resamples(log_nmse, counts, redrawn)

    return resample


def _measured(case: Case, log_law: np.ndarray, n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """nmse of cells, or how far a share of `samples` is from 1 on the scale of its law."""
    exact = np.exp(log_law + case.noise * _errors(case.kind, len(n), n, rng))
    if not case.samples:
        return exact
    return SHARE.distance(rng.binomial(case.samples, SHARE.value(exact)) / case.samples)


def _errors(kind: str, count: int, n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of standard deviation 1, but where they grow: from half of that at the smallest n to 1.5 times at the largest."""
    if kind == "t3":
        return rng.standard_t(3, count) / np.sqrt(3)
    scale = np.interp(np.log2(n), [11, 21], [0.5, 1.5]) if kind == "growing" else 1.0
    return scale * rng.standard_normal(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=300)
    parser.add_argument("--bootstraps", type=int, default=400)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--cells", action="store_true")
    given = parser.parse_args()
    for name in given.only or CASES:
        began = time.monotonic()
        held, widths = simulate(CASES[name], given.sweeps, given.bootstraps, given.cells)
        print(f"\n{name} ({given.sweeps} sweeps, {time.monotonic() - began:.0f} s)")
        for quantity, share in held.items():
            print(f"  {quantity:<24} {share:7.1%}   median width {widths[quantity]:.4f}", flush=True)


if __name__ == "__main__":
    main()
