"""What the laws say about cells that were not trained: `saescale fit RUN --predict n=65536,k=64`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.law import SYMBOLS, find_law, forms_of, law_names
from saescale.scaling.laws.over_metrics import MetricLaws
from saescale.scaling.laws.scales import Scale
from saescale.scaling.tables import Table, number
from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS
from saescale.storage.errors import SaescaleError

_COLUMNS = {symbol: column for column, symbol in SYMBOLS.items()} | {column: column for column in SYMBOLS}
_COLUMNS["N"] = "n_latents"
_FAR = 4.0
_LARGEST = 1e60


def parse_point(text: str) -> dict[str, float]:
    """`n=65536,k=64` as {"n_latents": 65536.0, "k": 64.0}; the names are n, k, C, D, s or those of results.parquet.

    Raises SaescaleError.
    """
    point: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in _COLUMNS:
            raise SaescaleError(
                f"{text}: {name or part!r} is none of {', '.join(_COLUMNS)}; write such as n=65536,k=64"
            )
        try:
            number_ = float(value)
        except ValueError:
            raise SaescaleError(f"{text}: {name} is {value!r}, not a number; write such as n=65536,k=64") from None
        column = _COLUMNS[name]
        if not 0 < number_ < _LARGEST:
            raise SaescaleError(f"{text}: {name} must be positive and finite, and no more than {_LARGEST:g}")
        if column in point:
            raise SaescaleError(f"{text}: {name} is given twice")
        if COLUMNS[column].type == pa.int64() and number_ % 1:
            raise SaescaleError(f"{text}: {name} is {value}, and counts {COLUMNS[column].unit}: give a whole number")
        point[column] = number_
    if point.get("k", 0) > point.get("n_latents", np.inf):
        raise SaescaleError(f"{text}: k is above n; an SAE has no more active latents than latents")
    return point


def predict(entry: Mapping[str, Any], **columns: float | np.ndarray) -> np.ndarray:
    """nmse by one entry of fits.json's "fits" at n_latents=..., k=..., flops=... or tokens=... ([points]); a metric by
    one of the "fits" of its "metrics".

    `flops` are sparse training FLOPs and `tokens` training tokens of the whole training, as in
    results.parquet. Raises SaescaleError when a column that the law needs is missing or not positive.
    """
    law = find_law(entry["law"], entry["coefficients"])
    points = {}
    for column in law.columns:
        if column not in columns:
            raise SaescaleError(
                f"law {law.name} needs {column} ({SYMBOLS[column]}); got {', '.join(columns) or 'nothing'}"
            )
        points[column] = np.atleast_1d(np.asarray(columns[column], dtype=np.float64))
        if not (points[column] > 0).all():
            raise SaescaleError(f"law {law.name}: {column} must be positive")
    points = dict(zip(points, np.broadcast_arrays(*points.values()), strict=True))
    found = law.value({name: c["value"] for name, c in entry["coefficients"].items()}, points)
    return Scale(**entry["scale"]).value(found) if "scale" in entry else found


def predictions(fits: Sequence[Fit], point: Mapping[str, float], cells: Table) -> list[dict[str, Any]]:
    """What every fit that applies says at `point`, for each kind of cells: those over its columns and, where they are
    of one k, of its k. A law says nothing of a column that it has not, unless all `cells` have there what is asked.

    `low` and `high` are the 95 % interval of one newly trained cell (the scatter of cells included), `law_low` and
    `law_high` of the law; None without a bootstrap. `far`: how far a column lies beyond the cells that were fitted, in
    words. Raises SaescaleError where no fit applies.
    """
    found = []
    same = {column for column, value in point.items() if column in cells and (cells[column] == value).all()}
    for fit in fits:
        if not set(point) <= {*fit.law.columns, *fit.at, *same}:
            continue
        if not set(fit.law.columns) <= set(point) or any(point.get(c, v) != v for c, v in fit.at.items()):
            continue
        prediction = fit.predict({c: np.array([point[c]]) for c in fit.law.columns})
        ends = {
            "law_low": prediction.low, "law_high": prediction.high,
            "low": prediction.cell_low, "high": prediction.cell_high,
        }  # fmt: skip
        found.append(
            {"law": fit.law.name, "at": dict(fit.at), **({"of": dict(fit.of)} if fit.of else {})}
            | {"floor": fit.law.has_floor, "point": dict(point)}
            | {"predicts": fit.law.target, "value": float(prediction.value[0])}
            | {name: float(v[0]) if np.isfinite(v[0]) else None for name, v in ends.items()}
            | {"far": _how_far(fit, point)}
        )
    if not found:
        asked = ", ".join(f"{SYMBOLS[c]} = {number(v)}" for c, v in point.items())
        there = listed(dict.fromkeys(_applies(fit) for fit in fits)) or "none"
        over = [law for law in law_names() if set(forms_of(law)[0].columns) | {"k"} == set(point) | {"k"}]
        advice = f"; ask for --law {over[0]}" if over and over[0] not in {fit.law.name for fit in fits} else ""
        raise SaescaleError(f"no fitted law applies at {asked}; there are {there}{advice}")
    return found


def metric_predictions(metrics: Sequence[MetricLaws], point: Mapping[str, float]) -> list[dict[str, Any]]:
    """The same of laws of metrics, in values of the metric. Raises SaescaleError where no law applies."""
    found = []
    for laws in metrics:
        for row in predictions(laws.fits, point, laws.cells) if laws.fits else ():
            ends: dict[str, float] = {}
            for low, high in (("low", "high"), ("law_low", "law_high")):
                if row[low] is not None and row[high] is not None:
                    pair = laws.scale.interval(np.array(row[low]), np.array(row[high]))
                    ends |= dict(zip((low, high), map(float, pair), strict=True))
            found.append(row | {"predicts": laws.name, "value": float(laws.scale.value(np.array(row["value"])))} | ends)
    return found


def _how_far(fit: Fit, point: Mapping[str, float]) -> list[str]:
    words = []
    for column in fit.law.columns:
        low, high = fit.columns[column].min(), fit.columns[column].max()
        factor = max(point[column] / high, low / point[column])
        if factor > 1:
            end = f"{factor:.3g} times {'above the largest' if point[column] > high else 'below the smallest'}"
            caution = ": an interval says nothing of whether the law still holds there" if factor > _FAR else ""
            words.append(f"{SYMBOLS.get(column, column)} is {end} in the fit{caution}")
    return words


def _applies(fit: Fit) -> str:
    needs = ", ".join(SYMBOLS.get(c, c) for c in fit.law.columns)
    held = "".join(f" at {c} = {number(v)}" for c, v in fit.at.items())
    return f"{fit.law.name}{held} (needs {needs})"
