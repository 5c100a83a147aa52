"""L(n, k) of Gao et al. 2024 (2406.04093), jointly fitted over latents and sparsity."""

from saescale.scaling.laws.law import Exponent, Law, Term

N_K = Law(
    name="n_k",
    formula="nmse = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)",
    columns=("n_latents", "k"),
    terms=(
        Term(
            "alpha",
            (
                Exponent("beta_k", ("k",)),
                Exponent("beta_n", ("n_latents",)),
                Exponent("gamma", ("k", "n_latents"), -1.0, 1.0),
            ),
            logarithmic=True,
        ),
        Term("zeta", (Exponent("eta", ("k",)),), logarithmic=True),
    ),
)
# Its coefficients for GPT-4's SAEs, as published there.
GPT4 = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}

forms = (N_K,)
