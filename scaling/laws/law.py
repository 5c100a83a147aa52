"""The door of laws: what a scaling law is, as data, and how one is found by its name.

A law is a file of forms/ that defines `forms` at its top level, all forms of the law that its name says: see README.md.

Every law is L(x) = sum over terms of  amplitude * exp(sum over exponents of  e * product of ln(columns)), or another
power mean of its terms. In logarithms of the amplitudes, ln L is a log-sum-exp of affine functions, which gives every
law exact gradients and the same well-conditioned fit (see estimate.py). A new law is a few lines of data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from saescale.scaling.laws.settings import DEFAULT_LAWS
from saescale.storage.columns import COLUMNS
from saescale.storage.errors import SaescaleError
from saescale.storage.registry import Room, load_file

SYMBOLS = {column.name: column.symbol for column in COLUMNS.values() if column.symbol}
LAWS = Room("saescale.scaling.laws.forms", "law", marker="forms", folder="laws")
_FROM_FILES: dict[str, Path] = {}  # laws of --law-file, by their names
_AMPLITUDE = (1e-3, 150.0)  # relative to the lowest and the highest measured value: e^-7 and e^5


class Coefficient(NamedTuple):
    """What the formula calls `name`. `low` and `high` bound it (for an exponent the local one at the centre of the
    data; for an amplitude its term there, relative to the measured values); `linear`: eliminated, not searched."""

    name: str
    unit: str
    low: float
    high: float
    linear: bool


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

    `target` is the column that it gives. `over` says what it is fitted to: cells (those that differ in its columns;
    one fit for each k where k is none of them), the compute frontier, or the compute-optimal points of the frontier.
    `join` = s other than 1 joins terms to (sum of terms^s)^(1/s), whose local exponent goes from one term's to the
    other's: with s > 0 the larger term leads and the law flattens, with s < 0 it steepens. Two such power laws are a
    broken power law with one break, of Caballero et al. 2023 (2210.14891): f = 1 / |s (a - b)| there.
    """

    name: str
    formula: str
    columns: tuple[str, ...]
    terms: tuple[Term, ...]
    join: float = 1.0
    target: str = "nmse"
    over: Literal["cells", "frontier", "optimum"] = "cells"

    def __post_init__(self) -> None:
        used = {column for term in self.terms for exponent in term.exponents for column in exponent.columns}
        if not self.terms or len(set(self.names)) < len(self.names):
            raise SaescaleError(
                f"law {self.name}: each coefficient needs a name of its own; got {', '.join(self.names)}"
            )
        if not self.terms[0].exponents:
            raise SaescaleError(f"law {self.name}: its first term needs an exponent; put a constant last")
        if used != set(self.columns):
            raise SaescaleError(
                f"law {self.name}: its exponents use {', '.join(sorted(used)) or 'no column'}, its columns are "
                f"{', '.join(self.columns)}; make them the same"
            )
        if not self.join:
            raise SaescaleError(f"law {self.name}: join is 0; give 1 for a sum")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The coefficients in the order of the terms: each amplitude, then its exponents."""
        return tuple(n for t in self.terms for n in (t.amplitude, *(e.name for e in t.exponents)))

    @cached_property
    def term_of(self) -> np.ndarray:
        """The index of the term that each coefficient belongs to, [coefficients]."""
        return np.array([j for j, t in enumerate(self.terms) for _ in range(1 + len(t.exponents))])

    def coefficients(self) -> tuple[Coefficient, ...]:
        """Every coefficient with its unit and bounds, in the order of `names`."""
        found = []
        for term in self.terms:
            powers = [f"{_unit(c)}^{e.name}" for e in term.exponents for c in e.columns]
            unit = "logarithm" if term.logarithmic else " ".join([_unit(self.target), *powers])
            found.append(Coefficient(term.amplitude, unit, *_AMPLITUDE, linear=True))
            for e in term.exponents:
                bounds = sorted((e.sign * e.low, e.sign * e.high))
                found.append(Coefficient(e.name, "1", bounds[0], bounds[1], linear=False))
        return tuple(found)

    def ordered(self, raw: np.ndarray) -> np.ndarray:
        """Raw coefficients [..., coefficients] of a broken power law with the term that leads at small values first.

        Terms of a `join` of two powers of one column may change places without changing the law; others stay.
        """
        sizes = [len(term.exponents) for term in self.terms]
        if self.join == 1 or sizes != [1, 1] or len(self.columns) != 1:
            return raw
        wrong = (raw[..., 1] > raw[..., 3]) == (self.join > 0)
        return np.where(wrong[..., None], raw[..., [2, 3, 0, 1]], raw)

    @property
    def has_floor(self) -> bool:
        """Whether the last term is an irreducible constant, which other forms of the same law may lack."""
        return len(self.terms) > 1 and not self.terms[-1].exponents

    @property
    def leading(self) -> frozenset[str]:
        """The columns of the first term: only of these is there an exponent to speak of."""
        return frozenset(column for exponent in self.terms[0].exponents for column in exponent.columns)

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
        return log_total(raw, design, self.term_of, self.join)

    def value(self, coefficients: Mapping[str, float], columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """L at the points of `columns` ([points] each) for reported coefficients."""
        return np.exp(self.log_value(self.to_raw(coefficients), columns))

    def to_reported(self, raw: np.ndarray) -> np.ndarray:
        """Raw coefficients as the formula writes them; same shape."""
        reported = np.array(raw, dtype=np.float64)
        i = 0
        for term in self.terms:
            if not term.logarithmic:
                with np.errstate(over="ignore"):  # of an interval that is open there
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


def _unit(column: str) -> str:
    return (COLUMNS[column].unit if column in COLUMNS else "") or column


def log_sum(
    raw: np.ndarray, design: np.ndarray, term_of: np.ndarray, join: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(ln L [..., points], d ln L / d raw [..., points, coefficients]) of L = (sum of terms^join)^(1/join)."""
    top, shares, total = _summed(raw, design, term_of, join)
    slopes = np.stack([own / total for own in shares], axis=-1)
    return (top + np.log(total)) / join, slopes[..., term_of] * design


def log_total(raw: np.ndarray, design: np.ndarray, term_of: np.ndarray, join: float = 1.0) -> np.ndarray:
    """ln L [..., points] of `log_sum` alone, to the same bits."""
    top, _, total = _summed(raw, design, term_of, join)
    return (top + np.log(total)) / join


def _summed(
    raw: np.ndarray, design: np.ndarray, term_of: np.ndarray, join: float
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(logarithm of the largest term, each term over it, their sum), of terms^join; [..., points] each."""
    # Term by term: numpy reduces over an axis of two or three far more slowly.
    terms = [term_of == j for j in range(int(term_of[-1]) + 1)]
    logs = [join * (raw[..., own] @ design[:, own].T) for own in terms]
    top = reduce(np.maximum, logs)
    shares = [np.exp(own - top) for own in logs]
    return top, shares, reduce(np.add, shares)


# --- laws by their names


def law_names() -> tuple[str, ...]:
    """The names that can be asked for, each once, those that are fitted by default first."""
    return (*DEFAULT_LAWS, *(name for name in LAWS.names() if name not in DEFAULT_LAWS), *_FROM_FILES)


def forms_of(name: str) -> tuple[Law, ...]:
    """All forms of a law, such as with and without a floor: each is fitted, and they are compared.

    Raises SaescaleError for an unknown name, and for a file of the user's whose `forms` are no laws of that name.
    """
    if name in _FROM_FILES:
        return _forms(_FROM_FILES[name])
    module = LAWS.load(name)
    forms = _checked(module.forms, str(module.__file__))
    if forms[0].name != name:
        raise SaescaleError(f"{module.__file__} defines the law {forms[0].name}; call it {name}, as the file is called")
    return forms


def find_law(name: str, coefficients: Mapping[str, object]) -> Law:
    """The law of an entry of fits.json, by its name and coefficient names. Raises SaescaleError."""
    forms = forms_of(name)
    for law in forms:
        if set(law.names) == set(coefficients):
            return law
    raise SaescaleError(
        f"no law {name} with coefficients {', '.join(coefficients)}; there are "
        + "; ".join(law.formula for law in forms)
    )


def load_laws(path: str) -> tuple[Law, ...]:
    """The forms of a law of the user's own, from a file as those in forms/ are; from now on its name can be asked for.

    Raises SaescaleError when the file is missing or fails, defines no law, or one that there is already.
    """
    where = Path(path).resolve()
    if not where.is_file():
        raise SaescaleError(f"there is no law file at {path}; it is a Python file that defines forms, a tuple of laws")
    forms = _forms(where)
    name = forms[0].name
    if name in LAWS.names() and Path(str(LAWS.load(name).__file__)).resolve() != where:
        raise SaescaleError(f"{path}: there is a law {name} already; choose another name")
    if name not in LAWS.names():
        _FROM_FILES[name] = where
    return forms


def _forms(path: Path) -> tuple[Law, ...]:
    return _checked(getattr(load_file(path, "law"), "forms", ()), str(path))


def _checked(forms: object, where: str) -> tuple[Law, ...]:
    if not isinstance(forms, tuple | list) or not forms or not all(isinstance(form, Law) for form in forms):
        raise SaescaleError(f"{where} defines no law; it should say forms = (Law(...),)")
    if len({form.name for form in forms}) > 1:
        raise SaescaleError(f"{where} defines laws of several names; the forms of one law share its name")
    if len({frozenset(form.names) for form in forms}) < len(forms):
        raise SaescaleError(f"{where}: two forms of {forms[0].name} have the same coefficients; name them differently")
    return tuple(forms)
