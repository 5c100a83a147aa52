"""One training of hierarchical_topk at all its k against TopK cells of each k: the gap, and how it goes with k."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from saescale.scaling.comparison.arms import Arms
from saescale.scaling.comparison.scatter import Interval, interval
from saescale.scaling.levels import read_levels

ONE_TRAINING, APART = "hierarchical_topk", "topk"


@dataclass(frozen=True)
class Gap:
    """nmse of a level of one training over that of TopK cells of the same N and k, less 1. `trained`: the k that it was
    trained with."""

    n_latents: float
    k: float
    trained: float
    gap: Interval


@dataclass(frozen=True)
class Gaps:
    """`at_one`, `slope`: ln(1 + gap) = at_one + slope ln(k / k_mid) over all gaps, k_mid their geometric mean; None for
    fewer than three k."""

    gaps: tuple[Gap, ...]
    k_mid: float
    at_mid: Interval | None
    slope: Interval | None


def find_gaps(arms: Arms, draws: np.ndarray) -> Gaps | None:
    """From the column `levels` of hierarchical cells, [{"k": 8, "nmse": 0.31, "l0": 7.9}, ...]; None without it, or
    without TopK cells of the same N and k.

    Where several cells of an N have a level, each is compared. Intervals are those of the TopK cells and of the
    training at once: all levels of one training move together, so its own scatter stands for each. The trend's are of
    its residuals, since what the levels miss is no noise.
    """
    if "levels" not in arms.table:
        return None
    found = []
    for group in arms.at(ONE_TRAINING):
        read = (read_levels(str(arms.table["levels"][row])) for row in arms.rows[group])
        levels = [{float(level["k"]): float(level["nmse"]) for level in own} for own in read]
        for k in sorted(set.intersection(*map(set, levels))) if levels else ():
            other = arms.at(APART, float(arms.n_latents[group]), k)
            if not len(other):
                continue
            value = float(np.mean([np.log(level[k]) for level in levels]) - arms.log_nmse[other[0]])
            moved = draws - arms.log_nmse
            drawn = value + moved[:, group] - moved[:, other[0]]
            found.append(Gap(float(arms.n_latents[group]), k, float(arms.k[group]), interval(value, drawn).less_one))
    if not found:
        return None
    return Gaps(tuple(found), *_trend(found))


def _trend(gaps: list[Gap]) -> tuple[float, Interval | None, Interval | None]:
    x = np.log([gap.k for gap in gaps])
    y = np.log1p([gap.gap.value for gap in gaps])
    middle = float(x.mean())
    free = len(x) - 2
    if len(np.unique(x)) < 3 or free < 1:
        return float(np.exp(middle)), None, None
    centred = x - middle
    slope = float(centred @ y / (centred @ centred))
    left = y - y.mean() - slope * centred
    sd = float(np.sqrt(left @ left / free))
    reach = float(t.ppf(0.975, free)) * sd
    at_mid, wide = reach / float(np.sqrt(len(x))), reach / float(np.sqrt(centred @ centred))
    mean = float(y.mean())
    return (
        float(np.exp(middle)),
        Interval(mean, mean - at_mid, mean + at_mid).less_one,
        Interval(slope, slope - wide, slope + wide),
    )
