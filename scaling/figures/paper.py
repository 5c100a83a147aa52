"""Views drawn for paper: PNG to look at, PDF and SVG to set. matplotlib's Agg, no display."""

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from saescale.scaling.figures import views
from saescale.scaling.figures.palette import GRID, INK, PAGE, RULE, SOFT, colour, mark
from saescale.scaling.figures.views import Band, Label, Line, Points, Rule, View, spread

FORMATS = ("png", "pdf", "svg")
_WIDTH, _HEIGHT = 6.6, 4.4  # inches
_TEXT = 9.5  # points
_STYLE: dict[Any, Any] = {
    "font.size": _TEXT,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": INK[0],
    "axes.labelcolor": INK[0],
    "xtick.color": INK[0],
    "ytick.color": INK[0],
    "axes.axisbelow": True,
    "savefig.dpi": 200,
    "mathtext.fontset": "dejavusans",
    # Text stays text where a typesetter or a reader may want to change or search it.
    "pdf.fonttype": 42,
    # The same figure has the same bytes.
    "svg.hashsalt": "saescale",
}
_MARKS: dict[str, Any] = {
    "circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v", "triangle-left": "<",
    "triangle-right": ">", "diamond": "D", "diamond-tall": "d", "pentagon": "p", "hexagon": "h", "hexagon2": "H",
    "star": "*", "x": "X", "cross": "P", "star-diamond": (4, 1, 0), "hexagram": (6, 1, 0),
}  # fmt: skip
# Look larger, and smaller, than the others of one size.
_LARGE, _SMALL = ("o", "s", "D", "X"), ("*", (4, 1, 0), (6, 1, 0))
_STROKES: dict[views.Stroke, dict[str, Any]] = {
    "law": {"lw": 1.6, "zorder": 2.4},
    "curve": {"lw": 0.7, "alpha": 0.5, "zorder": 2},
    "frontier": {"lw": 2.6, "zorder": 2.6},
    "through": {"lw": 1.0, "ls": (0, (1, 1.6)), "zorder": 2.2},
    "other": {"lw": 1.1, "ls": (0, (4, 2.2)), "zorder": 2.8},
    "reference": {"lw": 1.1, "ls": (0, (4, 2.2)), "zorder": 2.3},
}


def draw(view: View) -> dict[str, bytes]:
    """The view as a file of each of FORMATS, by format. Deterministic for one version of matplotlib."""
    return drawn(lambda figure: _fill(figure, view))


def drawn(fill: Callable[[Figure], None], width: float = _WIDTH, height: float = _HEIGHT) -> dict[str, bytes]:
    """What `fill` draws on an empty figure of that size (inches), in saescale's style, as `draw` gives a view."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # without what the user's matplotlibrc says
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        fill(figure)
        # Dates and versions would make other bytes of the same picture.
        metadata: dict[str, dict[str, Any]] = {
            "png": {"Software": "saescale"},
            "pdf": {"CreationDate": None, "Creator": "saescale", "Producer": None},
            "svg": {"Date": None, "Creator": "saescale"},
        }
        files = {}
        for kind in FORMATS:
            buffer = BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata[kind])
            files[kind] = buffer.getvalue()
    return files


def _fill(figure: Figure, view: View) -> None:
    labels = view.labels
    longest = max((len(_plain(label.text)) for label in labels), default=0)
    right = 0.045 + 0.0122 * longest if labels else 0.03
    bottom = 0.13 + 0.047 * len(view.formula) + (0.012 if view.formula else 0)
    left = 0.115 + 0.011 * max(0, max(len(text) for _, text in view.y.ticks) - 4)
    axes = figure.add_axes((left, bottom, 1 - left - right, 0.97 - bottom))
    for axis, spec, scale in ((axes.xaxis, view.x, axes.set_xscale), (axes.yaxis, view.y, axes.set_yscale)):
        scale(spec.scale)
        axis.set_major_locator(FixedLocator([place for place, _ in spec.ticks]))
        axis.set_major_formatter(FixedFormatter([_raised(text) for _, text in spec.ticks]))
        axis.set_minor_locator(FixedLocator(list(spec.minor)))
        axis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="major", color=GRID[0], lw=0.6)
    axes.set_xlim(view.x.low, view.x.high)
    axes.set_ylim(view.y.low, view.y.high)
    axes.set_xlabel(view.x.label)
    axes.set_ylabel(view.y.label)
    for layer in view.layers:
        _draw(axes, layer, view)
    _write_labels(axes, labels, view)
    for i, line in enumerate(reversed(view.formula)):
        figure.text(0.5, 0.028 + 0.047 * i, _italic(line), ha="center", va="center", fontsize=8.5, color=INK[0])


def _draw(axes: Axes, layer: views.Layer, view: View) -> None:
    if isinstance(layer, Rule):
        if layer.x is not None:
            axes.axvline(layer.x, color=RULE[0], lw=1.0, zorder=1.5)
        elif layer.y is None:
            axes.axline((view.x.low, view.x.low), (view.x.high, view.x.high), color=RULE[0], lw=1.0, zorder=1.5)
        else:
            axes.axhline(layer.y, color=RULE[0], lw=1.0, zorder=1.5)
        return
    if isinstance(layer, Label):
        if layer.where != "margin":
            text = _deeper(colour(layer.level, view.levels, ramp=view.ramp))
            down = 0 if layer.where == "row" else -7
            axes.annotate(_raised(layer.text), xy=(layer.x, layer.y), xytext=(7, down), textcoords="offset points",
                          color=text, va="center", ha="left", zorder=3)  # fmt: skip
        return
    shade = colour(layer.level, view.levels, ramp=view.ramp)
    if isinstance(layer, Band):
        axes.fill_between(layer.x, layer.low, layer.high, color=shade, alpha=0.16, lw=0, zorder=1.8)
    elif isinstance(layer, Line):
        axes.plot(layer.x, layer.y, color=INK[0] if layer.stroke == "other" else shade, **_STROKES[layer.stroke])
    elif isinstance(layer, Points):
        hollow = layer.marker == "open"
        if layer.low is not None and layer.high is not None:
            axis = view.x if layer.across else view.y
            # An open end lies beyond the axes.
            low = np.where(np.isnan(layer.low), axis.value(-1.0), layer.low)
            high = np.where(np.isnan(layer.high), axis.value(2.0), layer.high)
            bars, place = (axes.hlines, layer.y) if layer.across else (axes.vlines, layer.x)
            bars(place, low, high, color=shade, lw=1.2, zorder=2.7)
        shape = _MARKS[mark(layer.level, view.levels)]
        size = 5.5 if shape in _LARGE else 9.0 if shape in _SMALL else 7.0
        axes.plot(layer.x, layer.y, marker=shape, ls="none", ms=size, color=PAGE[0] if hollow else shade,
                  mec=shade if hollow else PAGE[0],
                  mew=1.3 if hollow else 0.7, clip_on=False, zorder=3)  # fmt: skip


def _write_labels(axes: Axes, labels: list[Label], view: View) -> None:
    """Labels right of the axes, moved apart where they would overlap, each with a line from what it names."""
    height = axes.get_position().height * _HEIGHT
    places = spread([view.y.fraction(label.y) for label in labels], gap=_TEXT * 1.25 / 72 / height)
    for label, place in zip(labels, places, strict=True):
        shade = colour(label.level, view.levels, ramp=view.ramp)
        axes.annotate(
            _raised(label.text), xy=(label.x, label.y), xycoords="data", xytext=(1.03, place),
            textcoords="axes fraction", color=_deeper(shade) if label.level is not None else SOFT[0], va="center",
            ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "lw": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def _deeper(shade: str) -> tuple[float, float, float]:
    """A colour of lines made dark enough for text."""
    red, green, blue = (0.78 * int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _plain(text: str) -> str:
    return text.replace("^", "")


def _raised(text: str) -> str:
    """Powers as matplotlib's mathtext writes them: "2×10^12", "C^−a"."""
    return re.sub(r"(?:(\d(?:\.\d)?)×)?(\w+)\^([−\w]+)", _power, text)


def _power(match: re.Match[str]) -> str:
    factor, base, power = match.groups()
    return (rf"${factor}\times" if factor else "$") + rf"{base}^{{{power.replace('−', '-')}}}$"


def _italic(line: str) -> str:
    """Formulas with their symbols as mathematics; the intervals of coefficients stay plain numbers."""
    line = re.sub(r"([αβγζη])_([kn])", r"$\1_\2$", line)
    return _raised(line)
