"""Figures of the laws: nmse against compute, exponents, what was held out, the profile of the floor, iso-FLOP."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saescale.scaling.figures.axes import count_axis, linear_axis, log_axis, power_axis
from saescale.scaling.figures.views import Band, Label, Layer, Line, Marker, Points, Rule, View, how_thinned, thinned
from saescale.scaling.figures.views_cells import N_LABEL, NMSE_LABEL, joint_fit, ks_of, nearest_k, one_form
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.fit import Laws
from saescale.scaling.laws.forms.c import C_FLOOR
from saescale.scaling.laws.forms.n_k import GPT4
from saescale.storage.columns import COLUMNS

C_LABEL, K_LABEL = COLUMNS["flops"].title, COLUMNS["k"].title
_SLICES = 6


def nmse_against_compute(laws: Laws) -> View | None:
    """Every cell's held-out curve and, at each k, the frontier with its law. None without curves."""
    if not any(laws.curves.values()):
        return None
    frontiers = {f.at["k"]: f for f in laws.frontiers if "k" in f.at}
    of_compute = one_form(laws, "c")
    thin: list[Layer] = []
    thick: list[Layer] = []
    seen, ends = [], []
    everything = [(k, curve) for k, curves in laws.curves.items() for curve in curves]
    for k, curve in (everything[i] for i in thinned(len(everything))):
        text = f"N = {curve.n_latents:,.0f}, k = {k:g}"
        thin.append(Line(curve.flops, np.exp(curve.log_nmse), k, "curve", text))
    for k, curves in laws.curves.items():
        for curve in curves:
            # The first evaluations would stretch the axis over what the laws do not describe.
            seen.append(np.exp(curve.log_nmse[curve.flops >= 0.05 * curve.flops[-1]]))
            ends.append(float(np.exp(curve.log_nmse[-1])))
        if not curves:
            continue
        label = f"k = {k:g}"
        if k in frontiers:
            frontier = frontiers[k]
            thick.append(Line(frontier.flops, frontier.nmse, k, "frontier", f"frontier at k = {k:g}"))
            fit = of_compute.get(k)
            if fit is not None:
                c = np.geomspace(frontier.flops[0], frontier.flops[-1], 40)
                law = fit.predict({"flops": c})
                if np.isfinite(law.low).all():
                    thick.insert(0, Band(c, law.low, law.high, k))
                thick.append(Line(c, law.value, k, "other", f"law at k = {k:g}"))
                label += f" (a = {fit.law.to_reported(fit.raw)[1]:.2f})"
        last = max(curves, key=lambda curve: curve.flops[-1])
        thick.append(Label(float(last.flops[-1]), float(np.exp(last.log_nmse[-1])), label, k))
    values = np.concatenate(seen)
    key = "Thin: the course of every cell."
    if laws.frontiers:
        key += " Thick: the frontier, the lowest nmse that any cell reaches with so much compute."
    formula: tuple[str, ...] = ()
    if of_compute:
        floor = " + E" if C_FLOOR in [fit.law for fit in of_compute.values()] else ""
        key += " Dashed: its law, shaded its 95 % interval."
        formula = (f"nmse = A C^−a{floor} at each k",)
    return View(
        "nmse_against_compute", "nmse against compute",
        "Held-out nmse during training against compute, with the frontier at each k." + how_thinned(len(everything)),
        key,
        power_axis(
            C_LABEL, min(float(c.flops[0]) for _, c in everything), max(float(c.flops[-1]) for _, c in everything)
        ),
        # nmse = 1 is what the mean reconstructs: what lies above is the start of training.
        log_axis(NMSE_LABEL, values if max(ends) > 0.9 else np.minimum(values, 1.0)),
        tuple(ks_of(laws)), (*thin, *thick), formula,
    )  # fmt: skip


def exponents(laws: Laws) -> View | None:
    """The exponent of n at each k with its interval, by L(N, k) and by L(N) at each k alone. None without both."""
    joint, ks, at_k = joint_fit(laws), ks_of(laws), _with_floor(laws)
    if joint is None and not at_k:
        return None
    layers: list[Layer] = []
    shown: list[float] = []
    keys = []
    if joint is not None:
        grid = np.geomspace(min(ks), max(ks), 40)
        of = joint.law.exponent_of
        line = np.array([float(of(joint.raw, "n_latents", {"k": k})) for k in grid])
        published = np.array([GPT4["beta_n"] + GPT4["gamma"] * np.log(k) for k in grid])
        shown += [*line, *published]
        layers += [
            Line(grid, published, None, "reference", "published for GPT-4"),
            Label(float(grid[-1]), float(published[-1]), "GPT-4, published", None),
            Line(grid, line, None, "law", "L(N, k)"),
            Label(float(grid[-1]), float(line[-1]), "L(N, k)", None),
        ]
        if len(joint.draws):
            low, high = joint.spread(line, np.stack([of(joint.draws, "n_latents", {"k": k}) for k in grid], axis=1))
            layers.insert(0, Band(grid, low, high, None))
            shown += [*low, *high]
        for k in ks:
            layers.append(_exponent(k, k, joint.exponent("n_latents", {"k": k}), "filled", "by L(N, k)"))
        keys.append("Filled points and line: by L(N, k), with 95 % intervals.")
    # Looser than the joint fit: they may run out of the axes, but must not squeeze it.
    widest = 1.5 * float(np.ptp(shown)) if joint is not None else np.inf
    floor = any(fit.law.has_floor for fit in at_k.values())
    for k, fit in at_k.items():
        exponent = fit.exponent("n_latents", {})
        layers.append(_exponent(k, 1.06 * k, exponent, "open", "by L(N) at this k alone"))
        value, lowest, highest = _ends(exponent)
        shown += [value, max(lowest, value - widest), min(highest, value + widest)]
    if floor:
        keys.append("Open points: by L(N) with a floor at each k alone.")
    elif at_k:
        keys.append(
            "Open points: by L(N) without a floor at each k alone, the slope of the whole nmse, which is flatter than "
            "that of its reducible part."
        )
    reference = ", beside those published for GPT-4 (Gao et al. 2024)" if joint is not None else ""
    return View(
        "exponents", "Exponent of n at each k",
        f"How steeply the reducible part of nmse falls with n at fixed k{reference}.", " ".join(keys),
        count_axis(K_LABEL, ks, room=1.25), linear_axis("Exponent of n", shown), tuple(ks), tuple(layers),
    )  # fmt: skip


def _with_floor(laws: Laws) -> dict[float, Fit]:
    """The fits of L(N) by k that describe the same as L(N, k), those with a floor; else those without."""
    fits = [fit for fit in laws.fits if fit.law.name == "n" and set(fit.at) == {"k"}]
    floored = [fit for fit in fits if fit.law.has_floor]
    return {fit.at["k"]: fit for fit in floored or fits}


def _exponent(k: float, x: float, exponent: Mapping[str, float | None], marker: Marker, how: str) -> Points:
    value, low, high = _ends(exponent)
    text = f"k = {k:g}<br>{value:.3f} [{low:.3f}, {high:.3f}]<br>{how}".replace("-", "−")
    return Points(np.array([x]), np.array([value]), k, [text], np.array([low]), np.array([high]), marker)


def _ends(interval: Mapping[str, float | None]) -> tuple[float, float, float]:
    """(value, low, high); without a bootstrap all are the value."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    assert value is not None
    return value, value if low is None else low, value if high is None else high


def holdout(laws: Laws) -> View | None:
    """The largest cells, predicted by the law from the others, against what they measured. None without a hold-out."""
    joint = joint_fit(laws)
    found = [joint] if joint is not None and joint.holdout else [f for f in one_form(laws, "n").values() if f.holdout]
    if not found:
        return None
    layers: list[Layer] = [Rule(None)]
    seen: list[float] = []
    within = bounded = 0
    held_out = str((found[0].holdout or {})["held_out"])
    for fit in found:
        rows: Any = (fit.holdout or {})["predictions"]
        for k in ks_of(laws):
            # A measured L0 stands in place of k where k was a target.
            own = [row for row in rows if nearest_k(ks_of(laws), row.get("k", fit.at.get("k"))) == k]
            if not own:
                continue
            measured, predicted, low, high = (_column(own, name) for name in ("measured", "predicted", "low", "high"))
            given = np.isfinite(low).all() and np.isfinite(high).all()
            texts = [f"N = {row['n_latents']:,.0f}, k = {k:g}<br>measured {row['measured']:.4f}<br>predicted "
                     f"{row['predicted']:.4f} ({np.expm1(row['log_error']):+.1%})" for row in own]  # fmt: skip
            layers.append(Points(measured, predicted, k, texts, low if given else None, high if given else None))
            layers.append(Label(float(measured[-1]), float(predicted[-1]), f"k = {k:g}", k, where="below"))
            seen += [*measured, *predicted, *(low if given else ()), *(high if given else ())]
            bounded += len(own) if given else 0
            within += int(((low <= measured) & (measured <= high)).sum()) if given else 0
    covered = f" {within} of {bounded} lie within the interval of their prediction." if bounded else ""
    # Room for the names beside the points.
    x = log_axis("Measured nmse", np.array([*seen, max(seen) * (max(seen) / min(seen)) ** 0.12]))
    return View(
        "holdout", "Predicted against measured",
        f"The cells with {held_out.replace('>=', '≥')}, predicted by the law fitted to all others.{covered}",
        "Points: held-out cells, with the 95 % interval of their prediction. On the diagonal it is exact.",
        x, log_axis("Predicted nmse", np.array(seen)), tuple(ks_of(laws)), tuple(layers),
    )  # fmt: skip


def isoflop(laws: Laws) -> View | None:
    """nmse against N at equal compute, with the minima that the compute-optimal laws are fitted to, at the k with the
    most sizes. None where at no compute three sizes compare."""
    if not laws.isoflops:
        return None
    view = max(laws.isoflops, key=lambda v: (len(v.sizes), len(v.minimum), -v.frontier.at.get("k", 0.0)))
    at = "".join(f", k = {k:g}" for k in view.frontier.at.values())
    # Where there are minima, levels that have one: of the others nothing is fitted.
    among = view.minimum if view.enough else np.arange(len(view.level))
    chosen = np.unique(np.round(np.linspace(0, len(among) - 1, min(_SLICES, len(among)))).astype(int))
    layers: list[Layer] = []
    seen: list[float] = []
    shades = []
    for row in among[chosen]:
        compute = float(view.frontier.grid[view.level[row]])
        there = np.isfinite(view.slices[row])
        sizes, nmse = view.sizes[there], np.exp(view.slices[row][there])
        shades.append(compute)
        layers.append(Line(sizes, nmse, compute, "law", f"{_flops(compute)} FLOPs"))
        texts = [f"N = {n:,.0f}<br>nmse {v:.4f}<br>{_flops(compute)} FLOPs" for n, v in zip(sizes, nmse, strict=True)]
        layers.append(Points(sizes, nmse, compute, texts, marker="open"))
        for i in np.flatnonzero(view.minimum == row):
            n, lowest = view.n_latents[i], view.nmse[i]
            text = f"minimum at N = {n:,.0f}<br>nmse {lowest:.4f}<br>{_flops(compute)} FLOPs"
            layers.append(Points(np.array([n]), np.array([lowest]), compute, [text]))
            seen.append(float(lowest))
        layers.append(Label(float(sizes[-1]), float(nmse[-1]), f"C = {_flops(compute)}", compute))
        seen += nmse.tolist()
    return View(
        "isoflop", f"nmse against N at equal compute{at}",
        f"What each N reaches with the same training compute C{at}, on the frontier's smoothed curves. Where there is "
        "a minimum inside, a smaller and a larger SAE would both do worse with that compute.",
        "Lines: equal compute. Filled: the minimum of a parabola through the lowest size and its neighbours, which "
        "n(C) and D(C) are fitted to.",
        count_axis(N_LABEL, view.sizes), log_axis(NMSE_LABEL, np.array(seen)),
        tuple(shades), tuple(layers), ramp="compute",
    )  # fmt: skip


def compute_optimal(laws: Laws) -> View | None:
    """The N that reaches the lowest nmse with a given compute, from iso-FLOP minima. None without any."""
    ks = ks_of(laws)
    minima = {view.frontier.at.get("k"): view for view in laws.isoflops if view.enough}
    if not minima:
        return None
    fits = {fit.at.get("k"): fit for fit in laws.fits if fit.law.name == "n_of_c"}
    layers: list[Layer] = []
    for k, view in minima.items():
        texts = [f"C = {_flops(c)}<br>best N {n:,.0f}<br>nmse {v:.4f}<br>{d:.3g} tokens"
                 for c, n, v, d in zip(view.flops, view.n_latents, view.nmse, view.tokens, strict=True)]  # fmt: skip
        label = "all k" if k is None else f"k = {k:g}"
        if fit := fits.get(k):
            law = fit.predict({"flops": view.flops})
            if np.isfinite(law.low).all():
                layers.append(Band(view.flops, law.low, law.high, k))
            layers.append(Line(view.flops, law.value, k, "law", f"law at {label}"))
            label += f" (g = {fit.law.to_reported(fit.raw)[1]:.2f})"
        else:
            layers.append(Line(view.flops, view.n_latents, k, "through"))
        layers.append(Points(view.flops, view.n_latents, k, texts))
        layers.append(Label(float(view.flops[-1]), float(view.n_latents[-1]), label, k))
    flops = np.concatenate([view.flops for view in minima.values()])
    key = "Points: minima over N at equal compute, between the sizes that were trained."
    if fits:
        key += " Lines: the law n = G C^g, shaded its 95 % interval."
    return View(
        "compute_optimal", "Best N for a given compute",
        "The number of latents that reaches the lowest nmse with training compute C. Read off parabolas in ln N, which "
        "biases N a little and its exponent less.",
        key.replace("C^g", "Cᵍ"), power_axis(C_LABEL, float(flops.min()), float(flops.max())),
        log_axis("Compute-optimal N", np.concatenate([view.n_latents for view in minima.values()])),
        tuple(ks), tuple(layers),
    )  # fmt: skip


def _flops(value: float) -> str:
    power = int(np.floor(np.log10(value)))
    return f"{value / 10.0**power:.1f}×10^{power}"


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row.get(name) if row.get(name) is not None else np.nan for row in rows], dtype=float)
