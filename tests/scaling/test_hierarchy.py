"""The levels of one hierarchical training against cells trained for each k."""

import json

import numpy as np
import pytest

from saescale.scaling.comparison.arms import find_arms
from saescale.scaling.comparison.hierarchy import Gaps, find_gaps
from saescale.scaling.comparison.scatter import find_scatter
from saescale.scaling.tables import Table
from tests.scaling.known_arms import KS, SIZES, Known, Rows, known_arms

TWO = {"topk": Known(), "hierarchical_topk": Known(1.04)}


def gaps(rows: Rows) -> Gaps | None:
    (arms,) = find_arms(Table.from_rows(rows))
    return find_gaps(arms, find_scatter(arms).draws(arms))


def test_every_level_is_compared_at_its_k() -> None:
    found = gaps(known_arms(TWO, noise=0.0))
    assert found is not None
    assert {(g.n_latents, g.k, g.trained) for g in found.gaps} == {
        (n, k, own) for n in SIZES for own in KS for k in KS if k <= own
    }
    for gap in found.gaps:
        assert gap.gap.value == pytest.approx(1.04 * (gap.k / gap.trained) ** -0.02 - 1)


def test_the_trend_in_k_is_found() -> None:
    """Of cells that were trained with the largest k the gap is 1.04 (k / 32)^-0.02: a power of k."""
    held = 0
    for seed in range(60):
        rows = known_arms(TWO, seed=seed, noise=0.004)
        rows = [r for r in rows if r["architecture"] == "topk" or r["k"] == 32]
        found = gaps(rows)
        assert found is not None
        assert found.slope is not None
        assert found.at_mid is not None
        assert found.k_mid == pytest.approx(16)
        assert found.at_mid.value == pytest.approx(1.04 * 0.5**-0.02 - 1, abs=0.006)
        assert found.slope.low is not None
        assert found.slope.high is not None
        held += found.slope.low <= -0.02 <= found.slope.high
    assert held >= 50


def test_without_levels_or_topk_there_is_no_gap() -> None:
    rows = known_arms(TWO)
    assert gaps([{**r, "levels": None} for r in rows]) is None
    assert gaps([r | {"architecture": r["architecture"].replace("topk", "mine")} for r in rows]) is None
    bare = [{name: value for name, value in r.items() if name != "levels"} for r in rows]
    assert gaps(bare) is None
    # Of two k there is no trend to speak of.
    few = gaps([r for r in rows if r["k"] < 32])
    assert few is not None
    assert few.slope is None


def test_seeds_share_their_levels() -> None:
    """A level that one of two seeds lacks is not compared."""
    rows = known_arms(TWO, sizes=(512,), ks=(16,))
    own = next(r for r in rows if r["levels"])
    own["levels"] = json.dumps([level for level in json.loads(own["levels"]) if level["k"] == 16])
    found = gaps(rows)
    assert found is not None
    assert [g.k for g in found.gaps] == [16]
    assert np.isfinite(found.gaps[0].gap.value)
