"""What a figure shows, apart from how it is drawn: one description for the page, for W&B and for paper.

A `View` is drawn by paper.py (matplotlib: PNG, PDF, SVG) and by interactive.py (Plotly).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

_CURVES = 300  # at most so many in one figure
_LONGEST = 28  # letters of a name beside axes
Scale = Literal["log", "linear"]
# law: a fitted law; curve: one cell's course; frontier: a lower envelope; through: joins points without a law;
# other: a second law beside the first; reference: something to compare with.
Stroke = Literal["law", "curve", "frontier", "through", "other", "reference"]
# open: what stands beside the main points, such as another law's value.
Marker = Literal["filled", "open"]
# What colours stand for, and what the layers' `level` is then: values of k, of compute or N (other colours than k), or
# names, of architectures or subjects, which have marks of their own besides.
Ramp = Literal["k", "compute", "name"]
Level = float | str


@dataclass(frozen=True)
class Axis:
    """`low` to `high` is shown, in data units; `ticks` are (place, text) and `minor` places, both within it.

    A text may hold powers as "2×10^12"; each renderer raises them in its own way.
    """

    label: str
    scale: Scale
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    minor: tuple[float, ...] = ()

    def fraction(self, value: float) -> float:
        """Where a value lies on the axis: 0 at `low`, 1 at `high`."""
        if self.scale == "log":
            return float(np.log(value / self.low) / np.log(self.high / self.low))
        return (value - self.low) / (self.high - self.low)

    def value(self, fraction: float) -> float:
        """The inverse of `fraction`."""
        if self.scale == "log":
            return float(self.low * (self.high / self.low) ** fraction)
        return self.low + fraction * (self.high - self.low)


@dataclass(frozen=True)
class Points:
    """Markers at x, y [points], with bars from `low` to `high` where given, along y, or `across` along x; `texts` say
    what each one is. An end that is NaN is open: its bar leaves the axes."""

    x: np.ndarray
    y: np.ndarray
    level: Level | None
    texts: Sequence[str] = ()
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    marker: Marker = "filled"
    across: bool = False


@dataclass(frozen=True)
class Line:
    """A line through x, y [points]; `text` says what it is."""

    x: np.ndarray
    y: np.ndarray
    level: Level | None
    stroke: Stroke
    text: str = ""


@dataclass(frozen=True)
class Band:
    """The space between `low` and `high` over x [points]: a 95 % interval."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: Level | None


@dataclass(frozen=True)
class Label:
    """The name of what ends at (x, y) on the right, written beside the axes (margin), below the place itself, or beside
    it in its row.

    `level` None: in the colour of text.
    """

    x: float
    y: float
    text: str
    level: Level | None
    where: Literal["margin", "below", "row"] = "margin"


@dataclass(frozen=True)
class Rule:
    """A thin line across the axes: at a `y`, upright at an `x`, or the diagonal y = x where both are None."""

    y: float | None
    x: float | None = None


Layer = Points | Line | Band | Label | Rule


@dataclass(frozen=True)
class View:
    """One figure. `name` is its file's, `title` its heading, `caption` what it shows and how to read it, `key` what
    its marks mean, in a line; `levels` are all values of k of the run, which fix its colour; of names their order."""

    name: str
    title: str
    caption: str
    key: str
    x: Axis
    y: Axis
    levels: tuple[Level, ...]
    layers: tuple[Layer, ...] = field(repr=False)
    formula: tuple[str, ...] = ()  # lines under the axes on paper: the law, its coefficients
    ramp: Ramp = "k"

    @property
    def labels(self) -> list[Label]:
        """The labels beside the axes, from the lowest to the highest, short enough to leave these their room."""
        labels = [layer for layer in self.layers if isinstance(layer, Label) and layer.where == "margin"]
        if self.ramp == "name":
            labels = [replace(label, text=shortened(label.text)) for label in labels]
        return sorted(labels, key=lambda label: self.y.fraction(label.y))


def shortened(name: str) -> str:
    """A name as it stands beside axes: of a long one, such as a user's architecture may have, its two ends."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 13]}\u2026{name[-12:]}"


def thinned(count: int) -> list[int]:
    """The places, evenly taken, of those of `count` curves that a figure draws: thousands would be a blot, and tens of
    megabytes in the page."""
    if count <= _CURVES:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, _CURVES).round()]


def how_thinned(count: int) -> str:
    """What a caption says of it; nothing where all are drawn."""
    return f" Drawn are {_CURVES} of {count:,} curves, evenly taken by k and N." if count > _CURVES else ""


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places within 0 to 1, moved as little as needed to be `gap` apart, and half of that from the ends:
    neighbours that would overlap share their centre."""
    groups: list[tuple[float, int]] = []
    for place in places:
        centre, count = min(max(place, gap / 2), 1 - gap / 2), 1
        while groups and centre - (count - 1) * gap / 2 < groups[-1][0] + (groups[-1][1] + 1) * gap / 2:
            before, members = groups.pop()
            centre = (before * members + centre * count) / (members + count)
            count += members
            half = count * gap / 2
            centre = min(max(centre, half), 1 - half)
        groups.append((centre, count))
    return [c + gap * (i - (m - 1) / 2) for c, m in groups for i in range(m)]
