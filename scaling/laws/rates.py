"""The best learning rate, as a power of N and k: whether the rate of a small SAE carries over to a large one.

At each N and k a parabola in ln lr goes through ln nmse of the lowest rate and up to two neighbours on either side,
weighted by their seeds. Its minimum is the best rate there, with Fieller's interval (1954), which is open where the
curvature cannot be told from none. The scatter behind it is pooled over all parabolas of a kind of cells and, where
they repeat, seeds. Wells are skew, since above them training is about to diverge: all of a kind share a cubic term
where enough is left over to tell it. A power law goes through the minima, weighted by their variances.

A minimum at the edge of the rates that were tried, or beyond it, is a bound: it is said and enters no law. So are
parabolas that open downwards. Rates of which a seed diverged (nmse above 1) are left out of the parabola.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import t as student

from saescale.scaling.laws.best import find_best
from saescale.scaling.tables import Table, known, number
from saescale.scaling.words import listed

_LEAST_RATES = 3
_LEAST_MINIMA = 3
_BESIDE = 2  # rates on either side of the lowest that its parabola goes through
_LEAST_FREE = 3  # degrees of freedom that a cubic term takes one of
_LEVEL = 0.95


@dataclass(frozen=True)
class Minimum:
    """The best rate at one N and k. `log_lr` [rates] were tried without diverging, `log_nmse` [rates] their means over
    `seeds` [rates]. `value`, `low` and `high` are logarithms of the rate; an end is infinite where the interval is
    open. `bound`: "above" or "below", where the best rate lies beyond what was tried, or "none" where nothing is said.
    """

    n_latents: float
    k: float | None
    log_lr: np.ndarray
    log_nmse: np.ndarray
    seeds: np.ndarray
    diverged: int = 0
    value: float = np.nan
    variance: float = np.nan  # of `value`, over that of one cell
    low: float = -np.inf
    high: float = np.inf
    lowest: float = np.nan  # ln nmse at the minimum
    bound: str = ""
    reason: str = ""
    squares: float = 0.0  # weighted, of what the parabola leaves over
    free: int = 0
    shift: float = 0.0  # of the minimum by the skew of the wells
    pull: float = 0.0  # of the minimum by one standard error of that, over the deviation of one cell
    _normal: tuple[np.ndarray, np.ndarray] | None = None  # (coefficients, covariance over the variance of one cell)

    @property
    def found(self) -> bool:
        """Whether it is a minimum inside of what was tried."""
        return not self.bound

    def interval(self, deviation: float, quantile: float) -> "Minimum":
        """With Fieller's interval for a standard deviation of one cell."""
        if self._normal is None or not self.found or not np.isfinite(quantile * deviation):
            return self
        (_, b, a), covariance = self._normal
        # Where the slope b + 2 a x is within its own interval of 0: a quadratic in x.
        scale = (quantile * deviation) ** 2
        two = 4 * (a * a - scale * covariance[2, 2])
        one = 4 * (a * b - scale * covariance[1, 2])
        none = b * b - scale * covariance[1, 1]
        if two <= 0:
            return self
        root = np.sqrt(max(one * one - 4 * two * none, 0.0))
        centre = self._centre() + self.shift
        low, high = centre + (-one - root) / (2 * two), centre + (-one + root) / (2 * two)
        pull = self.pull * quantile * deviation
        return replace(
            self, low=self.value - np.hypot(self.value - low, pull), high=self.value + np.hypot(high - self.value, pull)
        )

    def near(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ln rates relative to the lowest, design [rates, 3], seeds, ln nmse) of what its parabola goes through."""
        place = int(np.argmin(self.log_nmse))
        own = slice(max(place - _BESIDE, 0), place + _BESIDE + 1)
        at = self.log_lr[own] - self.log_lr[place]
        return at, np.stack([np.ones_like(at), at, at**2], axis=1), self.seeds[own], self.log_nmse[own]

    def _centre(self) -> float:
        return float(self.log_lr[np.argmin(self.log_nmse)])

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        at = {"n_latents": self.n_latents} | ({} if self.k is None else {"k": self.k})
        tried = {"rates": np.exp(self.log_lr).tolist(), "diverged": self.diverged}
        if not self.found:
            return at | tried | {"lr": None, "reason": self.reason}
        logs = {"low": self.low, "high": self.high}
        ends = {name: float(np.exp(end)) if np.isfinite(end) else None for name, end in logs.items()}
        return at | tried | {"lr": {"value": float(np.exp(self.value)), **ends}, "nmse": float(np.exp(self.lowest))}


@dataclass(frozen=True)
class RateLaw:
    """lr* = R n^g, at one k, or lr* = R n^g k^h over all: coefficients in logarithms, [coefficients] each."""

    k: float | None
    names: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    points: int
    rms: float

    @property
    def formula(self) -> str:
        """As it is written."""
        return "lr* = R n^g" + (" k^h" if "h" in self.names else "")

    @property
    def words(self) -> str:
        """Such as "lr* ~ N^-0.31 (-0.40 to -0.22) at k = 8"."""
        parts = []
        for name, symbol in (("g", "N"), ("h", "k")):
            if name in self.names:
                i = self.names.index(name)
                ends = f" ({self.low[i]:.2f} to {self.high[i]:.2f})" if np.isfinite(self.low[i]) else ""
                parts.append(f"{symbol}^{self.value[i]:.2f}{ends}")
        return "lr* ~ " + " ".join(parts) + ("" if self.k is None else f" at k = {self.k:g}")

    def log_rate(self, n_latents: float, k: float | None) -> float:
        """ln of the best rate there."""
        return float(self.value @ _features([n_latents], [k or 1.0], "h" in self.names)[0])

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        coefficients = {}
        for i, name in enumerate(self.names):
            three = np.array([self.value[i], self.low[i], self.high[i]])
            three = np.exp(three) if name == "R" else three
            value, low, high = (float(v) if np.isfinite(v) else None for v in three)
            coefficients[name] = {"value": value, "low": low, "high": high}
        at = {} if self.k is None else {"k": self.k}
        return {
            "law": "lr_n_k" if "h" in self.names else "lr_n", "formula": self.formula, "at": at,
            "coefficients": coefficients, "points": self.points, "rms_log_residual": self.rms, "words": self.words,
        }  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """The best rates of one kind of cells and their laws. `transfer` says, for each k, what the rate of the smallest N
    costs at the largest; `deviation` is the scatter of ln nmse of one cell (NaN: not known)."""

    minima: tuple[Minimum, ...]
    laws: tuple[RateLaw, ...]
    transfer: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    deviation: float

    def document(self) -> dict[str, Any]:
        """As in fits.json."""
        return {
            "laws": [law.document() for law in self.laws],
            "minima": [minimum.document() for minimum in self.minima],
            "transfer": list(self.transfer),
            "scatter": self.deviation if np.isfinite(self.deviation) else None,
            "warnings": list(self.warnings),
        }


def find_rates(cells: Table, lost: np.ndarray) -> Rates | None:
    """The best rates of cells of one kind, `lost` (bool [cells]) of which diverged; None where no N and k has two.

    Of cells that differ in other choices of training too each rate takes the best (best.py).
    """
    if not {"lr", "n_latents"} <= set(cells.columns) or not (known(cells["lr"]) & (cells["lr"] > 0)).all():
        return None
    best = find_best(cells, lost, ("lr",)).rows
    cells, lost = cells.select(best), lost[best]
    ks = cells["k"] if "k" in cells else np.full(len(cells), np.nan)
    sizes = np.unique(np.stack([ks, cells["n_latents"]], axis=1), axis=0)
    minima, pure, free = [], 0.0, 0
    for k, n in sizes:
        own = (cells["n_latents"] == n) & ((ks == k) | np.isnan(k))
        minimum, squares, degrees = _minimum(cells.select(own), lost[own], n, None if np.isnan(k) else float(k))
        minima.append(minimum)
        pure += squares
        free += degrees
    if all(len(minimum.log_lr) + minimum.diverged < 2 for minimum in minima):
        return None
    minima, skew = _unskewed(minima, free)
    deviation, degrees = _scatter(minima, pure, free - skew)
    quantile = float(student.ppf((1 + _LEVEL) / 2, degrees)) if degrees else np.nan
    minima = [minimum.interval(deviation, quantile) for minimum in minima]
    found = [minimum for minimum in minima if minimum.found]
    laws = [_law(own, k, deviation, degrees) for k, own in _by_k(found)]
    if len(laws) > 1:
        laws.append(_law(found, None, deviation, degrees, joint=True))
    fitted = tuple(law for law in laws if law is not None)
    transfer = tuple(filter(None, (_transfer(own, k) for k, own in _by_k(found))))
    return Rates(tuple(minima), fitted, transfer, tuple(_warnings(minima, fitted, degrees)), deviation)


def _minimum(cells: Table, lost: np.ndarray, n: float, k: float | None) -> tuple[Minimum, float, int]:
    """The minimum at one N and k; with the sum of squares of ln nmse between seeds, and its degrees of freedom."""
    rates = np.unique(cells["lr"])
    diverged = np.unique(cells["lr"][lost])
    rates = rates[~np.isin(rates, diverged)]
    logs = [np.log(cells["nmse"][cells["lr"] == rate]) for rate in rates]
    seeds = np.array([len(own) for own in logs])
    pure = float(sum(((own - own.mean()) ** 2).sum() for own in logs))
    log_nmse = np.array([own.mean() for own in logs])
    start = Minimum(float(n), k, np.log(rates), log_nmse, seeds, len(diverged))
    return _parabola(start, diverged), pure, int((seeds - 1).sum())


def _parabola(start: Minimum, diverged: np.ndarray) -> Minimum:
    """With the minimum of its parabola, or why there is none."""
    x, y = start.log_lr, start.log_nmse
    if len(x) < _LEAST_RATES:
        return replace(start, bound="none", reason=f"{len(x)} rates that did not diverge; it takes {_LEAST_RATES}")
    place = int(np.argmin(y))
    if place in (0, len(x) - 1):
        side, end = ("below", "smallest") if place == 0 else ("above", "largest")
        more = ", above which it diverges" if side == "above" and (np.log(diverged) > x[-1]).any() else ""
        reason = f"the best rate is the {end} that was tried{more}"
        return replace(start, bound=side, reason=reason)
    at, design, weights, near = start.near()
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design))
    coefficients = covariance @ (design.T @ (weights * near))
    c, b, a = coefficients
    if a <= 0:
        return replace(start, bound="none", reason="the parabola through ln nmse opens downwards")
    vertex = -b / (2 * a)
    if not at[0] < vertex < at[-1]:
        return replace(start, bound="above" if vertex > 0 else "below", reason="the minimum lies beyond the rates")
    slope = np.array([0.0, -1 / (2 * a), b / (2 * a * a)])  # of the vertex in the coefficients
    left = near - design @ coefficients
    return replace(
        start, value=float(x[place] + vertex), variance=float(slope @ covariance @ slope),
        lowest=float(c - a * vertex**2), squares=float(weights @ left**2), free=len(at) - 3,
        _normal=(coefficients, covariance),
    )  # fmt: skip


def _unskewed(minima: list[Minimum], free: int) -> tuple[list[Minimum], bool]:
    """Minima of parabolas with a cubic term that all of them share, and True; as they are where too little is left over
    to tell it: too high a rate costs more than one as much too low, and a parabola's minimum is off by that."""
    crossed = squared = 0.0
    for m in (m for m in minima if m.found and m.free):
        at, design, weights, y = m.near()
        cubic = at**3 - design @ np.linalg.lstsq(design * np.sqrt(weights)[:, None], at**3 * np.sqrt(weights))[0]
        crossed += float(cubic @ (weights * y))
        squared += float(cubic @ (weights * cubic))
    if squared == 0 or sum(m.free for m in minima) + free < _LEAST_FREE:
        return minima, False
    d, step = crossed / squared, 1e-3 * np.sqrt(1 / squared)
    found = []
    for m in minima:
        own = _with_cubic(m, d) if m.found else m
        pull = (_with_cubic(m, d + step).value - own.value) / step if m.found else 0.0
        found.append(replace(own, pull=float(pull / np.sqrt(squared))))
    return found, True


def _with_cubic(minimum: Minimum, d: float) -> Minimum:
    """The minimum where d x^3 is added to its parabola; as it is where that has none between its rates."""
    at, design, weights, y = minimum.near()
    rest = y - d * at**3
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design))
    c, b, a = covariance @ (design.T @ (weights * rest))
    turn = a * a - 3 * d * b
    if turn <= 0:
        return minimum
    vertex = float(-b / (a + np.sqrt(turn))) if a > 0 else float((np.sqrt(turn) - a) / (3 * d))
    if not at[0] < vertex < at[-1]:
        return minimum
    left = rest - design @ np.array([c, b, a])
    centre = float(minimum.log_lr[np.argmin(minimum.log_nmse)])
    return replace(
        minimum, value=centre + vertex, shift=centre + vertex - minimum.value, squares=float(weights @ left**2),
        lowest=float(c + b * vertex + a * vertex**2 + d * vertex**3),
    )  # fmt: skip


def _scatter(minima: Sequence[Minimum], pure: float, free: int) -> tuple[float, int]:
    """(standard deviation of ln nmse of one cell, its degrees of freedom), of what parabolas leave over and, unless
    that is more than chance allows, of seeds; (NaN, 0) where neither is there."""
    found = [minimum for minimum in minima if minimum.found]
    squares, degrees = sum(m.squares for m in found), sum(m.free for m in found)
    if not degrees + free:
        return np.nan, 0
    if degrees and free and pure > 0 and f_distribution.sf(squares / degrees / (pure / free), degrees, free) < 0.05:
        return float(np.sqrt(squares / degrees)), degrees
    return float(np.sqrt((squares + pure) / (degrees + free))), degrees + free


def _by_k(minima: Sequence[Minimum]) -> list[tuple[float | None, list[Minimum]]]:
    return [(k, [m for m in minima if m.k == k]) for k in dict.fromkeys(m.k for m in minima)]


def _features(n_latents: Sequence[float], ks: Sequence[float], joint: bool) -> np.ndarray:
    columns = [np.ones(len(n_latents)), np.log(n_latents), *([np.log(ks)] if joint else [])]
    return np.stack(columns, axis=1)


def _law(
    minima: Sequence[Minimum], k: float | None, deviation: float, degrees: int, joint: bool = False
) -> RateLaw | None:
    """A power law through minima, by least squares weighted with their variances; None where they are too few.

    Where minima scatter more than their variances say, intervals go by that, with its degrees of freedom.
    """
    design = _features([m.n_latents for m in minima], [m.k or 1.0 for m in minima], joint)
    if len(minima) < _LEAST_MINIMA + joint or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    target, variances = np.array([m.value for m in minima]), np.array([m.variance for m in minima])
    pulls = np.array([m.pull for m in minima])  # what the skew that they share moves them all by
    weights = np.linalg.inv(np.diag(variances) + np.outer(pulls, pulls))
    covariance = np.linalg.inv(design.T @ weights @ design)
    value = covariance @ (design.T @ weights @ target)
    left = target - design @ value
    free = len(minima) - design.shape[1]
    between = float(np.sqrt(left @ weights @ left / free))
    if not np.isfinite(deviation) or between > deviation:
        deviation, degrees = between, free
    half = float(student.ppf((1 + _LEVEL) / 2, degrees)) * deviation * np.sqrt(np.diag(covariance))
    names = ("R", "g", "h") if joint else ("R", "g")
    return RateLaw(k, names, value, value - half, value + half, len(minima), float(np.sqrt(np.mean(left**2))))


def _transfer(minima: Sequence[Minimum], k: float | None) -> dict[str, Any] | None:
    """What the best rate of the smallest N costs at the largest, between the rates that were tried there."""
    small, large = min(minima, key=lambda m: m.n_latents), max(minima, key=lambda m: m.n_latents)
    if small is large:
        return None
    found: dict[str, Any] = {} if k is None else {"k": k}
    found |= {"from": small.n_latents, "to": large.n_latents, "lr": float(np.exp(small.value)), "nmse_higher_by": None}
    at = "" if k is None else f" at k = {k:g}"
    words = f"the best rate of N = {number(small.n_latents)}, {found['lr']:.2g}, at N = {number(large.n_latents)}{at}"
    if not large.log_lr[0] <= small.value <= large.log_lr[-1]:
        return found | {"words": f"{words}: not known, it is beyond the rates that were tried there"}
    cost = float(np.expm1(np.interp(small.value, large.log_lr, large.log_nmse) - large.lowest))
    found["nmse_higher_by"] = max(cost, 0.0)
    return found | {"words": f"{words}: nmse is {max(cost, 0.0):.2%} higher than at the best there"}


def _warnings(minima: Sequence[Minimum], laws: Sequence[RateLaw], degrees: int) -> list[str]:
    said = []
    for reason in dict.fromkeys(m.reason for m in minima if not m.found):
        cases = [_at(m) for m in minima if m.reason == reason]
        said.append(f"no best rate at {listed(cases)}: {reason}; it enters no law of the best rate")
    if gone := [f"{_at(m)}: {m.diverged}" for m in minima if m.diverged]:
        said.append(f"rates that diverged are left out of the parabolas ({listed(gone)})")
    if open_ends := [_at(m) for m in minima if m.found and not np.isfinite(m.high - m.low)] if degrees else []:
        said.append(f"the best rate has an open interval at {listed(open_ends)}: its parabola is hardly curved")
    if not degrees and any(m.found for m in minima):
        said.append("best rates have no intervals: three rates and one seed leave nothing over; try more of either")
    wrong = [
        f"{_at(m)}, where the law says {np.exp(law.log_rate(m.n_latents, m.k)):.2g}"
        for m in minima for law in laws
        if law.k == m.k and len(m.log_lr) and _contradicts(m, law.log_rate(m.n_latents, m.k))
    ]  # fmt: skip
    if wrong:
        said.append(f"the law of the best rate disagrees with bounds that it did not see: {listed(wrong)}")
    few = [f"k = {k:g}" if k is not None else "all cells" for k, own in _by_k(minima)
           if sum(m.found for m in own) < _LEAST_MINIMA]  # fmt: skip
    if few:
        said.append(f"no law of the best rate at {listed(few, ', ')}: it takes minima at {_LEAST_MINIMA} N")
    return said


def _contradicts(minimum: Minimum, log_rate: float) -> bool:
    """Whether a law puts the best rate well inside of rates whose end was the best: by a whole step or more."""
    x = minimum.log_lr
    if len(x) < 2 or minimum.bound not in ("above", "below"):
        return False
    return bool(log_rate < x[-2] if minimum.bound == "above" else log_rate > x[1])


def _at(minimum: Minimum) -> str:
    return f"N = {number(minimum.n_latents)}" + ("" if minimum.k is None else f", k = {minimum.k:g}")
