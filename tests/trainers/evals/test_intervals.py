"""Intervals over documents: as wide as repeating the whole experiment says, and nothing where there is one document."""

import numpy as np
import pytest

from saescale.trainers.evals.intervals import by_document, ratio


def documents(rng: np.random.Generator, number: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `number` documents of 1 to 40 rows each; what they have in common is as large as what they have not."""
    doc = np.repeat(np.arange(number), rng.integers(1, 41, number))
    return doc, rng.normal(size=number)[doc] + rng.normal(size=len(doc))


@pytest.mark.parametrize(("number", "least"), [(60, 0.90), (8, 0.92)])  # plain percentiles of 8 hold it in 88 %
def test_intervals_hold_the_truth_as_often_as_they_say(number: int, least: float) -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(300):
        doc, values = documents(rng, number)
        found = by_document(doc, {"x": values, "n": np.ones(len(doc))}, {"mean": ratio("x", "n")})["mean"]
        assert found.value == pytest.approx(values.mean())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert least <= held / 300 <= 0.98  # intervals over rows would hold it in half of the cases


def test_one_document_has_no_interval() -> None:
    found = by_document(np.zeros(5), {"x": np.arange(5), "n": np.ones(5)}, {"mean": ratio("x", "n")})["mean"]
    assert found == (2.0, None, None)


def test_what_is_not_defined_is_not_in_the_interval() -> None:
    doc = np.array([0, 0, 1, 1])
    columns = {"x": np.array([1.0, 1, 0, 0]), "n": np.array([1.0, 1, 0, 0])}
    assert by_document(doc, columns, {"mean": ratio("x", "n")})["mean"] == (1.0, 1.0, 1.0)
