"""L(N, D) of Hoffmann et al. 2022 (2203.15556), with latents in place of parameters."""

from saescale.scaling.laws.law import Exponent, Law, Term

N_D = Law(
    name="n_d",
    formula="nmse = A n^-a + B D^-b + E",
    columns=("n_latents", "tokens"),
    terms=(
        Term("A", (Exponent("a", ("n_latents",), sign=-1.0),)),
        Term("B", (Exponent("b", ("tokens",), sign=-1.0),)),
        Term("E"),
    ),
)

forms = (N_D,)
