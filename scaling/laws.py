"""Scaling laws as data: sums of power-law terms with named coefficients.

Every law here is L(x) = sum over terms of  amplitude * exp(sum over exponents of  e * product of ln(columns)).
In logarithms of the amplitudes, ln L is a log-sum-exp of affine functions, which gives every law exact
gradients and the same well-conditioned fit (see estimate.py). A new law is a few lines of data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from storage.errors import SaescaleError


@dataclass(frozen=True)
class Exponent:
    """One exponent of a term: it multiplies the product of the logarithms of `columns`.

    `low` and `high` bound the local exponent at the centre of the data, as it enters the exponential
    (after `sign`): a law written as n^-a has sign = -1.
    """

    name: str
    columns: tuple[str, ...]
    low: float = -3.0
    high: float = 3.0
    sign: float = 1.0


@dataclass(frozen=True)
class Term:
    """A positive amplitude times powers. `logarithmic`: the amplitude is reported as its natural logarithm."""

    amplitude: str
    exponents: tuple[Exponent, ...] = ()
    logarithmic: bool = False


@dataclass(frozen=True)
class Law:
    """A law for nmse: its first term falls with more latents or compute, its last is what remains.

    "raw" coefficients are what the fit works with: log amplitudes and signed exponents, [..., coefficients].
    Reported coefficients are those of `formula`, in the order of `names`.
    """

    name: str
    formula: str
    columns: tuple[str, ...]
    terms: tuple[Term, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(n for t in self.terms for n in (t.amplitude, *(e.name for e in t.exponents)))

    @cached_property
    def term_of(self) -> np.ndarray:
        """The index of the term that each coefficient belongs to, [coefficients]."""
        return np.array([j for j, t in enumerate(self.terms) for _ in range(1 + len(t.exponents))])

    @property
    def has_floor(self) -> bool:
        """Whether the last term is an irreducible constant, which other forms of the same law may lack."""
        return len(self.terms) > 1 and not self.terms[-1].exponents

    def design(self, logs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Features of ln L: [points, coefficients], ones for amplitudes, products of logs for exponents."""
        points = len(next(iter(logs.values())))
        features = []
        for term in self.terms:
            features.append(np.ones(points))
            features += [np.prod([logs[c] for c in e.columns], axis=0) for e in term.exponents]
        return np.stack(features, axis=1)

    def log_value(self, raw: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """ln L, [..., points], for raw coefficients [..., coefficients]."""
        design = self.design({c: np.log(np.asarray(columns[c], dtype=np.float64)) for c in self.columns})
        return log_sum(raw, design, self.term_of)[0]

    def value(self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """L at the points of `columns` ([points] each) for reported coefficients."""
        return np.exp(self.log_value(self.to_raw(coefficients), columns))

    def to_reported(self, raw: np.ndarray) -> np.ndarray:
        """Raw coefficients as the formula writes them; same shape."""
        reported = np.array(raw, dtype=np.float64)
        i = 0
        for term in self.terms:
            if not term.logarithmic:
                reported[..., i] = np.exp(reported[..., i])
            for offset, exponent in enumerate(term.exponents, 1):
                reported[..., i + offset] *= exponent.sign
            i += 1 + len(term.exponents)
        return reported

    def to_raw(self, coefficients: Mapping[str, float]) -> np.ndarray:
        """The inverse of `to_reported`, from a mapping of names; [coefficients]. Raises KeyError for a missing one."""
        raw = []
        for term in self.terms:
            amplitude = coefficients[term.amplitude]
            raw.append(amplitude if term.logarithmic else np.log(max(amplitude, 1e-300)))
            raw += [exponent.sign * coefficients[exponent.name] for exponent in term.exponents]
        return np.array(raw, dtype=np.float64)

    def exponent_of(self, raw: np.ndarray, column: str, at: Mapping[str, float]) -> np.ndarray:
        """The exponent of `column` in the first term where the other columns are `at`; [...]."""
        total = np.zeros(np.shape(raw)[:-1])
        for i, exponent in enumerate(self.terms[0].exponents, 1):
            if column in exponent.columns:
                others = [np.log(at[c]) for c in exponent.columns if c != column]
                total = total + raw[..., i] * float(np.prod(others))
        return total


def log_sum(raw: np.ndarray, design: np.ndarray, term_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ln L [..., points], d ln L / d raw [..., points, coefficients]) of a sum of terms."""
    logs = np.stack([raw[..., term_of == j] @ design[:, term_of == j].T for j in range(int(term_of[-1]) + 1)], axis=-1)
    top = logs.max(axis=-1)
    shares = np.exp(logs - top[..., None])
    total = shares.sum(axis=-1)
    shares /= total[..., None]
    return top + np.log(total), shares[..., term_of] * design


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
C = Law("c", "nmse = A C^-a", ("flops",), (Term("A", (Exponent("a", ("flops",), sign=-1.0),)),))
C_FLOOR = Law("c", "nmse = A C^-a + E", ("flops",), (*C.terms, Term("E")))
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

LAWS = (N_K, N, N_FLOOR, C, C_FLOOR, N_D)
SYMBOLS = {"n_latents": "n", "k": "k", "flops": "C", "tokens": "D"}


def find_law(name: str, coefficients: Mapping[str, object]) -> Law:
    """The law of an entry of fits.json, by its name and coefficient names. Raises SaescaleError."""
    for law in LAWS:
        if law.name == name and set(law.names) == set(coefficients):
            return law
    raise SaescaleError(
        f"no law {name} with coefficients {', '.join(coefficients)}; known: "
        + "; ".join(f"{law.name}: {law.formula}" for law in LAWS)
    )
