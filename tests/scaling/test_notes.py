"""What people read of documents of several kinds stays short, however many there are."""

from typing import Any

import numpy as np

from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.notes import (
    coefficient_rows,
    fit_notes,
    kind_rows,
    kinds_of_document,
    law_label,
    of_kind,
    rate_rows,
)
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

Rows = list[dict[str, Any]]
SIZES = (512, 1024, 2048, 4096, 8192)


def of_kinds(architectures: int, sites: int) -> Rows:
    rng = np.random.default_rng(0)
    return [
        {
            "architecture": f"a{i}", "site": f"resid_post.{layer}", "n_latents": n, "k": 8, "l0": 8.0,
            "dead_fraction": 0.2, "nmse": 0.5 * (n / 512) ** -0.2 * np.exp(0.02 * rng.standard_normal()),
        }
        for i in range(architectures) for layer in range(sites) for n in SIZES[: 5 if i else 2]
    ]  # fmt: skip


def test_many_kinds_stay_readable() -> None:
    laws = fit_laws(Table.from_rows(of_kinds(7, 5)), settings=FitSettings(0, laws=("n",)))
    assert len(laws.kinds) == 35
    document = laws.document()
    notes = fit_notes(document)
    assert len(notes) < 25
    assert max(map(len, notes)) < 900
    # The sites of a0 have too few cells.
    few = "not fitted: n at k = 8 (a0 at resid_post.0, a0 at resid_post.1, "
    assert [note for note in notes if note.startswith(few)]
    rows = kind_rows(document)
    assert len(rows) == 2 * 30
    assert [kind for _, kind, _ in rows][:3] == ["a1 at resid_post.0", "a1 at resid_post.1", "a1 at resid_post.2"]
    assert len({label for label, _, _ in rows[:30]}) == 1


def test_numbers_that_differ_from_kind_to_kind_are_written_twice() -> None:
    def entry(i: int) -> dict[str, Any]:
        return {
            "law": "n_k", "at": {}, "floor": True, "of": {"architecture": f"a{i}"},
            "warnings": [f"lack of fit (F = {i}.5, p = 1e-{i})", "few starts"],
        }  # fmt: skip

    document = {"skipped": [], "warnings": [], "fits": [entry(i) for i in range(1, 8)]}
    assert fit_notes(document) == [
        "n_k, with floor (a1): lack of fit (F = 1.5, p = 1e-1)",
        "n_k, with floor (a2): lack of fit (F = 2.5, p = 1e-2)",
        "n_k, with floor (a3, a4, a5, a6, a7): likewise, with other numbers (--json has them)",
        "n_k, with floor of all kinds: few starts",
    ]


def test_of_many_kinds_those_are_named_that_are_few() -> None:
    def entry(i: int, warned: bool, k: int = 8) -> dict[str, Any]:
        of = {"architecture": f"a{i:02d}"}
        return {"law": "n", "at": {"k": k}, "floor": False, "of": of, "warnings": ["few starts"] if warned else []}

    def notes(lacking: range) -> list[str]:
        fits = [entry(i, i not in lacking, k) for i in range(30) for k in ((8, 16) if i % 2 else (16, 8))]
        return fit_notes({"skipped": [], "warnings": [], "fits": fits})

    assert notes(range(0)) == ["n at k = 8, 16 of all kinds: few starts"]
    assert notes(range(3, 5)) == ["n at k = 8, 16 of all kinds but a03, a04: few starts"]
    assert notes(range(10)) == ["n at k = 8, 16 of 20 of 30 kinds: few starts"]
    assert notes(range(2, 30)) == ["n at k = 8, 16 (a00, a01): few starts"]


def test_one_kind_of_a_document() -> None:
    document = fit_laws(Table.from_rows(of_kinds(2, 1)), settings=FitSettings(0, laws=("n",))).document()
    kinds = kinds_of_document(document)
    assert kinds == [{"architecture": "a1"}, {"architecture": "a0"}]
    own = of_kind(document, kinds[0])
    assert [law_label(entry) for entry in document["fits"]] == ["a1: n at k = 8", "a1: n at k = 8, with floor"]
    assert [law_label(entry) for entry in own["fits"]] == ["n at k = 8", "n at k = 8, with floor"]
    assert of_kind(document, kinds[1])["fits"] == []
    assert {row.kind for row in coefficient_rows(document)} == {"a1"}


def test_rows_of_best_rates() -> None:
    rates = [
        {"architecture": a, "n_latents": n, "k": 8, "lr": lr, "nmse": 0.4 * np.exp(0.05 * np.log(lr / best) ** 2)}
        for a, g in (("topk", -0.5), ("gated", 0.0))
        for n in SIZES[:3]
        for best in [1e-3 * (n / 512) ** g]
        for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)
    ]
    document = fit_laws(Table.from_rows(rates), settings=FitSettings(0, laws=("n",))).document()
    topk, gated = rate_rows(document)
    assert gated[:2] == ("gated", "8")
    assert topk[2].startswith("-0.5 (-0.5 to -0.5)")
    assert topk[4] == "nmse 2.43% higher"  # 0.05 (0.5 ln 4)^2
    assert gated[4] == "nmse 0.00% higher"
