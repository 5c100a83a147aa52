"""Values with their intervals as figures of comparisons draw and name them."""

import re

import numpy as np

from saescale.scaling.comparison.compare import Comparison
from saescale.scaling.comparison.scatter import Interval
from saescale.scaling.figures.views import Points

_LONGEST = 80


def bar(found: Interval, y: float, level: float | str, text: str, across: bool = True) -> Points:
    """One value with its interval, in a row at `y`; not `across`: above `y` on the other axis."""
    value, place = np.array([found.value]), np.array([y])
    low, high = (np.array([np.nan if end is None else end]) for end in (found.low, found.high))
    # Without an interval there is no bar; with one that is open at one end, a bar that leaves the axes there.
    there = found.low is not None or found.high is not None
    x, y_ = (value, place) if across else (place, value)
    texts = [text.replace("-", "−")]
    return Points(x, y_, level, texts, low if there else None, high if there else None, across=across)


def ends_text(found: Interval, form: str) -> str:
    """ " [low, high]", or nothing where there is no interval."""
    if found.low is None and found.high is None:
        return ""
    low, high = ("open" if end is None else format(end, form) for end in (found.low, found.high))
    return f" [{low}, {high}]"


def interval_key(comparison: Comparison) -> str:
    """What bars mean, or why there are none."""
    how = comparison.scatter.how
    return f"Bars: 95 % intervals ({how})." if comparison.scatter.sd else f"No intervals: {how}."


def file_name(name: str, comparison: Comparison) -> str:
    """Of a file: where several sources are compared, with what tells them apart."""
    return "-".join([name, *(slug(value) for value in comparison.arms.of.values())])


def slug(value: object) -> str:
    """A value as a part of the name of a file, which may not be as long as a user's name may."""
    return re.sub(r"[^\w.]+", "_", f"{value:g}" if isinstance(value, float) else str(value))[:_LONGEST]
