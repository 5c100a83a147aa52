"""Colours and marks: one colour per k, colour and mark per name, the same in every figure, on paper and in the dark."""

import colorsys
import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import matplotlib

from saescale.scaling.figures.views import Level, Ramp
from saescale.scaling.order import in_order

# What is not data, on white and in the dark; the page's style sheet has the same.
INK = ("#1c2024", "#e6e9ed")
SOFT = ("#5b6570", "#a2acb7")
GRID = ("#e3e6ea", "#2b3138")
RULE = ("#aab2bb", "#59636e")
PAGE = ("#ffffff", "#15181c")
NEUTRALS = (INK, SOFT, GRID, RULE, PAGE)

# (colour map, its first and its last place): beyond the last it is too pale for lines on white.
_RAMPS: dict[Ramp, tuple[str, float, float]] = {"k": ("viridis", 0.0, 0.76), "compute": ("inferno", 0.25, 0.75)}
_DARK = (0.60, 0.78)  # lightness of the first and the last k on a dark page

# (on white, in the dark, mark): no two share a mark, so that they are told apart in grey print too. Baselines are grey.
# Marks are Plotly's names; paper.py has matplotlib's for them.
_NAMED = {
    "topk": ("#1b4f9c", "#4f86e8", "circle"),
    "batchtopk": ("#c44e00", "#f08a4b", "square"),
    "matryoshka": ("#0a8f6c", "#3fd0a4", "triangle-up"),
    "hierarchical_topk": ("#a8246f", "#ee7fc0", "diamond"),
    "switch": ("#6b4a10", "#c59a5b", "hexagon"),
    "jumprelu": ("#2f9fe0", "#8fd3ff", "triangle-down"),
    "gated": ("#cf9500", "#ffd166", "pentagon"),
    "prolu": ("#8a63d2", "#c4a6ff", "star"),
    "relu": ("#9c1230", "#f0607a", "triangle-right"),
    "frozen_decoder": ("#2f353b", "#7b8794", "x"),
    "frozen_encoder": ("#7b848d", "#a3adb8", "cross"),
    "pca": ("#a9b0b8", "#cfd6dd", "triangle-left"),
}
# A user's architecture and a subject take one of each, by a hash of the name: another run gives it the same, unless
# there are others beside it that have that one already.
_OTHERS = (("#0f6f78", "#4fc3cf"), ("#6f7a00", "#c3cf4f"), ("#d1478f", "#ff9ccb"), ("#5a3a2a", "#d0a890"))
_MARKS = ("diamond-tall", "hexagon2", "star-diamond", "hexagram")
_GLYPHS = {
    "circle": "●", "square": "■", "triangle-up": "▲", "triangle-down": "▼", "triangle-left": "◀", "triangle-right": "▶",
    "diamond": "◆", "diamond-tall": "♦", "pentagon": "⬟", "hexagon": "⬢", "hexagon2": "⬣", "star": "★",
    "x": "✖", "cross": "✚", "star-diamond": "✦", "hexagram": "✶",
}  # fmt: skip


def colour(level: Level | None, levels: Iterable[Level], dark: bool = False, ramp: Ramp = "k") -> str:
    """The colour of `level` among all `levels` of a run as #rrggbb; without one that of text.

    Values of k go from dark to light, from viridis, which the colour-blind tell apart and which survives grey printing.
    On a dark page the hue stays and the lightness is raised. Levels of compute have a ramp of their own. The colour of
    a name of saescale follows from the name alone, that of another also from those beside it: up to 16 differ in colour
    or mark, up to four in colour.
    """
    if level is None:
        return SOFT[dark]
    if isinstance(level, str):
        return _named(level, levels)[dark]
    return _colours(tuple(sorted(v for v in set(levels) if not isinstance(v, str))), dark, ramp)[level]


def colours_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The colour on white of each architecture that a document of fits.json compares, in their order."""
    names = in_order(name for entry in document.get("comparison", ()) for name in entry["architectures"])
    return {name: colour(name, names) for name in names}


def mark(level: Level | None, levels: Iterable[Level] = ()) -> str:
    """The mark of points, as Plotly calls it: a name's own among all `levels`, else a circle."""
    return _named(level, levels)[2] if isinstance(level, str) else "circle"


def glyph(level: Level, levels: Iterable[Level] = ()) -> str:
    """The mark as a character, for a label that no line leads to."""
    return _GLYPHS[mark(level, levels)]


def translucent(hexadecimal: str, alpha: float) -> str:
    """rgba(...) of a colour #rrggbb."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def _named(name: str, levels: Iterable[Level]) -> tuple[str, str, str]:
    if name in _NAMED:
        return _NAMED[name]
    beside = {level for level in levels if isinstance(level, str) and level not in _NAMED}
    return _others(tuple(sorted({name, *beside})))[name]


@cache
def _others(names: tuple[str, ...]) -> dict[str, tuple[str, str, str]]:
    """Of names that are not saescale's: each has the place that its hash gives it, or the next one that is free; while
    there are colours that nobody has, one of those."""
    pairs = [(*shades, mark) for mark in _MARKS for shades in _OTHERS]
    taken: set[int] = set()
    found = {}
    for name in names:
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % len(pairs)
        shades = {other % len(_OTHERS) for other in taken}
        while len(taken) < len(pairs) and (
            place in taken or (len(taken) < len(_OTHERS) and place % len(_OTHERS) in shades)
        ):
            place = (place + 1) % len(pairs)
        taken.add(place)
        found[name] = pairs[place]
    return found


@cache
def _colours(ks: tuple[float, ...], dark: bool, ramp: Ramp) -> dict[float, str]:
    name, first, last = _RAMPS[ramp]
    found = {}
    for i, k in enumerate(ks):
        along = i / (len(ks) - 1) if len(ks) > 1 else 0.4
        red, green, blue, _ = matplotlib.colormaps[name](first + (last - first) * along)
        if dark:
            hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
            lightness = _DARK[0] + (_DARK[1] - _DARK[0]) * along
            red, green, blue = colorsys.hls_to_rgb(hue, lightness, min(saturation, 0.65))
        found[k] = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
    return found
