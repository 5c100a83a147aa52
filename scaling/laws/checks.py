"""Warnings in words: where the data cannot carry what a law claims."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import binom, spearmanr

from saescale.scaling.kinds import mostly_above_one, said_of_kinds
from saescale.scaling.laws.convergence import Convergence, unconverged
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.frontier import Frontier
from saescale.scaling.laws.law import SYMBOLS, Law
from saescale.scaling.tables import KIND, Table, number, size_of
from saescale.scaling.words import listed

_RANGE = 8.0
_DEAD = 0.1
_MISSED = 0.1
_TRADED = 0.9
_WIDE = 0.25
_SMALL_FLOOR = 0.02
_LARGEST = 0.5
_SPARE = 4
_SINGULAR = 1e6
_UNLIKELY = 0.01
_SEEN = 12
_EXACT = 1e-6
_ALIKE = 1.01  # of two numbers of tokens, of which one may be rounded to batches
_MET = 5e-4  # of ln nmse: within the width of the loss, where intervals are of rounding


def data_warnings(
    results: Table, kinds: Sequence[Table], convergences: Sequence[Convergence], laws: Sequence[Law]
) -> list[str]:
    """What is wrong with the cells for these laws; what their columns cannot tell is passed over.

    `results` are all cells and `kinds` those that one law describes. What cells of several kinds share is said once.
    """
    warnings = said_of_kinds(kinds, _grid_warnings)
    if "dead_fraction" in results:
        rows = np.flatnonzero(results["dead_fraction"] > _DEAD)
        if len(rows):
            cells = listed(f"{size_of(results, int(r))}: {results['dead_fraction'][r]:.0%}" for r in rows)
            warnings.append(
                f"{len(rows)} cells have more than {_DEAD:.0%} dead latents ({cells}): their effective N "
                "is smaller, which flattens the law in N"
            )
    if {"l0", "k"} <= set(results.columns):
        off = np.abs(results["l0"] / results["k"] - 1) > _MISSED
        target = np.isfinite(results["l0_error"]) if "l0_error" in results else np.zeros(len(results), dtype=bool)
        for mask, what, so in (
            (off & target, "miss the k that was their target", "laws in k take their measured L0, others the k"),
            (off & ~target, "have another number of active latents than k", "they have not the sparsity of their k"),
        ):
            if mask.any():
                rows = np.flatnonzero(mask)
                cells = listed(f"{size_of(results, int(r))}: L0 {results['l0'][r]:.3g}" for r in rows)
                warnings.append(
                    f"{len(rows)} cells {what}, by more than {_MISSED:.0%} ({cells}): {so}, and at equal k they are "
                    "not compared at equal sparsity"
                )
    if steps := [step for cells in kinds if "n_latents" in cells for step in rises(cells)]:
        warnings.append(
            f"nmse does not fall with N in these steps: {listed(steps)}; those cells are undertrained or too noisy for "
            "a law"
        )
    warnings += said_of_kinds(kinds, lambda cells: _mixed_tokens(cells, laws))
    above = int((results["nmse"] > 1).sum())
    if above == len(results):
        warnings.append("nmse is above 1 in every cell: it is taken for another loss, and none for diverged")
    elif mostly_above_one(results):
        warnings.append(
            f"nmse is above 1 in {above} of {len(results)} cells: it is another loss, or the sweep is broken; none is "
            "taken for diverged and all are fitted (--where 'nmse<=1' fits the others alone)"
        )
    elif above:
        warnings.append(f"nmse is above 1, worse than that of the mean alone, in {above} of the cells that are fitted")
    return warnings + unconverged(convergences)


def _grid_warnings(cells: Table) -> list[str]:
    """Of the cells of one kind, whether their N and k are enough for laws."""
    warnings = []
    for column, symbol in (("n_latents", "N"), ("k", "k")):
        if column not in cells:
            continue
        low, high = cells[column].min(), cells[column].max()
        if high == low:
            warnings.append(f"all cells have {symbol} = {number(low)}: they say nothing of other {symbol}")
        elif high / low < _RANGE:
            warnings.append(
                f"{symbol} spans only a factor of {high / low:.3g} ({number(low)} to {number(high)}): exponents from "
                f"less than a factor of {_RANGE:g} are local slopes, not laws"
            )
    if "k" not in cells:
        warnings.append("no column k: all cells are taken for cells of one k")
    elif "d_model" in cells:
        near = np.unique(cells["k"][cells["k"] > cells["d_model"] / 4])
        if len(near):
            values = listed((f"{k:g}" for k in near), ", ")
            warnings.append(
                f"k = {values} is above d_model / 4 = {cells['d_model'][0] / 4:g}: the law holds for k "
                "much smaller than d_model"
            )
    return warnings


def fit_warnings(fit: Fit) -> list[str]:
    """What the fit itself says about how well its coefficients are determined."""
    law, warnings = fit.law, []
    if fit.agreeing < 2:
        warnings.append(f"only {fit.agreeing} of {fit.starts} starts reach the best fit: it may not be the global one")
    if fit.misses and fit.lack:
        warnings += fit.lack.said
    warnings += _bounds(fit)
    spare = fit.free
    if fit.widen > 1 and spare < _SPARE:
        points = f"{spare + len(law.names)} {'kinds of cells' if fit.misses else 'points'}"
        warnings.append(
            f"{points} for {len(law.names)} coefficients: with {spare} degrees of freedom the scatter "
            f"itself is hardly known, and intervals are {fit.widen:.1f} times as wide for it"
        )
    warnings += _uneven_scatter(fit)
    if not len(fit.draws):
        return warnings
    if fit.conditioning and fit.conditioning.projected > _SINGULAR:
        warnings.append(
            "the cells hardly tell the exponents apart (condition number "
            f"{fit.conditioning.projected:.2g}): add values of {', '.join(SYMBOLS.get(c, c) for c in law.columns)}"
        )
    if law.columns == ("n_latents",) and law.over == "cells":
        low, high = fit.exponent("n_latents", {})["low"], fit.exponent("n_latents", {})["high"]
        if low is None or high is None or low <= 0 <= high:
            warnings.append("the exponent of n cannot be told from 0")
    if {"n_latents", "k"} <= set(law.columns) and "n_latents" in law.leading:
        flat = []
        for k in fit.levels("k"):
            exponent = fit.exponent("n_latents", {"k": k})
            if exponent["low"] is None or exponent["high"] is None or exponent["low"] <= 0 <= exponent["high"]:
                flat.append(f"{k:g}")
        if flat:
            warnings.append(f"the exponent of n cannot be told from 0 at k = {listed(flat, ', ')}")
    if len(law.terms) > 1 and law.join == 1:
        warnings += _floor_warnings(fit)
    return warnings


def holdout_warnings(holdout: Mapping[str, Any]) -> list[str]:
    """Where far fewer held-out cells lie in their intervals than 95 % of them should."""
    covered, points = holdout.get("covered"), holdout["points"]
    if covered is None or holdout["rms_log_error"] < _MET or binom.cdf(covered, points, 0.95) > _UNLIKELY:
        return []
    return [
        f"only {covered} of {points} held-out cells ({holdout['held_out']}) lie in their 95 % intervals: the law does "
        "not extrapolate as well as it says"
    ]


def frontier_warnings(frontier: Frontier) -> list[str]:
    """Where the points of a compute frontier are not what the best cells could reach."""
    if frontier.ends_only:
        return [
            "without curves the frontier is made of the ends of cells, which is an upper bound: what a cell reaches on "
            "its way is not in it, and for cells of equally many tokens C only stands for n"
        ]
    largest = max(curve.n_latents for curve in frontier.curves)
    winners = frontier.winner[frontier.kept]
    if np.mean([frontier.curves[i].n_latents == largest for i in winners]) > _LARGEST:
        return [
            f"more than half of the frontier's points belong to the largest N = {number(largest)}: larger cells might "
            "do better there, so the frontier is an upper bound"
        ]
    return []


def unstable_exponent(with_floor: Fit, without: Fit) -> str | None:
    """In words, when a floor changes the exponent by a quarter or more while the residual hardly changes."""
    a, b = (f.law.to_reported(f.raw)[1] for f in (with_floor, without))
    similar = without.rms_log_residual < 1.5 * with_floor.rms_log_residual + 1e-3
    if similar and abs(a - b) > _WIDE * abs(b):
        return (
            "floor and exponent are not told apart: with the irreducible term the exponent changes by more than "
            f"{_WIDE:.0%} at nearly the same residual"
        )
    return None


def _floor_warnings(fit: Fit) -> list[str]:
    law, centre = fit.law, fit.centre
    design = law.design({c: np.array([np.log(v)]) for c, v in centre.items()})[0]
    own = law.term_of == len(law.terms) - 1
    floor = fit.draws[:, own] @ design[own]
    here = {c: np.array([v]) for c, v in centre.items()}
    best = fit.raw[own] @ design[own] - law.log_value(fit.raw, here)[0]
    low, _ = fit.spread(best, floor - law.log_value(fit.draws, here)[:, 0])
    warnings = []
    if low < np.log(_SMALL_FLOOR):
        warnings.append(
            "the data do not determine the irreducible term: at their centre its interval reaches down to less than "
            f"{_SMALL_FLOOR:.0%} of {law.target}"
        )
    column = law.columns[0]
    exponent = law.exponent_of(fit.draws, column, centre)
    if np.ptp(exponent) > 1e-9 and np.ptp(floor) > 1e-9:
        correlation = float(spearmanr(exponent, floor).statistic)
        least, middle, most = np.percentile(exponent, [2.5, 50, 97.5])
        if abs(correlation) > _TRADED and most - least > _WIDE * abs(middle):
            warnings.append(
                f"floor and exponent are traded off: the exponent of {SYMBOLS[column]} follows the irreducible term "
                f"through its wide interval (rank correlation above {_TRADED:g} over the resamples)"
            )
    return warnings


def _bounds(fit: Fit) -> list[str]:
    """Which exponents stand on the bounds within which they are sought."""
    on_it = [f"{bound.name} = {bound.value:g}" for bound in fit.bounds if not bound.interval_only]
    ends = [f"{bound.name} at {bound.value:g}" for bound in fit.bounds if bound.interval_only]
    where = "the bound of their local value at the centre of the data"
    found = []
    if on_it:
        found.append(
            f"exponents stand on {where} ({listed(on_it, ', ')}): the cells ask for more than this form gives, and "
            "neither value nor interval say how much; look for wrong cells, or for a form that bends"
        )
    if ends:
        found.append(f"intervals of exponents end on {where} ({listed(ends, ', ')}): the cells do not bound them there")
    return found


def _uneven_scatter(fit: Fit) -> list[str]:
    """Whether cells scatter more at one end: intervals take their scatter about the law for the same everywhere."""
    if fit.widen == 1 or fit.free + len(fit.law.names) < _SEEN:
        return []
    columns, log_nmse = fit.observations()
    scatter = np.abs(fit.law.log_value(fit.raw, columns) - log_nmse)
    if scatter.max() < _EXACT:
        return []
    found = []
    for column, values in columns.items():
        rank = spearmanr(values, scatter)
        if rank.pvalue < _UNLIKELY:
            end = "large" if rank.statistic > 0 else "small"
            found.append(
                f"cells scatter more about the law at {end} {SYMBOLS.get(column, column)}: intervals take it "
                "for the same everywhere and are too narrow there"
            )
    return found


def rises(results: Table) -> list[str]:
    """The steps of N at which nmse, averaged over cells of one size, does not fall, such as "k = 8, N = 512 to 1024".

    Not where tokens differ otherwise than by growing with N, which is what L(N, D) is for.
    """
    ks = results["k"] if "k" in results else np.zeros(len(results))
    found = []
    for k in np.unique(ks):
        own = ks == k
        sizes = np.unique(results["n_latents"][own])
        if "tokens" in results and not _grow(results["n_latents"][own], results["tokens"][own]):
            continue
        means = [np.log(results["nmse"][own & (results["n_latents"] == n)]).mean() for n in sizes]
        at = (f"{results[KIND][0]}, " if KIND in results else "") + (f"k = {k:g}, " if "k" in results else "")
        steps = zip(sizes[:-1], sizes[1:], np.diff(means), strict=True)
        found += [f"{at}N = {number(low)} to {number(high)}" for low, high, fall in steps if fall >= 0]
    return found


def _mixed_tokens(results: Table, laws: Sequence[Law]) -> list[str]:
    """In words, where laws of N that know nothing of tokens meet cells whose tokens do not go with N by one rule."""
    of_size = [law for law in laws if law.over == "cells" and "n_latents" in law.columns]
    if (
        not of_size
        or any("tokens" in law.columns for law in laws)
        or not {"n_latents", "tokens"} <= set(results.columns)
    ):
        return []
    told = results.select(results["tokens"] > 0)
    joint = "k" not in results or any("k" in law.columns for law in of_size)
    fitted = [told] if joint else [told.select(told["k"] == k) for k in np.unique(told["k"])]
    how = next((how for cells in fitted if (how := _unruly(cells["n_latents"], cells["tokens"]))), None)
    if how is None:
        return []
    values, counts = np.unique(told["tokens"], return_counts=True)
    names = listed(dict.fromkeys(law.name for law in of_size), " and ")
    return [
        f"{how} ({number(values[0])} to {number(values[-1])}): {names} mix what that does to nmse; ask for --law n_d, "
        f"or fit one budget with --where tokens={values[np.argmax(counts)]:.0f}"
    ]


def _unruly(sizes: np.ndarray, tokens: np.ndarray) -> str | None:
    """How tokens differ among cells otherwise than by growing, or by falling, with N; None where they do not."""
    of_each = [tokens[sizes == n] for n in np.unique(sizes)]
    if any(each.max() > _ALIKE * each.min() for each in of_each):
        return "cells of one N differ in tokens"
    ratios = [after.min() / before.max() for before, after in pairwise(of_each)]
    if any(ratio > _ALIKE for ratio in ratios) and any(ratio < 1 / _ALIKE for ratio in ratios):
        return "tokens go up and down with N"
    return None


def _grow(sizes: np.ndarray, tokens: np.ndarray) -> bool:
    """Whether there is one number of tokens for each size, and never fewer for a larger one."""
    pairs = np.unique(np.stack([sizes, tokens], axis=1), axis=0)
    return len(pairs) == len(np.unique(sizes)) and bool((np.diff(pairs[:, 1]) >= 0).all())
