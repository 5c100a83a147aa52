"""Of cells that differ in choices of training alone laws see the best, and it is said which."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saescale.scaling.laws.best import find_best
from saescale.scaling.laws.fit import fit_all, fit_laws
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table

Rows = list[dict[str, Any]]
SIZES, KS = (512, 1024, 2048, 4096), (8, 16, 32)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)


def swept(rows: Rows, seeds: int = 1, **axes: tuple[Any, ...]) -> Rows:
    """Each cell at every value of the axes, the best of which is at its index N / 1024, rounded, from the end."""
    found = []
    for row in rows:
        right = int(np.log2(row["n_latents"] / 512))
        for axis, values in axes.items():
            for i, value in enumerate(values):
                for seed in range(seeds):
                    worse = np.exp(0.01 * (i - (len(values) - 1 - right) % len(values)) ** 2)
                    found.append(row | {axis: value, "seed": seed, "nmse": row["nmse"] * worse * (1 + 1e-3 * seed)})
    return found


def test_a_law_of_swept_cells_is_that_of_the_best(cells: Callable[..., Rows]) -> None:
    """By brute force: only the winners in a table give the same fits."""
    rows = swept(cells(SIZES, KS, noise=0.002), seeds=2, lr=RATES)
    settings = FitSettings(40, laws=("n_k", "n"))
    found = fit_all(Table.from_rows(rows), settings=settings)
    winners = []
    for n in SIZES:
        for k in KS:
            own = [row for row in rows if (row["n_latents"], row["k"]) == (n, k)]
            means = {lr: np.mean([row["nmse"] for row in own if row["lr"] == lr]) for lr in RATES}
            winners += [row for row in own if row["lr"] == min(means, key=lambda lr: means[lr])]
    alone = fit_all(Table.from_rows(winners), settings=settings)
    assert [entry["coefficients"] for entry in found["fits"]] == [entry["coefficients"] for entry in alone["fits"]]
    assert found["cells"] == len(rows)
    assert {entry["points"] for entry in found["fits"] if entry["law"] == "n_k"} == {24}
    note = next(text for text in found["warnings"] if "take the best lr" in text)
    assert "won 0.0008 at N = 512, 0.0004 at N = 1024, 0.0002 at N = 2048, 0.0001 at N = 4096" in note
    assert "the best of 4 is low by chance by up to" in note
    edges = [text for text in found["warnings"] if "may lie beyond" in text]
    assert len(edges) == 2
    assert "the best lr is the smallest that was tried at N = 4096, k = 8; N = 4096, k = 16" in edges[0]
    (axis,) = found["best_over"]
    assert axis["axis"] == "lr"
    assert axis["winners"][0] == {"n_latents": 512.0, "k": 8.0, "value": 8e-4, "edge": "largest"}
    assert "24 cells" not in str(alone["warnings"])
    assert alone["best_over"] == []


@pytest.mark.parametrize(
    ("axis", "values", "said"),
    [
        ("batch_tokens", (256, 512), "batch_tokens"),
        ("k_aux", (0, 64, 256), "k_aux"),
        ("settings", tuple(json.dumps({"balance": b, "stream_seed": 0}) for b in (1.0, 2.0, 3.0)), "balance"),
        ("settings", tuple(json.dumps({"variant": v}) for v in ("relu", "ste")), "variant"),
        ("settings", tuple(json.dumps({"multi_topk": v}) for v in (False, True)), "multi_topk"),
        ("tokens", (10**6, 2 * 10**6), "tokens"),
    ],
)
def test_every_choice_of_training_is_an_axis(
    cells: Callable[..., Rows], axis: str, values: tuple[Any, ...], said: str
) -> None:
    table = Table.from_rows(swept(cells(SIZES, KS), **{axis: values}))
    laws = fit_laws(table, settings=FitSettings(0, laws=("n_k",)))
    assert len(laws.largest.results) == len(SIZES) * len(KS)
    assert [entry["axis"] for entry in laws.document()["best_over"]] == [said]
    assert not any("fitted together differ" in note for note in laws.warnings)
    assert not any("of tokens is the" in note for note in laws.warnings)


@pytest.mark.parametrize(
    "change",
    [
        lambda row, i: {"lr": 1e-3 * row["n_latents"] ** -0.5},  # a rule
        lambda row, i: {"tokens": 100 * row["n_latents"] + i % 2},  # rounded to batches
        lambda row, i: {"seed": i},
        lambda row, i: {"precision": ("fp32", "bf16")[i % 2]},  # no number
        lambda row, i: {"settings": json.dumps({"coefficient": i})},  # moves L0
        lambda row, i: {"settings": json.dumps({"stream_seed": i})},
        lambda row, i: {"settings": ("", "{", "[1]")[i % 3]},
        lambda row, i: {"lr": None if i == 1 else 1e-3 * (i + 1)},  # not known of all
    ],
)
def test_what_is_no_choice_is_no_axis(cells: Callable[..., Rows], change: Callable[..., dict[str, Any]]) -> None:
    rows = cells(SIZES, KS)
    table = Table.from_rows([row | change(row, i) for row in rows for i in range(3)])
    best = find_best(table, np.zeros(len(table), dtype=bool))
    assert best.axes == ()
    assert best.rows.all()


def test_a_law_that_names_an_axis_sees_all_of_it(cells: Callable[..., Rows]) -> None:
    rows = [
        row | {"tokens": tokens, "nmse": row["nmse"] + tokens**-0.4}
        for row in cells(SIZES, (8,))
        for tokens in (10**5, 10**6, 10**7)
    ]
    document = fit_all(Table.from_rows(rows), settings=FitSettings(0, laws=("n_d", "n")))
    assert {(entry["law"], entry["points"]) for entry in document["fits"]} == {("n_d", 12), ("n", 4)}


def test_a_choice_that_diverges_with_one_seed_loses(cells: Callable[..., Rows]) -> None:
    rows = swept(cells(SIZES, (8,)), seeds=2, lr=RATES)
    wild = [row | {"nmse": 7.0 if row["seed"] else 0.01} if row["lr"] == 4e-4 else row for row in rows]
    laws = fit_laws(Table.from_rows(wild), settings=FitSettings(0, laws=("n",)))
    assert 4e-4 not in set(laws.largest.results["lr"])
    assert any("4 cells with nmse above 1" in note for note in laws.warnings)


def test_how_low_the_best_is_by_chance() -> None:
    """Of five equally good rates with two seeds each, over many sweeps: no more than it says, and about that."""
    rng = np.random.default_rng(0)
    low, said = [], []
    for _ in range(200):
        rows = [
            {"n_latents": n, "k": 8, "lr": lr, "seed": seed, "nmse": 0.3 * np.exp(0.01 * rng.standard_normal())}
            for n in (256, 512, 1024)
            for lr in range(5)
            for seed in range(2)
        ]
        table = Table.from_rows(rows)
        best = find_best(table, np.zeros(len(table), dtype=bool))
        low.append(-np.log(table["nmse"][best.rows] / 0.3).mean())
        assert best.chance is not None
        said.append(best.chance)
    assert np.mean(said) == pytest.approx(np.mean(low), rel=0.1)
