"""The figure of which latents carry the reconstruction: energy by frequency of activation."""

import numpy as np
import pyarrow as pa

from saescale.scaling.figures.axes import linear_axis, log_axis
from saescale.scaling.figures.views import Label, Layer, Line, Points, View, how_thinned, thinned
from saescale.scaling.figures.views_cells import ks_of
from saescale.scaling.laws.fit import Laws

_Bins = dict[float, tuple[float, float | None, float | None]]  # value, low, high by log10 of the middle


def energy_by_frequency(laws: Laws, evals: pa.Table | None) -> View | None:
    """The share of energy at each frequency of activation, of every cell, and of the largest at each k the share of
    latents beside it. None where the evaluation `density` was not measured."""
    energies, latents = _by_bin(evals, "density", "energy"), _by_bin(evals, "core", "frequency")
    results = laws.results
    rows = [row for row, cell in enumerate(results.columns.get("cell_id", ())) if str(cell) in energies]
    if not rows:
        return None
    ids = results["cell_id"]
    ordered = sorted(rows, key=lambda row: (results["k"][row], results["n_latents"][row]))
    largest = {float(results["k"][row]): row for row in ordered}
    # A bin below the first with half a per cent; what is rarer is nothing that could be seen.
    everything = [_line(energies[str(ids[row])]) for row in ordered]
    rarest = min(float(x[y > 0.5].min()) for x, y in everything) / 4
    layers: list[Layer] = []
    for place in thinned(len(ordered)):
        (x, y), row = everything[place], ordered[place]
        there = x > rarest
        layers.append(Line(x[there], y[there], float(results["k"][row]), "curve", _words(laws, row)))
    shown = [y for _, y in everything]
    for k, row in largest.items():
        cell, words = str(ids[row]), _words(laws, row)
        if cell in latents:
            x, y = _line(latents[cell])
            layers.append(Line(x[x > rarest], y[x > rarest], k, "through", f"latents, {words}"))
            shown.append(y)
        x, y = _line(energies[cell])
        low, high = (
            np.array([100 * (np.nan if end is None else end) for end in _ends(energies[cell], i)]) for i in (1, 2)
        )
        there = x > rarest
        texts = [f"{words}<br>{share:.1f} % of the energy" for share in y[there]]
        layers += [
            Line(x[there], y[there], k, "frontier", words),
            Points(x[there], y[there], k, texts, low[there], high[there]),
            Label(float(x[np.argmax(y)]), float(y.max()), f"k = {k:g}", k, beside=True),
        ]
    return View(
        "energy_by_frequency", "Which latents carry the reconstruction",
        "Share of the energy of the latents (the sum of their squares, decoder directions of length 1) that comes from "
        "latents of each frequency of activation, in bins of half a decade." + how_thinned(len(ordered)),
        "Thick: the largest cell at each k, with 95 % intervals. Thin: all cells. Dotted: the share of the latents "
        "themselves, of the same largest cells.",
        log_axis("Frequency of activation (share of held-out tokens)", np.array([rarest, 1.0])),
        linear_axis("Share of the energy (%)", np.concatenate(shown), zero=True),
        tuple(ks_of(laws)), tuple(layers),
    )  # fmt: skip


def _by_bin(evals: pa.Table | None, evaluation: str, metric: str) -> dict[str, _Bins]:
    """The values of a histogram of each cell, from bins that are named as "1e-2 to 1e-1.5"."""
    found: dict[str, _Bins] = {}
    for row in [] if evals is None else evals.to_pylist():
        if row["evaluation"] == evaluation and row["metric"] == metric and row["value"] is not None:
            low, high = (float(end.strip().removeprefix("1e")) for end in row["at"].split("to"))
            found.setdefault(row["cell_id"], {})[(low + high) / 2] = row["value"], row["low"], row["high"]
    return found


def _line(bins: _Bins) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in the middle of the bins, and shares in per cent."""
    places = np.array(sorted(bins))
    return 10.0**places, np.array([100 * bins[place][0] for place in places.tolist()])


def _ends(bins: _Bins, end: int) -> list[float | None]:
    return [bins[place][end] for place in sorted(bins)]


def _words(laws: Laws, row: int) -> str:
    return f"N = {laws.results['n_latents'][row]:,.0f}, k = {laws.results['k'][row]:g}"
