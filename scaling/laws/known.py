"""The laws that saescale knows, and the way to add one's own.

L(n, k), L(n), L(C) and L(n, D) of the papers; L_s(n) over subjects; the compute-optimal n(C) and D(C); broken power
laws for checking curvature. `register` adds a law in ten lines.
"""

import difflib
import runpy
from collections.abc import Mapping
from pathlib import Path

from saescale.scaling.laws.law import Exponent, Law, Term
from saescale.storage.errors import SaescaleError, one_line

# L(n, k) of Gao et al. 2024 (2406.04093), jointly fitted over latents and sparsity.
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

# L(n) and L(C) of the same paper: powers, with and without an irreducible constant.
N = Law("n", "nmse = A n^-a", ("n_latents",), (Term("A", (Exponent("a", ("n_latents",), sign=-1.0),)),))
N_FLOOR = Law("n", "nmse = A n^-a + E", ("n_latents",), (*N.terms, Term("E")))
C = Law("c", "nmse = A C^-a", ("flops",), (Term("A", (Exponent("a", ("flops",), sign=-1.0),)),), over="frontier")
C_FLOOR = Law("c", "nmse = A C^-a + E", ("flops",), (*C.terms, Term("E")), over="frontier")
# L(N, D) of Hoffmann et al. 2022 (2203.15556), with latents in place of parameters.
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

# L_s(n) at each k: how the law in n moves with the subject's width s, over sweeps of several subjects.
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
# Curvature: one slope turning into another. Sharpness 4 turns within a factor of about 2 where slopes differ by 0.5.
_TWO_POWERS = (*N.terms, Term("B", (Exponent("b", ("n_latents",), sign=-1.0),)))
N_FLATTENS = Law("n_flattens", "nmse = ((A n^-a)^4 + (B n^-b)^4)^(1/4)", ("n_latents",), _TWO_POWERS, join=4.0)
N_STEEPENS = Law("n_steepens", "nmse = ((A n^-a)^-4 + (B n^-b)^-4)^(-1/4)", ("n_latents",), _TWO_POWERS, join=-4.0)
# What to train for a given compute: the n and the tokens that reach the lowest nmse, from iso-FLOP minima.
N_OF_C = Law(
    "n_of_c", "n = G C^g", ("flops",), (Term("G", (Exponent("g", ("flops",)),)),), target="n_latents", over="optimum"
)
D_OF_C = Law(
    "d_of_c", "D = H C^h", ("flops",), (Term("H", (Exponent("h", ("flops",)),)),), target="tokens", over="optimum"
)

LAWS = (N_K, N, N_FLOOR, C, C_FLOOR, N_D, N_S, N_FLATTENS, N_STEEPENS, N_OF_C, D_OF_C)
_REGISTERED = list(LAWS)


def register(law: Law) -> Law:
    """Adds a law to those that can be asked for by name, and returns it. Several laws of one name are forms of it: all
    are fitted and compared, such as with and without a floor. Registering the same law again changes nothing.

        register(Law(
            name="n_lnk", formula="nmse = A n^-a k^-b + F k^-f", columns=("n_latents", "k"),
            terms=(
                Term("A", (Exponent("a", ("n_latents",), sign=-1.0), Exponent("b", ("k",), sign=-1.0))),
                Term("F", (Exponent("f", ("k",), sign=-1.0),)),
            ),
        ))

    Raises SaescaleError when there is another law of that name with the same coefficients.
    """
    if law in _REGISTERED:
        return law
    for other in _REGISTERED:
        if other.name == law.name and set(other.names) == set(law.names):
            raise SaescaleError(
                f"there is a law {law.name} with coefficients {', '.join(law.names)}; choose another name"
            )
    _REGISTERED.append(law)
    return law


def registered() -> tuple[Law, ...]:
    """All laws that can be asked for, the built-in ones first."""
    return tuple(_REGISTERED)


def forms_of(name: str) -> tuple[Law, ...]:
    """All laws of one name, in the order in which they were registered. Raises SaescaleError for an unknown name."""
    names = law_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SaescaleError(f"unknown law {name}; {hint}there are {', '.join(names)}")
    return tuple(law for law in _REGISTERED if law.name == name)


def law_names() -> tuple[str, ...]:
    """The names that can be asked for, each once."""
    return tuple(dict.fromkeys(law.name for law in _REGISTERED))


def find_law(name: str, coefficients: Mapping[str, object]) -> Law:
    """The law of an entry of fits.json, by its name and coefficient names. Raises SaescaleError."""
    for law in _REGISTERED:
        if law.name == name and set(law.names) == set(coefficients):
            return law
    raise SaescaleError(
        f"no law {name} with coefficients {', '.join(coefficients)}; known: "
        + "; ".join(f"{law.name}: {law.formula}" for law in _REGISTERED)
        + " (a law of your own comes from --law-file)"
    )


def load_laws(path: str) -> tuple[Law, ...]:
    """Runs a Python file that calls `register`, and returns the laws that it registers.

    Raises SaescaleError when the file is missing, fails, or registers nothing.
    """
    if not Path(path).is_file():
        raise SaescaleError(
            f"there is no law file at {path}; it is a Python file that calls saescale.scaling.laws.known.register"
        )
    before = set(_REGISTERED)
    try:
        names = runpy.run_path(path)
    except SaescaleError:
        raise
    except Exception as error:
        raise SaescaleError(f"{path} fails with {type(error).__name__}: {one_line(error)}; correct it") from error
    # Those with a name in the file too: a file that is loaded again adds nothing.
    named = {law for law in names.values() if isinstance(law, Law)} - set(LAWS)
    found = tuple(law for law in _REGISTERED if law in named or law not in before)
    if not found:
        raise SaescaleError(f"{path} registers no law; it should call saescale.scaling.laws.known.register(Law(...))")
    return found
