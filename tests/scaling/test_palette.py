"""A name has its colour and its mark wherever it is drawn."""

import colorsys
from itertools import combinations

import numpy as np
import pytest

from saescale.scaling.figures.palette import PAGE, colour, glyph, mark
from saescale.scaling.figures.paper import _MARKS
from saescale.scaling.order import BASELINES, KNOWN

# What the colour-blind see of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
SEEN = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(shade: str) -> np.ndarray:
    parts = np.array([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    scaled = XYZ @ np.clip(light, 0, 1) / XYZ.sum(axis=1)
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("dark", [False, True])
def test_architectures_are_told_apart(dark: bool) -> None:
    """By their marks all of them, in grey print too; by their colours the trained ones, by everybody."""
    assert len({mark(name) for name in KNOWN}) == len({glyph(name) for name in KNOWN}) == len(KNOWN)
    shades = {name: colour(name, (), dark) for name in KNOWN}
    page = linear(PAGE[dark]) @ XYZ[1]
    for name, shade in shades.items():
        lighter, darker = sorted((linear(shade) @ XYZ[1], page))[::-1]
        assert (lighter + 0.05) / (darker + 0.05) > 2.1, name
    trained = [name for name in KNOWN if name not in BASELINES]
    for first, second in combinations(trained, 2):
        one, other = linear(shades[first]), linear(shades[second])
        seen = (*(np.array(matrix) for matrix in SEEN.values()), np.eye(3))
        apart = [np.linalg.norm(lab(matrix @ one) - lab(matrix @ other)) for matrix in seen]
        assert min(apart) > 5, (first, second)


def test_a_name_has_its_colour_from_itself_alone() -> None:
    for name in ("topk", "mine", "gpt2", "another of mine"):
        assert colour(name, ("topk", "mine")) == colour(name, ("relu",), ramp="name") == colour(name, ())
        assert mark(name) in _MARKS
        assert glyph(name)
    assert len({(colour(f"mine{i}", ()), mark(f"mine{i}")) for i in range(80)}) == 16
    # Of those of a user's own, each that is drawn beside others has its own pair as long as there are some.
    mine = [f"mine{i}" for i in range(16)]
    assert len({(colour(name, mine), mark(name, mine)) for name in mine}) == 16
    assert len({(colour(name, mine, dark=True), glyph(name, mine)) for name in mine}) == 16
    first = [name for name in mine[:9] if colour(name, mine) == colour(name, ()) and mark(name, mine) == mark(name)]
    assert len(first) >= 4
    # A few have colours of their own.
    for names in (("othello", "othello-random"), ("resid_post.0", "resid_post.2", "resid_post.4"), tuple(mine[:4])):
        assert len({colour(name, names) for name in names}) == len(names)
    assert {colour(name, [*mine, "one too many"]) for name in mine} == {colour(name, mine) for name in mine}
    # Baselines are grey.
    for name in BASELINES:
        red, green, blue = (int(colour(name, ())[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert colorsys.rgb_to_hls(red, green, blue)[2] < 0.15
