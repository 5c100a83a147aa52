"""L(C) at each k of Gao et al. 2024 (2406.04093), of the compute frontier: with and without an irreducible constant."""

from saescale.scaling.laws.law import Exponent, Law, Term

C = Law("c", "nmse = A C^-a", ("flops",), (Term("A", (Exponent("a", ("flops",), sign=-1.0),)),), over="frontier")
C_FLOOR = Law("c", "nmse = A C^-a + E", ("flops",), (*C.terms, Term("E")), over="frontier")

forms = (C, C_FLOOR)
