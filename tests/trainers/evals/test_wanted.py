"""What evaluations are asked for, of which cells and how many latents: as sweep files and commands say it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.evals.evaluation import EVALUATIONS
from saescale.trainers.evals.sample import latents_to_look_at
from saescale.trainers.evals.wanted import Wanted, each_once, entries

ROWS = [
    {"cell_id": f"{architecture}-{n}-{k}", "n_latents": n, "k": k, "architecture": architecture, "lr": 1e-3 * k}
    for architecture in ("topk", "relu") for n in (64, 128) for k in (4, 8)
]  # fmt: skip
SOME = """
needs = frozenset()
latents = 8

def measure(trained, source, subject, latents):
    return []
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation `some` that looks at some latents."""
    (tmp_path / "mine" / "evals").mkdir(parents=True)
    (tmp_path / "mine" / "evals" / "some.py").write_text(SOME)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("where", "cells"),
    [
        ({}, 8),
        ({"k": 8}, 4),
        ({"n_latents": [64, 128], "k": "8"}, 4),
        ({"n_latents": [64, 4096], "k": [8]}, 2),
        ({"architecture": "topk", "N": 64}, 2),
        ({"lr": 0.004}, 4),
        (["k>=5", "n_latents<128"], 2),
        ("architecture!=topk", 4),
        (None, 8),
        ({"k": 5}, 0),
        ({"architecture": "gated"}, 0),
    ],
    ids=str,
)
def test_cells_are_those_that_meet_all_conditions(where: Any, cells: int) -> None:
    entry = Wanted.of({"core": {"where": where}})
    assert len(entry.select(ROWS, "run")) == cells
    if not cells:
        assert "run: no finished cell with --where" in entry.no_cell(ROWS, "run")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"core": {"latent": 3}}, "latent: Extra inputs are not permitted"),
        ({"core": {"latents": 0}}, "latents: Input should be greater than 0"),
        ({"core": {"latents": "many"}}, "latents: Input should be a valid integer"),
        ({"core": 3}, "core takes `latents` and `where`"),
        ({"core": {}, "nmse": {}}, "one name with `latents` and `where`"),
        ({"core": {"where": {"k": []}}}, "core: where: k has no value"),
        ({"core": {"where": {"k": {"above": 3}}}}, "core: where: k has no value"),
        ({"core": {"where": ["k"]}}, "core: --where k: write a column"),
        (7, "valid dictionary"),
    ],
    ids=str,
)
def test_what_is_no_entry_is_one_line(entry: Any, said: str) -> None:
    with pytest.raises(SaescaleError, match="evaluations: ") as error:
        Wanted.of(entry)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_entry_is_written_as_it_was_given(own: None) -> None:
    for entry in (
        "core",
        {"some": {"latents": 32, "where": {"n_latents": [64], "k": 8}}},
        {"core": {"where": ["k>4"]}},
    ):
        assert Wanted.of(entry).model_dump() == entry
        assert Wanted.of(Wanted.of(entry).model_dump()) == Wanted.of(entry)
    assert Wanted.of("downstream-loss") == Wanted.of({"downstream_loss": None}) == Wanted.of({"downstream_loss": {}})
    assert each_once([Wanted.of("core"), Wanted.of("core")]) == [Wanted.of("core")]
    with pytest.raises(SaescaleError, match="some stands there twice"):
        each_once([Wanted.of("some"), Wanted.of({"some": {"latents": 3}})])


def test_what_a_command_asks_for(own: None, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    names = lambda *a, **more: [entry.model_dump() for entry in entries(run, *a, **more)]  # noqa: E731
    assert names() == ["core", "downstream_loss"]
    assert names(["all"]) == list(EVALUATIONS.names())
    assert names(["some"], latents=5, where=["k=8"]) == [{"some": {"latents": 5, "where": ["k=8"]}}]
    assert names(["core", "some"], latents=5) == ["core", {"some": {"latents": 5}}]
    with pytest.raises(SaescaleError, match=r"core looks at all latents, so there is no number to give; .*some look"):
        names(["core", "nmse"], latents=5)
    with pytest.raises(SaescaleError, match="unknown evaluation 'cor': did you mean core"):
        names(["cor"])
    of_sweep = [{"some": {"latents": 3, "where": {"k": 4}}}, {"core": {"where": {"k": 8}}}]
    run.write_spec({"name": "a", "eval": {"evaluations": of_sweep}, "resolved": {}})
    assert names() == ["downstream_loss", *of_sweep]
    assert names(where=["k=2"])[1] == {"some": {"latents": 3, "where": ["k=2"]}}
    assert names(["some"]) == ["some"]  # what is named is what is said here


def test_latents_are_drawn_alike_among_those_that_fire() -> None:
    fired = np.random.default_rng(1).integers(0, 3, 300)
    some = latents_to_look_at(fired, 20)
    assert some.dtype == np.int64
    assert len(some) == 20
    assert (np.diff(some) > 0).all()
    assert (fired[some] > 0).all()
    assert set(some) < set(latents_to_look_at(fired, 50))
    assert set(some) != set(latents_to_look_at(fired, 20, seed=1))
    assert latents_to_look_at(fired, 1_000).tolist() == np.flatnonzero(fired).tolist()
    assert latents_to_look_at(np.zeros(5, int), 3).tolist() == []
    # Each as often as any other.
    often = np.bincount(np.concatenate([latents_to_look_at(np.ones(10), 3, seed) for seed in range(2_000)]))
    assert often.min() > 500
    assert often.max() < 700
