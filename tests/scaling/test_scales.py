"""Scales: what is fitted of each kind of metric, and the way back."""

import numpy as np
import pytest

from saescale.scaling.laws.scales import scale_of
from saescale.scaling.metrics import Metric

SHARES = np.array([0.02, 0.5, 0.97])


@pytest.mark.parametrize(
    ("metric", "limit", "values", "distances", "words"),
    [
        (Metric("lower"), None, [0.1, 2.0], [0.1, 2.0], "a.m"),
        (Metric("lower", limit=0.0), None, [0.1, 2.0], [0.1, 2.0], "a.m"),
        (Metric("lower", limit="original"), 3.0, [3.1, 3.5], [0.1, 0.5], "a.m - a.original"),
        (Metric("higher", limit=1.0), None, [0.9, -0.5], [0.1, 1.5], "1 - a.m"),
        (Metric("higher", limit="original"), 4.0, [3.5], [0.5], "a.original - a.m"),
        (Metric("higher", bounded=True), None, [0.8, 0.5], [0.25, 1.0], "(1 - a.m) / a.m"),
        (Metric("lower", bounded=True), None, [0.8, 0.5], [4.0, 1.0], "a.m / (1 - a.m)"),
        (Metric("higher"), None, [4.0, 0.5], [0.25, 2.0], "1 / a.m"),
        # What its limit names was not measured.
        (Metric("lower", limit="original"), None, [3.1], [3.1], "a.m"),
    ],
)
def test_distances(
    metric: Metric, limit: float | None, values: list[float], distances: list[float], words: str
) -> None:
    scale = scale_of("a.m", metric, limit)
    assert scale.words == words
    np.testing.assert_allclose(scale.distance(np.array(values)), distances, rtol=1e-12)
    np.testing.assert_allclose(scale.value(np.array(distances)), values, rtol=1e-12)
    low, high = scale.interval(np.array(distances) * 0.9, np.array(distances) * 1.1)
    assert (low < np.array(values)).all()
    assert (np.array(values) < high).all()
    # The better a metric is, the smaller its distance.
    better = np.array(values) * (0.99 if metric.better == "lower" else 1.01) + (0.0 if values[-1] > 0 else 0.01)
    assert scale.distance(better)[0] < distances[0]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_what_a_law_says_of_a_share_stays_a_share(better: str) -> None:
    scale = scale_of("a.m", Metric(better, bounded=True))  # type: ignore[arg-type]
    far = scale.value(np.array([1e-9, 1.0, 1e9]))
    assert ((far >= 0) & (far <= 1)).all()
    np.testing.assert_allclose(np.abs(np.log(scale.distance(SHARES))), np.abs(np.log(SHARES / (1 - SHARES))))


def test_values_at_the_limit_have_no_distance_that_a_law_could_follow() -> None:
    for metric, values in (
        (Metric("lower"), [0.0, -0.1]),
        (Metric("higher", limit=1.0), [1.0, 1.2]),
        (Metric("higher", bounded=True), [1.0, 0.0]),
        (Metric("lower", bounded=True), [0.0, 1.0]),
        (Metric("higher"), [0.0, -2.0]),
    ):
        distance = scale_of("a.m", metric).distance(np.array(values))
        assert not (np.isfinite(distance) & (distance > 0)).any()
