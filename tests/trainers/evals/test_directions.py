"""Stability over seeds and splitting from one N to the next, on planted directions and against all matchings."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import t

from saescale.storage.columns import RESULTS
from saescale.storage.errors import SaescaleError
from saescale.trainers.evals import splitting, stability
from saescale.trainers.evals.directions import Directions, nearest
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.exchange.trained import Trained
from tests.trainers.evals.planted import E, mix, planted, source


def measured(evaluation: Any, ours: Trained, *others: Trained, act: np.ndarray) -> dict[tuple[str, str], Measurement]:
    found = evaluation.measure(ours, source(act), None, Directions(source(act)), others=list(others))
    return {(m.metric, m.at): m for m in found}


OURS = planted([*E[:12]])
# 0 to 5 again in another order; 6 near, 7 far; 8 twice; one between 9 and 10 for which both compete; 11 nowhere.
THEIRS = planted([*E[5::-1], mix(6, 20, 0.8), mix(7, 21, 0.6), mix(8, 22, 0.9), mix(8, 23, 0.85),
                  (E[9] + E[10]) / np.sqrt(2), E[24]], seed=1)  # fmt: skip
EVERY = E[:25]  # each latent fires on some of these rows


def test_latents_that_another_seed_finds_are_counted() -> None:
    found = measured(stability, OURS, THEIRS, act=EVERY)
    assert found["matched", ""].value == pytest.approx((6 + 1 + 1 + 1) / 12)
    assert found["found", ""].value == pytest.approx((6 + 1 + 1 + 2) / 12)
    cosines = [1.0] * 6 + [0.8, 0.6, 0.9, 0.5**0.5, 0.5**0.5, 0.0]
    assert found["max_cosine", ""].value == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found["matched", THEIRS.cell.cell_id].value == found["matched", ""].value
    one = found["max_cosine", ""]
    assert (one.n, one.seed) == (12, 0)
    assert one.low is not None
    assert one.high is not None
    # As wide as the standard error of a mean over 12 says.
    student = t.interval(0.95, 11, scale=np.std(cosines, ddof=1) / np.sqrt(12))
    assert one.high - one.low == pytest.approx(student[1] - student[0], rel=0.15)
    # Over several seeds each latent counts by the share of them.
    found = measured(stability, OURS, THEIRS, planted([*E[:12]], seed=2), act=EVERY)
    assert found["matched", ""].value == pytest.approx((9 / 12 + 1) / 2)


def test_dead_latents_are_nobodys_partners() -> None:
    found = measured(stability, OURS, THEIRS, act=E[1:25])  # 0 fires nowhere, there and here
    assert found["matched", ""].value == pytest.approx(8 / 11)
    assert found["matched", ""].n == 11
    with pytest.raises(SaescaleError, match=r"no latent of n12-k1-s0-.* fires"):
        measured(stability, OURS, THEIRS, act=E[28:30])


@pytest.mark.parametrize("seed", range(12))
def test_the_matching_is_the_best_of_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, 7, 2)
    ours, theirs = (torch.nn.functional.normalize(torch.tensor(draw.normal(size=(n, 3)))) for n in sizes)
    weights = (ours @ theirs.T).numpy()
    weights[weights <= 0.7] = 0
    padded = np.zeros((6, 6))
    padded[: len(ours), : len(theirs)] = weights
    best = max(itertools.permutations(range(6)), key=lambda order: padded[range(6), order].sum())
    assert stability.matched(ours, theirs).tolist() == (padded[range(6), best] > 0)[: len(ours)].tolist()


def test_the_nearest_are_the_same_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.functional.normalize(torch.randn(n, 8, generator=draw)) for n in (37, 23))
    whole, cosine = ours @ theirs.T, nearest(ours, theirs)
    has_own = stability.matched(ours, theirs)
    assert cosine.place.tolist() == whole.argmax(dim=1).tolist()
    monkeypatch.setattr("saescale.trainers.evals.directions.CHUNK_ENTRIES", 5 * len(theirs))
    assert nearest(ours, theirs).place.tolist() == cosine.place.tolist()
    assert_allclose(nearest(ours, theirs).cosine, cosine.cosine, atol=1e-6)
    assert stability.matched(ours, theirs).tolist() == has_own.tolist()
    monkeypatch.setattr(stability, "MOST_ENTRIES", 3)
    with pytest.raises(SaescaleError, match="hang together, too many to match"):
        stability.matched(ours[:1].repeat(4, 1), ours)


def test_children_are_counted_by_their_parents() -> None:
    # 0 and 1 split in two and three, 2 to 4 have one child each, 5 has none; three are new.
    larger = planted([mix(0, 20, 0.9), mix(0, 21, 0.9), *(mix(1, 22 + i, 0.8) for i in range(3)), *E[2:5],
                      mix(5, 6, 0.6), E[25], E[26]])  # fmt: skip
    found = measured(splitting, planted([*E[:6]]), larger, act=E[:27])
    values = {metric: found[metric, ""].value for metric in ("split", "kept", "lost", "new", "parent_cosine")}
    cosines = [0.9] * 2 + [0.8] * 3 + [1.0] * 3 + [0.6, 0, 0]
    assert values == pytest.approx(
        {"split": 2 / 6, "kept": 3 / 6, "lost": 1 / 6, "new": 3 / 11, "parent_cosine": np.mean(cosines)}, abs=1e-5
    )
    by_number = [found["children", at].value for at in ("0", "1", "2", "3", "4", "8 or more")]
    assert by_number == pytest.approx([1 / 6, 3 / 6, 1 / 6, 1 / 6, 0, 0])
    assert (found["split", ""].n, found["new", ""].n) == (6, 11)
    many = measured(splitting, planted([E[0]]), planted([mix(0, 1 + i, 0.9) for i in range(11)]), act=E[:12])
    assert many["children", "8 or more"].value == 1


def test_who_is_compared_with_whom() -> None:
    def row(cell: str, n: int = 64, seed: int = 0, **more: Any) -> dict[str, Any]:
        return dict.fromkeys(RESULTS.names) | {
            "cell_id": cell, "n_latents": n, "k": 8, "seed": seed, "architecture": "topk", "lr": 1 / n, "nmse": 0.1,
        } | more  # fmt: skip

    cells = [
        row("a"), row("b", seed=1), row("c", seed=2), row("d", seed=1, k=16), row("e", seed=1, lr=0.5),
        row("f", seed=1, store="other"), row("g", 128), row("h", 256), row("i", 128, lr=1 / 64, nmse=0.3),
        row("j", 512, seed=3), row("k", 1024, seed=3, lr=0.1, nmse=0.2), row("l", 1024, seed=3, lr=0.2),
    ]  # fmt: skip
    seeds = {row["cell_id"]: stability.partners(row["cell_id"], cells) for row in cells}
    assert {cell: others for cell, others in seeds.items() if others} == {
        "a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"],
    }  # fmt: skip
    larger = {row["cell_id"]: splitting.partners(row["cell_id"], cells) for row in cells}
    assert {cell: others for cell, others in larger.items() if others} == {
        "a": ["i"], "g": ["h"], "i": ["h"], "j": ["l"],
    }  # fmt: skip


def test_without_a_linear_decoder_there_are_no_directions() -> None:
    ours = OURS._replace(sae=OURS.sae.like(OURS.sae.params))
    whole = ours.sae.forward
    ours.sae.forward = lambda x: whole(x)._replace(x_hat=whole(x).x_hat.square())  # type: ignore[method-assign]
    with pytest.raises(SaescaleError, match=r"x_hat of topk is not z W \+ b"):
        measured(stability, ours, THEIRS, act=EVERY)
