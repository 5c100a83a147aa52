"""The figure of which latents carry the reconstruction: energy by frequency of activation."""

import numpy as np
import pyarrow as pa

from saescale.scaling.figures.axes import linear_axis, power_axis
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
    thin: list[Layer] = []
    thick: list[Layer] = []
    seen, rarest = [], 1.0
    ordered = sorted(rows, key=lambda row: (results["k"][row], results["n_latents"][row]))
    for row in (ordered[place] for place in thinned(len(ordered))):
        x, y = _line(energies[str(ids[row])])
        thin.append(Line(x, y, float(results["k"][row]), "curve", _words(laws, row)))
    for k in ks_of(laws):
        own = [row for row in ordered if results["k"][row] == k]
        if not own:
            continue
        cell = str(ids[own[-1]])
        bins = energies[cell]
        x, y = _line(bins)
        low, high = (
            np.array([100 * (np.nan if of[end] is None else of[end]) for of in bins.values()]) for end in (1, 2)
        )
        texts = [f"{_words(laws, own[-1])}<br>{share:.1f} % of the energy" for share in y]
        thick += [Line(x, y, k, "frontier", _words(laws, own[-1])), Points(x, y, k, texts, low, high)]
        if cell in latents:
            x_latents, of_latents = _line(latents[cell])
            thick.append(Line(x_latents, of_latents, k, "other", f"latents, {_words(laws, own[-1])}"))
            seen.append(of_latents)
            rarest = min(rarest, float(x_latents[of_latents > 0].min(initial=1.0)))
        peak = int(np.argmax(y))
        thick.append(Label(float(x[peak]), float(y[peak]), f"k = {k:g}", k, beside=True))
        seen.append(y)
        rarest = min(rarest, float(x[y > 0.05].min(initial=1.0)))
    return View(
        "energy_by_frequency", "Which latents carry the reconstruction",
        "Share of the energy of the latents (the sum of their squares, decoder directions of length 1) that comes from "
        "latents of each frequency of activation, in bins of half a decade. Most latents are rare; what they carry "
        "together may be little." + how_thinned(len(ordered)),
        "Thick: the largest cell at each k, with 95 % intervals. Thin: all cells. Dashed: the share of the latents "
        "themselves, of the same largest cells.",
        power_axis("Frequency of activation (share of held-out tokens)", rarest / 2, 1.0),
        linear_axis("Share of the energy (%)", np.concatenate(seen), zero=True),
        tuple(ks_of(laws)), (*thin, *thick),
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


def _words(laws: Laws, row: int) -> str:
    return f"N = {laws.results['n_latents'][row]:,.0f}, k = {laws.results['k'][row]:g}"
