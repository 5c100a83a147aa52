"""Views as Plotly figures: plain JSON, the same for the page, for W&B and for a notebook (plotly.io.from_json).

No import of plotly: nothing here needs its Python side, and it takes half a second.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from saescale.scaling.figures import views
from saescale.scaling.figures.palette import GRID, INK, NEUTRALS, PAGE, RULE, SOFT, colour, glyph, mark, translucent
from saescale.scaling.figures.views import Band, Label, Line, Points, Rule, View, spread

Spec = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
_HEIGHT = 440  # pixels
_MARGIN = {"t": 28, "b": 56}
_LETTER = 7.0  # pixels a letter of a label takes
_ALPHA = 0.16
_STROKES: dict[views.Stroke, Spec] = {
    "law": {"width": 2},
    "curve": {"width": 1},
    "frontier": {"width": 3.5},
    "through": {"width": 1.2, "dash": "dot"},
    "other": {"width": 1.5, "dash": "dash"},
    "reference": {"width": 1.5, "dash": "dash"},
}


def plot(view: View) -> Spec:
    """The view as Plotly's {"data", "layout"} in the colours of a white page.

    Traces of one k, or of one name, share `legendgroup`, and have it as `meta.k` or `meta.name`, so that they are shown
    and hidden together.
    """
    data: list[Spec] = []
    named: set[views.Level] = set()
    for layer in view.layers:
        for trace in _traces(layer, view):
            level = None if isinstance(layer, Rule) else layer.level
            if view.ramp != "compute" and level is not None:
                trace |= _of_level(level)
                shown = Line | Points if view.ramp == "name" else Line
                if isinstance(layer, shown) and level not in named:
                    named.add(level)
                    trace |= {"name": level if isinstance(level, str) else f"k = {level:g}", "showlegend": True}
            data.append(trace)
    data += _labels(view)
    return {"data": data, "layout": _layout(view)}


def theme(ks: tuple[float, ...], others: Iterable[View] = ()) -> dict[str, str]:
    """What each colour of a light page becomes on a dark one."""
    pairs = dict(NEUTRALS)
    ramps: list[tuple[tuple[views.Level, ...], views.Ramp]] = [(ks, "k")]
    ramps += [(view.levels, view.ramp) for view in others]
    for values, ramp in ramps:
        for value in values:
            pairs[colour(value, values, ramp=ramp)] = colour(value, values, dark=True, ramp=ramp)
    bands = {translucent(light, _ALPHA): translucent(dark, 1.4 * _ALPHA) for light, dark in pairs.items()}
    return pairs | bands


def _traces(layer: views.Layer, view: View) -> list[Spec]:
    base: Spec = {"type": "scatter", "showlegend": False}
    if isinstance(layer, Label):
        return [_text(layer, layer.x, layer.y, "bottom right", view, "\u2002")] if layer.beside else []
    if isinstance(layer, Rule):
        x = [view.x.low, view.x.high] if layer.x is None else [layer.x, layer.x]
        y = [view.y.low, view.y.high] if layer.x is not None else x if layer.y is None else [layer.y, layer.y]
        return [base | {"x": x, "y": y, "mode": "lines", "line": {"color": RULE[0], "width": 1}, "hoverinfo": "skip"}]
    shade = colour(layer.level, view.levels, ramp=view.ramp)
    if isinstance(layer, Band):
        # One outline there and back, which hides and shows as one.
        outline = {"x": [*layer.x.tolist(), *layer.x[::-1].tolist()],
                   "y": [*layer.low.tolist(), *layer.high[::-1].tolist()]}  # fmt: skip
        return [base | outline | {"mode": "lines", "line": {"width": 0, "color": shade}, "fill": "toself",
                                  "fillcolor": translucent(shade, _ALPHA), "hoverinfo": "skip"}]  # fmt: skip
    place = base | {"x": layer.x.tolist(), "y": layer.y.tolist()}
    if isinstance(layer, Line):
        line = _STROKES[layer.stroke] | {"color": INK[0] if layer.stroke == "other" else shade}
        hover = {"hoverinfo": "skip"} if layer.stroke == "through" or not layer.text else {
            "hovertemplate": f"{_raised(layer.text)}<br>%{{y:.4g}}<extra></extra>"}  # fmt: skip
        return [place | {"mode": "lines", "line": line, "opacity": 0.55 if layer.stroke == "curve" else 1} | hover]
    hollow = layer.marker == "open"
    shape = mark(layer.level)
    size = 11 if shape.startswith(("triangle", "star", "cross")) else 8  # of one size those look smaller
    marker = {"size": size, "symbol": shape, "color": PAGE[0] if hollow else shade,
              "line": {"width": 2 if hollow else 1, "color": shade if hollow else PAGE[0]}}  # fmt: skip
    trace = place | {"mode": "markers", "marker": marker, "cliponaxis": False}
    if layer.texts:
        trace |= {"text": [_raised(text) for text in layer.texts], "hovertemplate": "%{text}<extra></extra>"}
    if layer.low is not None and layer.high is not None:
        middle, axis = (layer.x, view.x) if layer.across else (layer.y, view.y)
        # An open end lies beyond the axes.
        low = np.where(np.isnan(layer.low), axis.value(-1.0), layer.low)
        high = np.where(np.isnan(layer.high), axis.value(2.0), layer.high)
        trace["error_x" if layer.across else "error_y"] = {
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": shade,
            "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(),
        }  # fmt: skip
    return [trace]


def _labels(view: View) -> list[Spec]:
    """The names of lines right of the axes: traces, since these hide with their k, and annotations do not."""
    labels = view.labels
    height = _HEIGHT - _MARGIN["t"] - _MARGIN["b"]
    places = spread([view.y.fraction(label.y) for label in labels], gap=18 / height)
    traces = []
    edge = view.x.value(1 - 1e-9)  # what lies beyond the end of an axis by rounding alone Plotly does not draw
    for label, place in zip(labels, places, strict=True):
        # A name with its mark, since no line leads from a label to what it names.
        before = f"{glyph(label.level)} " if isinstance(label.level, str) else ""
        trace = _text(label, edge, view.y.value(place), "middle right", view, before)
        if view.ramp != "compute" and label.level is not None:
            trace |= _of_level(label.level)
        traces.append(trace)
    return traces


def _of_level(level: views.Level) -> Spec:
    if isinstance(level, str):
        return {"legendgroup": level, "meta": {"name": level}}
    return {"legendgroup": f"k{level:g}", "meta": {"k": level}}


def _text(label: Label, x: float, y: float, position: str, view: View, before: str = "") -> Spec:
    font = {"color": colour(label.level, view.levels, ramp=view.ramp), "size": 12}
    return {
        "type": "scatter", "mode": "text", "x": [x], "y": [y], "text": [before + _raised(label.text)],
        "textfont": font,
        "textposition": position, "cliponaxis": False, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _layout(view: View) -> Spec:
    longest = max((len(re.sub(r"\^", "", label.text)) for label in view.labels), default=0)
    widest = max(len(text) for _, text in view.y.ticks)
    return {
        "xaxis": _axis(view.x), "yaxis": _axis(view.y), "height": _HEIGHT,
        "margin": {"l": max(66, 40 + _LETTER * widest), **_MARGIN,
                   "r": (28 if view.ramp == "name" else 16) + _LETTER * longest},
        "font": {"family": FONT, "size": 13, "color": INK[0]},
        "paper_bgcolor": PAGE[0], "plot_bgcolor": PAGE[0],
        "hoverlabel": {"bgcolor": PAGE[0], "bordercolor": RULE[0],
                       "font": {"family": FONT, "size": 12, "color": INK[0]}},
        "hovermode": "closest", "hoverdistance": 12, "dragmode": "zoom",
        # Names stand beside what they name, and a dozen of them above the axes would cover these.
        "showlegend": view.ramp != "name",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "groupclick": "togglegroup"},
    }  # fmt: skip


def _axis(axis: views.Axis) -> Spec:
    ends = [axis.low, axis.high]
    return {
        "type": axis.scale, "range": [math.log10(v) for v in ends] if axis.scale == "log" else ends,
        "title": {"text": axis.label, "standoff": 10, "font": {"size": 13}},
        "tickmode": "array", "tickvals": [v for v, _ in axis.ticks], "ticktext": [_raised(t) for _, t in axis.ticks],
        "minor": {"tickmode": "array", "tickvals": list(axis.minor), "ticks": "outside", "ticklen": 3,
                  "tickcolor": RULE[0]},
        "ticks": "outside", "ticklen": 5, "tickcolor": RULE[0], "tickfont": {"size": 12, "color": SOFT[0]},
        "showline": True, "linecolor": RULE[0], "linewidth": 1, "gridcolor": GRID[0], "gridwidth": 1, "zeroline": False,
        "automargin": False, "tickangle": 0,
    }  # fmt: skip


def _raised(text: str) -> str:
    """Powers as HTML: "2×10^12" with the 12 raised."""
    return re.sub(r"\^([−\w]+)", r"<sup>\1</sup>", text)
