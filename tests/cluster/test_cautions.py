"""Settings that make a result empty are said before anything is trained, by `sweep` and by `submit`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saescale.cluster.crew import train_crew
from saescale.cluster.jobs import service
from saescale.cluster.sweep.cautions import cautions
from saescale.cluster.sweep.extend import read_extension
from saescale.cluster.sweep.spec import parse_spec
from saescale.storage.errors import SaescaleError
from tests.cluster.command import assert_one_line, saescale_here

D_MODEL = 32  # of `store`

EMPTY = [
    (
        {"auxk": {"k": 8, "dead_after_tokens": 16_384}}, {},
        "cells train on 16,384 tokens or fewer and a latent counts as dead after 16,384: AuxK never runs and the dead "
        "fraction is 0 by construction; lower train.auxk.dead_after_tokens",
    ),
    (
        {"auxk": {"k": 48, "dead_after_tokens": 4_096}}, {},
        "AuxK takes 48 latents and cells of N = 32 have fewer: there it takes all that are dead",
    ),
    (
        {}, {"k": [4, 16, 24]},
        "k = 16, 24 is half of d_model = 32 or more: nmse falls there because rows have no more dimensions, and laws "
        "are for k much smaller",
    ),
    (
        {"tokens": {"at": 64, "tokens": 16_384, "exponent": 1}}, {},
        "cells of N = 32 have fewer than 3 points on their curve (nmse is measured every 4,096 tokens): laws of "
        "compute and convergence pass them over; lower eval.every_tokens",
    ),
]  # fmt: skip


def changed(document: dict[str, Any], train: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    return document | {"train": document["train"] | train, "grid": document["grid"] | grid}


@pytest.mark.parametrize(("train", "grid", "said"), EMPTY, ids=["AuxK never", "k_aux", "k", "curve"])
def test_sweep_and_submit_say_it_at_once(
    document: dict[str, Any], sweep_file: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch,
    train: dict[str, Any], grid: dict[str, Any], said: str,
) -> None:  # fmt: skip
    def nobody(*_: Any, **__: Any) -> None:
        raise SaescaleError("there is no cluster today")

    monkeypatch.setattr(train_crew, "TrainCrew", nobody)
    monkeypatch.setattr(service, "Service", nobody)
    monkeypatch.setattr(service, "require_shared", lambda *_: None)
    url = sweep_file(changed(document, train, grid))
    for command in ("sweep", "submit"):
        result = saescale_here(command, url)
        assert "there is no cluster today" in result.stderr
        assert [line for line in result.stdout.splitlines() if "warning: " in line] == [f"warning: {said}"]
        assert not Path(document["out"]).exists()


def test_as_many_latents_as_dimensions_are_an_error(
    document: dict[str, Any], sweep_file: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "require_shared", lambda *_: None)
    url = sweep_file(changed(document, {}, {"k": [4, 32]}))
    for command in ("sweep", "submit"):
        assert_one_line(saescale_here(command, url), "grid.k: k = 32 is not below d_model = 32")
        assert not Path(document["out"]).exists()


def test_nothing_is_said_of_a_sweep_that_is_all_right(document: dict[str, Any]) -> None:
    assert cautions(parse_spec(document, "test"), D_MODEL) == []
    # Of a store that is not seen from here, what is known is said.
    assert cautions(parse_spec(changed(document, *EMPTY[2][:2]), "test"), None) == []
    assert len(cautions(parse_spec(changed(document, *EMPTY[0][:2]), "test"), None)) == 1
    by_size = {"tokens": {"at": 64, "tokens": 8_192, "exponent": 1.0}, "auxk": {"dead_after_tokens": 8_192}}
    said, curves = cautions(parse_spec(changed(document, by_size, {}), "test"), D_MODEL)
    assert said.startswith("cells of N = 32, 64 train on 8,192 tokens or fewer")
    assert curves.startswith("cells of N = 32, 64 have fewer than 3 points")


@pytest.mark.parametrize(("batch", "tokens", "every"), [(256, 16_384, 512), (131_072, 2**20, 131_072), (256, 256, 256)])
def test_a_curve_has_about_50_points_where_nobody_said_how_many(
    document: dict[str, Any], batch: int, tokens: int, every: int
) -> None:
    del document["eval"]["every_tokens"]
    document["train"] |= {"batch_tokens": batch, "tokens": tokens}
    spec = parse_spec(document, "test")
    assert spec.eval.every_tokens == every
    assert spec.eval.tokens == document["eval"]["tokens"]
    assert parse_spec(spec.model_dump(mode="json"), "written").eval == spec.eval
    document["eval"]["every_tokens"] = 100  # on purpose
    assert parse_spec(document, "test").eval.every_tokens == 100


def test_an_extension_that_leaves_it_open_is_evaluated_like_the_sweep(
    document: dict[str, Any], sweep_file: Callable[[Any], str]
) -> None:
    del document["eval"]["every_tokens"]
    document["train"]["tokens"] = {"at": 64, "tokens": 16_384, "exponent": 1.0}
    spec = parse_spec(document, "test")
    more = sweep_file(document | {"grid": {"n_latents": [1_024], "k": [4]}})
    assert read_extension(spec, more).eval == spec.eval


def test_auxk_is_spoken_of_only_where_a_cell_has_it(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead fraction is 0 by construction for every architecture; AuxK is TopK's."""
    page = (Path(__file__).parents[2] / "trainers" / "architectures" / "README.md").read_text()
    (tmp_path / "architectures").mkdir()
    (tmp_path / "architectures" / "toy.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    late = {"auxk": {"k": 48, "dead_after_tokens": 16_384}}
    for train, grid, more in (
        (late, {"architecture": ["toy"]}, ["train.auxk.k = 48 does nothing: toy has nothing of the kind"]),
        ({"auxk": late["auxk"] | {"k": 0}}, {}, []),
        ({"auxk": late["auxk"] | {"k": 0}}, {"architecture": ["toy"]}, []),
    ):
        said, *others = cautions(parse_spec(changed(document, train, grid), "test"), D_MODEL)
        assert "the dead fraction is 0 by construction" in said
        assert "AuxK" not in said
        assert others == more
