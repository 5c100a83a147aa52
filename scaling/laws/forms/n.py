"""L(n) at each k of Gao et al. 2024 (2406.04093): a power of n, with and without an irreducible constant."""

from saescale.scaling.laws.law import Exponent, Law, Term

N = Law("n", "nmse = A n^-a", ("n_latents",), (Term("A", (Exponent("a", ("n_latents",), sign=-1.0),)),))
N_FLOOR = Law("n", "nmse = A n^-a + E", ("n_latents",), (*N.terms, Term("E")))

forms = (N, N_FLOOR)
