"""Figures of the cells themselves: nmse against N, what the law leaves over, dead latents."""

from collections.abc import Sequence

import numpy as np

from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis
from saescale.scaling.figures.views import Band, Label, Layer, Line, Points, Rule, View, how_thinned, thinned
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.fit import Laws
from saescale.scaling.laws.forms.n_k import N_K
from saescale.scaling.levels import measured_k
from saescale.scaling.tables import Table, number
from saescale.storage.columns import COLUMNS

N_LABEL, NMSE_LABEL, DEAD_LABEL = (COLUMNS[name].title for name in ("n_latents", "nmse", "dead_fraction"))
_BAND = 1.5
_SYMBOLS = {"beta_k": "β_k", "beta_n": "β_n", "alpha": "α", "gamma": "γ", "zeta": "ζ", "eta": "η"}
_N_K_FORMULA = "exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)"


def nmse_against_n(laws: Laws, what: str = "nmse", label: str = NMSE_LABEL) -> View:
    """Every cell's held-out nmse, one colour per k, with L(N, k) or, without it, L(N) at each k.

    `what`: what laws call the column nmse where it holds another quantity, and `label` what its axis does.
    """
    results, joint, at_k = laws.results, joint_fit(laws), one_form(laws, "n")
    layers: list[Layer] = []
    shown = [results["nmse"]]
    n = np.geomspace(results["n_latents"].min(), results["n_latents"].max(), 60)
    for k in ks_of(laws):
        own = results["k"] == k
        fit = joint or at_k.get(k)
        name = f"k = {k:g}"
        if fit is not None:
            columns = {"n_latents": n, "k": np.full_like(n, k)}
            line = fit.predict({c: columns[c] for c in fit.law.columns})
            if np.isfinite(line.low).all():
                layers.append(Band(n, line.low, line.high, k))
                shown += [line.low, line.high]
            layers.append(Line(n, line.value, k, "law", f"law at k = {k:g}"))
            if fit is not joint:
                name += f" (a = {fit.law.to_reported(fit.raw)[1]:.3f})"
        else:
            order = np.argsort(results["n_latents"][own])
            layers.append(Line(results["n_latents"][own][order], results["nmse"][own][order], k, "through"))
        layers.append(Points(results["n_latents"][own], results["nmse"][own], k, cell_texts(results, own, what)))
        last = int(np.argmax(np.where(own, results["n_latents"], -1)))
        layers.append(Label(float(results["n_latents"][last]), float(results["nmse"][last]), name, k))
    # Bands may be as wide as they like, but must not squeeze the cells together.
    least, most = results["nmse"].min() / _BAND, results["nmse"].max() * _BAND
    if joint:
        formula = (f"{what} = {_N_K_FORMULA}", *_coefficients(joint))
        key = "Points: cells. Lines: the law L(N, k), fitted to all of them at once. Shaded: its 95 % interval."
    elif at_k:
        floor = " + E" if any(fit.law.has_floor for fit in at_k.values()) else ""
        formula = (f"{what} = A n^−a{floor} at each k",)
        key = "Points: cells. Lines: the law L(N) at each k. Shaded: its 95 % interval."
    else:
        formula = ("No law fitted (the report says why)",)
        key = "Points: cells. Dotted lines join the cells of one k; no law is fitted."
    return View(
        "nmse_against_n", "nmse against the number of latents",
        "Held-out nmse of every cell against the number of latents N.", key,
        count_axis(N_LABEL, results["n_latents"]),
        log_axis(label, np.clip(np.concatenate(shown), least, most)),
        tuple(ks_of(laws)), tuple(layers), formula,
    )  # fmt: skip


def residuals(laws: Laws) -> View | None:
    """What the law leaves over at every cell, in per cent of nmse. None where no law in N is fitted."""
    results, joint, at_k = laws.results, joint_fit(laws), one_form(laws, "n")
    if joint is None and not at_k:
        return None
    ks = ks_of(laws)
    layers: list[Layer] = [Rule(0.0)]
    everything = []
    for i, k in enumerate(ks):
        own, fit = results["k"] == k, joint or at_k.get(k)
        if fit is None:
            continue
        at = {"n_latents": results["n_latents"], "k": measured_k(results)}
        predicted = fit.predict({c: at[c][own] for c in fit.law.columns}).value
        left = 100 * (results["nmse"][own] / predicted - 1)
        # Side by side, else the k of one N would cover each other.
        x = results["n_latents"][own] * 1.035 ** (i - (len(ks) - 1) / 2)
        order = np.argsort(x)
        layers.append(Line(x[order], left[order], k, "through"))
        texts = [f"{t}<br>law {p:.4f}, {d:+.2f} %" for t, p, d in zip(cell_texts(results, own), predicted, left,
                                                                      strict=True)]  # fmt: skip
        layers.append(Points(x, left, k, texts))
        layers.append(Label(float(x[order][-1]), float(left[order][-1]), f"k = {k:g}", k))
        everything.append(left)
    which = "L(N, k)" if joint else "L(N) at each k"
    return View(
        "residuals", "What the law leaves over",
        f"Measured nmse above (+) or below (−) the law {which}, in per cent. A bend that all k share says that the "
        "form is wrong, scatter that the cells are noisy.",
        "Points: cells; those of one N stand side by side.",
        count_axis(N_LABEL, results["n_latents"], room=1.2),
        linear_axis("Measured above the law (%)", np.concatenate(everything), symmetric=True),
        tuple(ks), tuple(layers),
    )  # fmt: skip


def dead_fraction(laws: Laws) -> View | None:
    """Dead latents at the end of training against N. None without the column dead_fraction."""
    results = laws.results
    if "dead_fraction" not in results or not np.isfinite(results["dead_fraction"]).all():
        return None
    layers: list[Layer] = []
    for k in ks_of(laws):
        own = results["k"] == k
        sizes = np.unique(results["n_latents"][own])
        means = np.array([100 * results["dead_fraction"][own & (results["n_latents"] == n)].mean() for n in sizes])
        layers.append(Line(sizes, means, k, "through"))
        layers.append(Points(results["n_latents"][own], 100 * results["dead_fraction"][own], k,
                             cell_texts(results, own)))  # fmt: skip
        layers.append(Label(float(sizes[-1]), float(means[-1]), f"k = {k:g}", k))
    shown = np.append(100 * results["dead_fraction"], 1.0)
    return View(
        "dead_fraction", "Dead latents",
        "Share of latents that are dead at the end of training. Above about 10 % the effective N is smaller than N, "
        "which flattens the law.",
        "Points: cells.",
        count_axis(N_LABEL, results["n_latents"]), linear_axis(f"{DEAD_LABEL} (%)", shown, zero=True),
        tuple(ks_of(laws)), tuple(layers),
    )  # fmt: skip


def dead_over_training(laws: Laws, curves: Table | None) -> View | None:
    """Dead latents of every cell during training. None without curves that tell."""
    if curves is None or not {"cell_id", "tokens", "dead_fraction"} <= set(curves.columns):
        return None
    if "cell_id" not in laws.results:
        return None
    results = laws.results
    lines: list[Layer] = []
    seen, furthest = [np.array([1.0])], 0.0
    ends: dict[float, tuple[float, float, float]] = {}
    usable = np.isfinite(curves["dead_fraction"]) & np.isfinite(curves["tokens"])
    of_cell = curves.rows_of("cell_id")
    for row in np.lexsort([results["n_latents"], results["k"]]):
        own = of_cell.get(results["cell_id"][row].item())
        if own is None or (own := own[usable[own]]).size < 2:
            continue
        own = own[np.argsort(curves["tokens"][own])]
        tokens, dead = curves["tokens"][own], 100 * curves["dead_fraction"][own]
        k = float(results["k"][row])
        lines.append(Line(tokens / 1e6, dead, k, "curve", f"N = {results['n_latents'][row]:,.0f}, k = {k:g}"))
        seen.append(dead)
        furthest = max(furthest, float(tokens[-1]) / 1e6)
        ends[k] = max(ends.get(k, (0.0, 0.0, 0.0)), (float(dead[-1]), float(tokens[-1]) / 1e6, float(dead[-1])))
    if not lines:
        return None
    layers = [lines[i] for i in thinned(len(lines))]
    layers += [Label(x, y, f"k = {k:g}", k) for k, (_, x, y) in ends.items()]
    return View(
        "dead_over_training", "Dead latents during training",
        "Share of latents that are dead as training goes on. A curve that still rises has not settled."
        + how_thinned(len(lines)),
        "Lines: cells, labelled at each k by the one that ends highest.",
        linear_axis(f"{COLUMNS['tokens'].title} (millions)", [0.0, furthest], zero=True),
        linear_axis(f"{DEAD_LABEL} (%)", np.concatenate(seen), zero=True),
        tuple(ks_of(laws)), tuple(layers),
    )  # fmt: skip


def ks_of(laws: Laws) -> list[float]:
    """Every k of the cells, each once, the smallest first."""
    return [float(k) for k in np.unique(laws.results["k"])]


def nearest_k(ks: Sequence[float], value: float) -> float:
    """The k that a measured number of active latents was meant to be, by ratio."""
    return min(ks, key=lambda k: abs(np.log(k / value)))


def joint_fit(laws: Laws) -> Fit | None:
    """The fit of L(N, k)."""
    return next((fit for fit in laws.fits if fit.law.name == N_K.name), None)


def one_form(laws: Laws, name: str) -> dict[float, Fit]:
    """The fits of law `name` by k, all of one form so that their exponents compare: with the floor where its
    held-out error is the smaller on average, else without."""
    by_form: dict[str, dict[float, Fit]] = {}
    for fit in laws.fits:
        if fit.law.name == name and set(fit.at) == {"k"}:
            by_form.setdefault(fit.law.formula, {})[fit.at["k"]] = fit
    forms = list(by_form.values())
    complete = [form for form in forms if len(form) == max(map(len, forms))]
    return min(complete, key=_held_out_error) if complete else {}


def cell_texts(results: Table, own: np.ndarray, what: str = "nmse") -> list[str]:
    """What a reader sees on pointing at a cell; lines apart by <br>."""
    texts = []
    for row in np.flatnonzero(own):
        lines = [
            f"N = {results['n_latents'][row]:,.0f}, k = {results['k'][row]:g}",
            f"{what} {results['nmse'][row]:.4f}",
        ]
        if "dead_fraction" in results:
            lines.append(f"dead {results['dead_fraction'][row]:.2%}")
        if "tokens" in results:
            lines.append(f"{number(results['tokens'][row])} tokens")
        texts.append("<br>".join(lines))
    return texts


def _held_out_error(form: dict[float, Fit]) -> float:
    errors = [float(str(fit.holdout["rms_log_error"])) if fit.holdout else np.inf for fit in form.values()]
    return float(np.mean(errors))


def _coefficients(fit: Fit) -> list[str]:
    """The coefficients with intervals, three to a line."""
    texts = []
    for name, value in fit.coefficients().items():
        text = f"{_SYMBOLS.get(name, name)} = {value['value']:.3f}"
        if value["low"] is not None:
            text += f" [{value['low']:.3f}, {value['high']:.3f}]"
        texts.append(text.replace("-", "−"))
    return ["    ".join(texts[i : i + 3]) for i in range(0, len(texts), 3)]
