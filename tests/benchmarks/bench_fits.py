"""How long fits take: 4,000 bootstrap fits of L(N, k) on the 42 cells of the paper's grid, on one thread.

python tests/benchmarks/bench_fits.py
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from saescale.scaling.laws.estimate import fit_law
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.settings import FitSettings


def main() -> None:
    n, k = (v.ravel() for v in np.meshgrid(2.0 ** np.arange(11, 22, 2), 2.0 ** np.arange(3, 10), indexing="ij"))
    columns = {"n_latents": n, "k": k}
    nmse = N_K.value(GPT4, columns) * np.exp(0.005 * np.random.default_rng(0).standard_normal(len(n)))
    for bootstraps in (0, 1000, 4000):
        began = time.perf_counter()
        fit = fit_law(N_K, columns, nmse, FitSettings(bootstraps))
        taken = time.perf_counter() - began
        print(f"{bootstraps:5d} bootstrap fits and {fit.starts} starts ({fit.agreeing} agree): {taken:.2f} s")
    assert fit.conditioning
    print(
        f"condition number of J^T J: {fit.conditioning.coefficients:.3g} with the formula's coefficients, "
        f"{fit.conditioning.projected:.3g} of what is searched"
    )


if __name__ == "__main__":
    main()
