"""Colours: one per k, the same in every figure, for white paper and for a dark page."""

import colorsys
from collections.abc import Iterable
from functools import cache

import matplotlib

from saescale.scaling.figures.views import Ramp

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


def colour(k: float | None, ks: Iterable[float], dark: bool = False, ramp: Ramp = "k") -> str:
    """The colour of `k` among all `ks` of a run as #rrggbb; without k that of text.

    Dark to light with k, from viridis, which the colour-blind tell apart and which survives grey printing. On a dark
    page the hue stays and the lightness is raised. Levels of compute have a ramp of their own.
    """
    if k is None:
        return SOFT[dark]
    return _colours(tuple(sorted(set(ks))), dark, ramp)[k]


def translucent(hexadecimal: str, alpha: float) -> str:
    """rgba(...) of a colour #rrggbb."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


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
