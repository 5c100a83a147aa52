"""Curvature in n: a steep slope that turns into a flat one, a broken power law (Caballero et al. 2023, 2210.14891)."""

from saescale.scaling.laws.law import Exponent, Law, Term

TWO_POWERS = (
    Term("A", (Exponent("a", ("n_latents",), sign=-1.0),)),
    Term("B", (Exponent("b", ("n_latents",), sign=-1.0),)),
)
# Sharpness 4 turns within a factor of about 2 where slopes differ by 0.5.
N_FLATTENS = Law("n_flattens", "nmse = ((A n^-a)^4 + (B n^-b)^4)^(1/4)", ("n_latents",), TWO_POWERS, join=4.0)

forms = (N_FLATTENS,)
