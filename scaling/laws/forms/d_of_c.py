"""What to train for a given compute: the tokens D that reach the lowest nmse, from iso-FLOP minima."""

from saescale.scaling.laws.law import Exponent, Law, Term

D_OF_C = Law(
    "d_of_c", "D = H C^h", ("flops",), (Term("H", (Exponent("h", ("flops",)),)),), target="tokens", over="optimum"
)

forms = (D_OF_C,)
