"""Figures of the floor: how far the data narrow the irreducible term, and what it trades with the exponent.

Drawn from the `profile_of_floor` of the entries of fits.json, where they have one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from saescale.scaling.figures.axes import linear_axis
from saescale.scaling.figures.views import Axis, Label, Layer, Line, Points, Rule, View
from saescale.scaling.laws.notes import law_label
from saescale.scaling.words import listed

_KEY = "profile_of_floor"
_SHOWN = 3.0  # the profile is shown up to so many times the limit


def profile(document: Mapping[str, Any], ks: tuple[float, ...]) -> View | None:
    """How much worse the fit becomes with the floor held away from its best value. None without profiles."""
    found = _profiles(document)
    if not found:
        return None
    layers: list[Layer] = [Rule(1.0)]
    floors: list[float] = []
    heights = [0.0, _SHOWN]
    for name, k, entry, rows in found:
        floor, ratio, exponent = (np.array([row[key] for row in rows]) for key in ("floor", "ratio", "exponent"))
        ratio = ratio / entry["limit"]
        kept = ratio <= _SHOWN
        if not kept.any():
            continue
        layers.append(Line(floor[kept], ratio[kept], k, "law", name))
        best = int(np.argmin(ratio))
        # The data may not bound it above: a floor just under the lowest point can be inside.
        high = entry["high"]
        bounds = f"[{entry['low']:.4f}, " + ("open above)" if high is None else f"{high:.4f}]")
        text = f"{name}<br>floor {floor[best]:.4f} {bounds}<br>exponent {exponent[best]:.3f}"
        layers.append(Points(floor[best : best + 1], ratio[best : best + 1], k, [text.replace("-", "−")]))
        # At the end that rises: where the best floor is the highest possible, only the left one does.
        first, last = np.flatnonzero(kept)[[0, -1]]
        last = last if ratio[last] > 0.1 * _SHOWN else first
        layers.append(Label(float(floor[last]), float(ratio[last]), _short(name), k, where="below"))
        floors += floor[kept].tolist()
    return View(
        "profile", "Profile of the floor",
        "How much worse the law fits when its irreducible term is held at another value and all else is fitted again. "
        "Where the curve stays below 1 the data cannot refuse that floor, at 95 %." + _open_above(found),
        "Points: best fits. The line at 1 bounds the 95 % interval.",
        _floor_axis(floors),
        linear_axis("Loss beyond the best fit (95 % limit = 1)", heights, zero=True), ks, tuple(layers),
    )  # fmt: skip


def tradeoff(document: Mapping[str, Any], ks: tuple[float, ...]) -> View | None:
    """The exponent that goes with each floor that the data cannot refuse. None without profiles."""
    layers: list[Layer] = []
    floors: list[float] = []
    exponents: list[float] = []
    for name, k, entry, rows in _profiles(document):
        inside = [row for row in rows if row["ratio"] <= entry["limit"] * (1 + 1e-9)]
        if len(inside) < 2:
            continue
        floor, exponent = (np.array([row[key] for row in inside]) for key in ("floor", "exponent"))
        layers.append(Line(floor, exponent, k, "law", name))
        best = min(range(len(inside)), key=lambda i: inside[i]["ratio"])
        text = f"{name}<br>floor {floor[best]:.4f}<br>exponent {exponent[best]:.3f}".replace("-", "−")
        layers.append(Points(floor[best : best + 1], exponent[best : best + 1], k, [text]))
        layers.append(Label(float(floor[-1]), float(exponent[-1]), _short(name), k, where="below"))
        floors += floor.tolist()
        exponents += exponent.tolist()
    if not layers:
        return None
    return View(
        "tradeoff", "Floor against exponent",
        "Every floor within its 95 % interval, with the exponent that fits best beside it. A long line says that the "
        "data do not tell the two apart: a higher floor with a steeper fall describes them as well.",
        "Lines: along the profile. Points: best fits.",
        _floor_axis(floors),
        linear_axis("Exponent", exponents), ks, tuple(layers),
    )  # fmt: skip


def _open_above(found: list[tuple[str, float | None, Mapping[str, Any], list[dict[str, float]]]]) -> str:
    """Where a profile ends at the lowest point without having been refused: a sentence, or nothing."""
    names = [_short(name) for name, _, entry, _ in found if entry["high"] is None]
    if not names:
        return ""
    return f" Open above at the lowest measured nmse, where floors end: {listed(names, ', ')}."


def _floor_axis(floors: list[float]) -> Axis:
    """With room on the right for the names beside the ends of lines."""
    room = max(floors) + 0.1 * (max(floors) - min(floors))
    return linear_axis("Irreducible nmse at the centre of the data", [*floors, room], zero=min(floors) == 0.0)


def _profiles(document: Mapping[str, Any]) -> list[tuple[str, float | None, Mapping[str, Any], list[dict[str, float]]]]:
    """(name, k, profile, rows by floor) of the laws in n, or of those in C where these have no profile."""
    for names in (("n_k", "n"), ("c",)):
        entries = [e for e in document["fits"] if e["law"] in names and (e.get(_KEY) or {}).get("values")]
        if entries:
            return [
                (law_label(entry), entry["at"].get("k"), entry[_KEY],
                 sorted(entry[_KEY]["values"], key=lambda row: row["floor"]))
                for entry in entries
            ]  # fmt: skip
    return []


def _short(name: str) -> str:
    """ "n at k = 8, with floor" as "k = 8"; "n_k" as "L(N, k)"."""
    return "L(N, k)" if name == "n_k" else name.split(" at ")[-1].split(", with")[0]
