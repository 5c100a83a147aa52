"""The comparison whole: its document, whatever cells there are, and over which choices of training it goes."""

import json
from typing import Any

import numpy as np
import pytest

from saescale.scaling.comparison.compare import Comparison, compare, side_by_side
from saescale.scaling.comparison.sentences import hierarchy, limits, outcome, ratios
from saescale.scaling.figures.interactive import plot
from saescale.scaling.figures.views_compare import views_of_comparison
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report.side_by_side import comparison_tables
from saescale.scaling.tables import Table
from tests.scaling.known_arms import ALL, KS, SIZES, Known, Rows, known_arms, known_curves

THREE = {"relu": Known(1.2), "topk": Known(), "pca": Known(1.9)}


def compared(rows: Rows) -> Comparison:
    (found,) = compare(Table.from_rows(rows), Table.from_rows(known_curves(rows)))
    return found


def test_the_document_holds_what_was_compared() -> None:
    (entry,) = json.loads(json.dumps(_document(known_arms(THREE), bootstraps=0)))["comparison"]
    assert (entry["of"], entry["architectures"], entry["reference"]) == ({}, ["topk", "relu", "pca"], "topk")
    assert entry["order"]["words"] == "topk < relu < pca"
    assert [(p["n_latents"], p["k"], p["leader"]) for p in entry["equal_l0"]] == [
        (n, k, "topk") for n in SIZES for k in KS
    ]
    pair = next(p for p in entry["order"]["pairs"] if (p["first"], p["second"]) == ("topk", "relu"))
    assert pair["ratio_of_nmse"]["low"] < 1 / 1.2 < pair["ratio_of_nmse"]["high"]
    assert pair["points"] == len(SIZES) * len(KS)
    assert entry["unbeaten"] == []
    assert len(entry["dead"]) == len(THREE) * len(SIZES) * len(KS)


def _document(rows: Rows, bootstraps: int) -> dict[str, Any]:
    results = Table.from_rows(rows)
    fitted = fit_laws(results, None, FitSettings(bootstraps, laws=("n",)))
    return fitted.document() | side_by_side(fitted).document()


def test_one_kind_has_no_such_keys() -> None:
    assert not {"comparison", "depth"} & _document(known_arms({"topk": Known()}), 0).keys()


def test_of_several_rates_the_best_of_each_architecture_is_compared() -> None:
    rows = known_arms({"topk": Known(), "relu": Known(1.2)})
    # Of a third rate one seed is the best of all, and the other diverged: laws take it for lost, and so do these.
    others = [
        r | {"cell_id": f"{r['cell_id']}-{lr}", "lr": lr, "nmse": factor * r["nmse"]}
        for r in rows for lr, factor in ((4e-3, 1.5), (1e-2, 0.8 if r["seed"] else 9.0))
    ]  # fmt: skip
    document = _document(rows + others, 0)["comparison"]
    assert document == _document(rows, 0)["comparison"]
    assert document[0]["cells"] == len(rows)


def test_sentences_say_who_leads_and_what_limits_it() -> None:
    said = outcome(compared(known_arms(THREE)))
    assert said[0].startswith("At N = 4,096 and L0 = 16 topk leads of 3 architectures, with nmse 0.2")
    assert said[0].endswith("It leads at 12 of the 12 pairs of N and L0.")
    assert said[1:] == [
        "In order of nmse at equal N and L0, the lowest first: topk < relu < pca.",
        "Every trained architecture beats pca at every N and L0 that they share.",
    ]
    few = compared(known_arms({**THREE, "gated": Known(2.0, l0=0.5)}, seeds=(0,), ks=(16,), sizes=(512, 1024)))
    left, scatter = limits([few])
    assert left.startswith("not compared at equal L0")
    assert "gated at N = 512, k = 16: its L0 is 8" in left
    assert "no seed repeats" in scatter
    # What holds for several sources is said once.
    rows = [row | {"site": f"resid_post.{n}"} for n in (1, 2) for row in known_arms(THREE, seeds=(0,), ks=(16,))]
    (scatter,) = limits(compare(Table.from_rows(rows)))
    assert scatter.startswith("resid_post.1, resid_post.2: differences between architectures have ")
    assert "topk, relu, pca" in outcome(few)[1]
    assert outcome(compared(known_arms({"topk": Known(), "switch": Known(2.0), "pca": Known(1.5)}, ks=(8,))))[
        -1
    ].startswith("Worse than a baseline: switch than pca at N = 512, L0 = 8 (+3")


def test_unequal_budgets_are_said() -> None:
    rows = known_arms(THREE, sizes=(512, 1024), ks=(16,))
    assert not any("tokens" in text for text in limits([compared(rows)]))
    longer = [r | {"tokens": 2 * r["tokens"]} if r["architecture"] == "relu" else r for r in rows]
    (said,) = (text for text in limits([compared(longer)]) if "tokens" in text)
    assert "N = 512, k = 16: topk on 4000000 and relu on 8000000" in said


@pytest.mark.parametrize("seed", range(25))
def test_whatever_cells_there_are(seed: int) -> None:
    """Some cells of a sweep, a few of them odd: everything is made of them, in numbers that JSON has."""
    rng = np.random.default_rng(seed)
    everything = known_arms(ALL)
    rows = [dict(everything[i]) for i in rng.choice(len(everything), int(rng.integers(2, 30)), replace=False)]
    for row in rows:
        odd = rng.random()
        if odd < 0.15:
            row["l0"] *= float(rng.choice([0.3, 0.93, 1.2, 5.0]))
        elif odd < 0.3:
            row[str(rng.choice(["dead_fraction", "flops", "levels"]))] = None
        elif odd < 0.4:
            row["nmse"] = float(rng.choice([1e-6, 0.999]))
    curves = known_curves([row for row in rows if row["flops"] and rng.random() < 0.9])[:: int(rng.integers(1, 30))]
    for found in compare(Table.from_rows(rows), Table.from_rows(curves) if curves else None):
        json.dumps(found.document(), allow_nan=False)
        assert [*outcome(found), *limits([found]), *ratios(found), *hierarchy(found)]
        assert comparison_tables(found) or not found.order.architectures
        for view in views_of_comparison(found, {}):
            json.dumps(plot(view), allow_nan=False)
