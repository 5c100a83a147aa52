"""density against sums over rows and latents, one after the other, of latents that fire as often as was planned."""

import numpy as np
import pytest

from saescale.storage.errors import SaescaleError
from saescale.trainers.evals import density
from tests.trainers.evals.planted import BIAS, D_MODEL, E, planted, source

ROWS = 1_000


def test_energy_is_shared_out_by_frequency() -> None:
    # Latent 0 is active on half of the rows, 1 on 5 %, 2 on 0.2 %, 3 on none.
    draw = np.random.default_rng(0)
    z = np.zeros((ROWS, 4))
    for latent, often, size in ((0, 500, 1.0), (1, 50, 3.0), (2, 2, 5.0)):
        z[draw.permutation(ROWS)[:often], latent] = size * draw.uniform(0.5, 1.5, often)
    z[:, 3] = 1e-3 * (z.sum(axis=1) == 0)  # so that no row is empty
    act = (z @ E[[0, 1, 2, 9]]).astype(np.float16)
    cell = planted([E[0], E[1], E[2], E[8]], k=2)
    cell.sae.params["W_dec"][1] *= 2  # a longer direction counts for more
    found = {(m.metric, m.at): m for m in density.measure(cell, source(act), None)}

    energy, fired = np.zeros(4), np.zeros(4)
    for row in act.astype(np.float64):
        row -= row.mean()
        row /= np.linalg.norm(row)
        for latent, direction in enumerate(E[[0, 1, 2, 8]]):
            value = row @ direction - BIAS
            if value > 0:
                energy[latent] += (value * (2 if latent == 1 else 1)) ** 2
                fired[latent] += 1
    share = energy / energy.sum()
    assert fired.tolist() == [500, 50, 2, 0]
    of_bins = {at: m.value for (metric, at), m in found.items() if metric == "energy" and m.value}
    assert of_bins == pytest.approx(
        {"1e-0.5 to 1e0": share[0], "1e-1.5 to 1e-1": share[1], "1e-3 to 1e-2.5": share[2]}, rel=1e-3
    )
    assert sum(of_bins.values()) == pytest.approx(1)
    assert found["energy_10", ""].value == pytest.approx(share[0], rel=1e-3)
    assert found["energy_1", ""].value == pytest.approx(share[0] + share[1], rel=1e-3)
    expected = share[:3] @ np.log10([0.5, 0.05, 0.002])
    assert found["mean_log10", ""].value == pytest.approx(expected, rel=1e-3)
    one = found["energy_10", ""]
    assert one.low is not None
    assert one.high is not None
    assert one.low < one.value < one.high
    assert (one.n, one.seed) == (ROWS, 0)


def test_where_nothing_fires_there_is_nothing_to_share_out() -> None:
    with pytest.raises(SaescaleError, match="no latent fires"):
        list(density.measure(planted([E[0], E[1]]), source(np.tile(-E[0], (8, 1))), None))
    assert E.shape == (D_MODEL - 1, D_MODEL)
