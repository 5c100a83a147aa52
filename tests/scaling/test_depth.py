"""Exponents and floors of each layer's laws, over layers."""

import numpy as np
import pytest

from saescale.scaling.comparison.depth import find_depth, layer_of
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from tests.scaling.known_arms import Rows

LAYERS = {2: (0.30, 0.05), 6: (0.36, 0.08), 11: (0.42, 0.12)}  # exponent and floor of each


def cells(layers: dict[int, tuple[float, float]] = LAYERS, **shared: str) -> Rows:
    rng = np.random.default_rng(0)
    return [
        {"cell_id": f"{layer}-{n}-{s}", "subject": "known", "site": f"resid_post.{layer}", "architecture": "topk",
         "n_latents": n, "k": 16, "seed": s,
         "nmse": (2.0 * n**-a + floor) * np.exp(0.001 * rng.standard_normal()), **shared}
        for layer, (a, floor) in layers.items() for n in (256, 512, 1024, 2048, 4096, 8192, 16384) for s in (0, 1)
    ]  # fmt: skip


def test_exponent_and_floor_of_each_layer_come_back() -> None:
    fitted = fit_laws(Table.from_rows(cells()), None, FitSettings(60, laws=("n",)))
    found = find_depth(fitted.fits)
    assert [(e.quantity, e.layer, e.k, e.law) for e in found] == [
        (quantity, layer, 16.0, "n") for layer in (2.0, 6.0, 11.0) for quantity in ("exponent", "floor")
    ]
    for entry in found:
        exponent, floor = LAYERS[int(entry.layer)]
        truth = -exponent if entry.quantity == "exponent" else floor
        assert entry.value.low is not None
        assert entry.value.high is not None
        assert entry.value.low - 0.005 <= truth <= entry.value.high + 0.005
        assert entry.value.value == pytest.approx(truth, rel=0.1)
    # The floor is E of the law, by another way.
    for fit in fitted.fits:
        if fit.law.has_floor:
            (own,) = (e for e in found if e.quantity == "floor" and layer_of(str(fit.of["site"])) == e.layer)
            assert own.value.value == pytest.approx(fit.coefficients()["E"]["value"])


def test_one_layer_has_no_depth() -> None:
    fitted = fit_laws(Table.from_rows(cells({2: (0.3, 0.05)})), None, FitSettings(0, laws=("n",)))
    assert find_depth(fitted.fits) == []


def test_layers_are_numbers() -> None:
    assert [layer_of(site) for site in ("resid_post.11", "resid_post.2", "resid_post", "mlp.x")] == [
        11.0,
        2.0,
        None,
        None,
    ]
