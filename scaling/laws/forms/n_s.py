"""L_s(n) at each k: how the law in n moves with the subject's width s, over sweeps of several subjects."""

from saescale.scaling.laws.law import Exponent, Law, Term

N_S = Law(
    name="n_s",
    formula="nmse = exp(alpha + beta_s ln s + beta_n ln n + gamma ln s ln n) + E",
    columns=("n_latents", "d_model"),
    terms=(
        Term(
            "alpha",
            (
                Exponent("beta_s", ("d_model",)),
                Exponent("beta_n", ("n_latents",)),
                Exponent("gamma", ("d_model", "n_latents"), -1.0, 1.0),
            ),
            logarithmic=True,
        ),
        Term("E"),
    ),
)

forms = (N_S,)
