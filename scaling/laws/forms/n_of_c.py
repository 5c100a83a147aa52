"""What to train for a given compute: the n that reaches the lowest nmse, from iso-FLOP minima."""

from saescale.scaling.laws.law import Exponent, Law, Term

N_OF_C = Law(
    "n_of_c", "n = G C^g", ("flops",), (Term("G", (Exponent("g", ("flops",)),)),), target="n_latents", over="optimum"
)

forms = (N_OF_C,)
