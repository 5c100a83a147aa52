"""The least that reaches a value: of nmse's laws the other way round, the smallest N at each k whose metric is good
enough, by the law and, more cautiously, by where a newly trained cell would lie."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.laws.scales import Scale
from saescale.scaling.tables import number
from saescale.storage.errors import SaescaleError

_STEPS = 64  # of N to a doubling: it is found within 1.1 %


class Reached(NamedTuple):
    """At one k the smallest N that reaches a target by the law (`n_latents`), with the metric there and the 95 %
    interval of one new cell, and the smallest of which a new cell reaches it in 97.5 % (`sure`); None where none of the
    N that were asked for does. `beyond`: how many times larger than the largest N of the fit."""

    k: float
    n_latents: int | None
    sure: int | None
    value: float | None
    low: float | None
    high: float | None
    beyond: float


def target_of(scale: Scale, within: float | None, reach: float | None) -> float:
    """The distance (scales.py) that a metric must not exceed: to lie `within` a share of its limit, or to `reach` a
    value. Raises SaescaleError where that has no meaning."""
    if reach is not None:
        distance = float(scale.distance(np.array(reach)))
        if not (np.isfinite(distance) and distance > 0):
            raise SaescaleError(f"--reach {reach:g}: {scale.name} cannot be that, or only where nothing is lost at all")
        return distance
    if within is None or not 0 < within < 1:
        raise SaescaleError(
            "--metric takes what to reach: --within 1% of what an SAE that loses nothing has, or --reach"
        )
    if scale.how == "limit":
        return within * abs(scale.limit)
    if scale.how in ("share", "failure"):
        return within / (1 - within)
    raise SaescaleError(
        f"--within: {scale.name} has no value that 1 % of it could be meant of (a metric with a limit has, as "
        "downstream_loss.ce and core.explained_variance); give --reach with what it should be"
    )


def target_words(scale: Scale, distance: float) -> str:
    """Such as "downstream_loss.ce at most 3.159"."""
    bound = float(scale.value(np.array(distance)))
    return f"{scale.name} at {'most' if scale.sign > 0 else 'least'} {bound:.4g}"


def smallest(laws: MetricLaws, distance: float, ks: Sequence[float], low: float, high: float) -> list[Reached]:
    """Of each k the smallest N from `low` to `high` whose distance is at most that.

    Raises SaescaleError where the metric has no law in N and k.
    """
    fit = next((fit for fit in laws.fits if fit.law.name == "n_k"), None)
    if fit is None:
        reason = next((entry.reason for entry in laws.skipped if entry.law == "n_k"), "it was not fitted")
        raise SaescaleError(f"no law of {laws.name} in N and k to plan from: {reason}")
    found = []
    for k in ks:
        first = max(low, k)
        if first > high:
            continue
        steps = int(np.ceil(np.log2(high / first) * _STEPS)) + 1
        n = np.unique(np.ceil(np.geomspace(first, high, steps)))
        there = fit.predict({"n_latents": n, "k": np.full_like(n, k)})
        by_law = _first(there.value <= distance)
        by_cell = _first(there.cell_high <= distance) if np.isfinite(there.cell_high).all() else None
        if by_law is None:
            found.append(Reached(k, None, None, None, None, None, 1.0))
            continue
        ends = laws.scale.interval(there.cell_low[by_law], there.cell_high[by_law])
        low_end, high_end = (float(end) if np.isfinite(end) else None for end in ends)
        value = float(laws.scale.value(there.value[by_law]))
        largest = float(fit.columns["n_latents"].max())
        sure = None if by_cell is None else int(n[by_cell])
        found.append(Reached(k, int(n[by_law]), sure, value, low_end, high_end, max(float(n[by_law]) / largest, 1.0)))
    if all(reached.n_latents is None for reached in found):
        floor = np.min([fit.predict({"n_latents": np.array([high]), "k": np.array([k])}).value for k in ks])
        best = float(laws.scale.value(np.array(floor)))
        raise SaescaleError(
            f"no N up to {number(high)} reaches {target_words(laws.scale, distance)} at k = "
            f"{', '.join(f'{k:g}' for k in ks)}: the law comes to {best:.4g} there; ask for less, or for a larger "
            "--k or --n-max"
        )
    return found


def _first(holds: np.ndarray) -> int | None:
    """The first place from which on it holds."""
    return None if not holds[-1] else int(len(holds) - np.argmin(holds[::-1])) if not holds.all() else 0
