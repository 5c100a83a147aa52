"""The scatter of equal cells, and draws of what other seeds would have had."""

import numpy as np
import pytest
from scipy.stats import t

from saescale.scaling.comparison.arms import Arms, find_arms
from saescale.scaling.comparison.scatter import Interval, find_scatter, interval
from saescale.scaling.tables import Table
from tests.scaling.known_arms import Known, known_arms

TWO = {"topk": Known(), "relu": Known(1.2)}


def arms_of(**how: object) -> Arms:
    (arms,) = find_arms(Table.from_rows(known_arms(TWO, **how)))  # type: ignore[arg-type]
    return arms


def test_the_scatter_is_found_again_from_seeds_and_from_a_surface() -> None:
    for how in (
        {"seeds": range(4)},
        {"seeds": (0,), "sizes": (256, 512, 1024, 2048, 4096, 8192), "ks": (8, 16, 32, 64)},
    ):
        found = [find_scatter(arms_of(noise=0.01, seed=seed, **how)) for seed in range(10)]
        assert {scatter.of_surface for scatter in found} == {"sizes" in how}
        sd = np.mean([list(scatter.sd.values()) for scatter in found])
        # What the surface misses is in it too, and is no more than the scatter here.
        assert 0.009 < sd < (0.013 if "sizes" in how else 0.011)


def test_intervals_of_a_mean_are_students() -> None:
    """Of a group of three seeds, with the degrees of freedom of all twelve groups: as the textbook has it."""
    arms = arms_of(seeds=(0, 1, 2), noise=0.01)
    scatter = find_scatter(arms)
    draws = scatter.draws(arms, count=40_000)
    own = Table.from_rows(known_arms(TWO, seeds=(0, 1, 2), noise=0.01))
    logs = np.log(own["nmse"]).reshape(2, -1, 3)
    sd = np.sqrt(logs.var(axis=2, ddof=1).mean(axis=1))
    reach = t.ppf(0.975, 2 * logs.shape[1]) * sd / np.sqrt(3)
    for name, expected in zip(("topk", "relu"), reach, strict=True):
        group = arms.at(name)[3]
        found = interval(arms.log_nmse[group], draws[:, group])
        assert found.low is not None
        assert found.high is not None
        assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.03)


def test_where_nothing_tells_there_are_no_intervals() -> None:
    arms = arms_of(seeds=(0,), sizes=(512, 1024), ks=(16,))
    scatter = find_scatter(arms)
    assert scatter.sd == {}
    assert "no seed repeats" in scatter.how
    assert interval(0.5, scatter.draws(arms)[:, 0]) == Interval(0.5, None, None)


def test_an_interval_that_is_turned_or_raised() -> None:
    found = Interval(0.1, 0.05, None)
    assert found.sign == 0
    assert found.negative == Interval(-0.1, None, -0.05)
    assert Interval(0.1, 0.05, 0.2).sign == 1
    assert Interval(0.1, 0.05, 0.2).negative.sign == -1
    assert Interval(0.0, -1.0, 1.0).exp == Interval(1.0, np.exp(-1.0), np.exp(1.0))
