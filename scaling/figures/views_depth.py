"""Figures of laws over the depth of the subject: exponents and floors of each layer."""

from collections.abc import Sequence

import numpy as np

from saescale.scaling.comparison.depth import AtDepth, Quantity
from saescale.scaling.figures.axes import linear_axis
from saescale.scaling.figures.views import Axis, Label, Layer, Level, Line, Points, View

_TITLES: dict[Quantity, tuple[str, str]] = {
    "exponent": ("Exponent of n over depth", "Exponent of n"),
    "floor": ("Floor of nmse over depth", "Irreducible nmse"),
}


def views_of_depth(found: Sequence[AtDepth]) -> list[View]:
    """The exponent and the floor over layers; [] where there are no laws of two layers."""
    return [over_layers(found, quantity) for quantity in _TITLES] if found else []


def over_layers(found: Sequence[AtDepth], quantity: Quantity) -> View:
    """A line for each k where there is one subject and one architecture; else for each of these, at the k in the
    middle."""
    own = [entry for entry in found if entry.quantity == quantity]
    named = sorted({_who(entry, own) for entry in own})
    ks = sorted({entry.k for entry in own})
    middle = ks[len(ks) // 2]
    lines: dict[Level, list[AtDepth]] = {}
    for entry in own:
        if len(named) == 1:
            lines.setdefault(entry.k, []).append(entry)
        elif entry.k == middle:
            lines.setdefault(_who(entry, own), []).append(entry)
    step = float(np.diff(sorted({entry.layer for entry in own})).min())
    layers: list[Layer] = []
    values = [entry.value.value for entries in lines.values() for entry in entries]
    reach = 1.5 * (max(values) - min(values)) or abs(max(values))
    shown = list(values)
    for i, (level, entries) in enumerate(lines.items()):
        entries.sort(key=lambda entry: entry.layer)
        # Side by side, else the intervals of one layer would cover each other.
        aside = 0.12 * step * (i - (len(lines) - 1) / 2) / max(len(lines) / 4, 1)
        x = np.array([entry.layer for entry in entries]) + aside
        y = np.array([entry.value.value for entry in entries])
        label = f"k = {level:g}" if isinstance(level, float) else level
        low, high = (np.array([np.nan if end is None else end for end in ends])
                     for ends in ([e.value.low for e in entries], [e.value.high for e in entries]))  # fmt: skip
        texts = [f"layer {e.layer:g}, {label}<br>{e.value.value:.3f}{_ends(e)}<br>by "
                 f"{'L(N, k)' if e.law == 'n_k' else 'L(N) at this k'}".replace("-", "−") for e in entries]  # fmt: skip
        there = np.isfinite(low) | np.isfinite(high)
        layers.append(Line(x, y, level, "through", label))
        layers.append(Points(x, y, level, texts, low if there.any() else None, high if there.any() else None))
        layers.append(Label(float(x[-1]), float(y[-1]), label, level))
        # Loose intervals may leave the axes, but must not squeeze the rest.
        shown += [*np.maximum(low, min(values) - reach), *np.minimum(high, max(values) + reach)]
    title, axis = _TITLES[quantity]
    at = "" if len(named) == 1 else f" at k = {middle:g}"
    levels: tuple[Level, ...] = tuple(ks) if len(named) == 1 else tuple(named)
    return View(
        f"depth_{quantity}", title + at,
        f"{axis} in the law of each layer{at}, with 95 % intervals. Exponent and floor of one fit trade off against "
        "each other: where both move from layer to layer, look whether only one of them has to.",
        "Points: laws of one layer each. Dotted lines join them.",
        _layers([entry.layer for entry in own], step), linear_axis(axis, shown), levels, tuple(layers),
        ramp="k" if len(named) == 1 else "name",
    )  # fmt: skip


def _who(entry: AtDepth, among: Sequence[AtDepth]) -> str:
    """The architecture and the subject of a line, of these what differs."""
    parts = [name for name in ("architecture", "subject") if len({getattr(e, name) for e in among}) > 1]
    return " of ".join(filter(None, (getattr(entry, name) for name in parts)))


def _layers(layers: Sequence[float], step: float) -> Axis:
    there = sorted(set(layers))
    ticks = there[:: -(-len(there) // 13)]
    return Axis("Layer", "linear", there[0] - 0.6 * step, there[-1] + 0.6 * step, tuple((t, f"{t:g}") for t in ticks))


def _ends(entry: AtDepth) -> str:
    low, high = entry.value.low, entry.value.high
    if low is None and high is None:
        return ""
    return f" [{'open' if low is None else f'{low:.3f}'}, {'open' if high is None else f'{high:.3f}'}]"
