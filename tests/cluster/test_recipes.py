"""Which quickstart a machine gets, and that it keeps it."""

import json
from pathlib import Path

import pytest

from saescale.cluster.front import recipes
from saescale.cluster.front.quickstart import othello_steps, quickstart_steps
from saescale.cluster.front.recipes import NOTE, RECIPES, TINY, WITHIN_S, Recipe, Speed, choose, predicted_s, settle
from saescale.cluster.sweep.axes import several
from saescale.cluster.sweep.spec import load_spec
from saescale.scaling.laws.forms.n_k import N_K
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

ZEN_4 = Speed("bf16", 375e9, 2.1e-6)  # measured on two cores
AVX2 = Speed("fp32", 150e9, 3.5e-6)
OLD = Speed("fp32", 50e9, 8e-6)
H100 = Speed("bf16", float("inf"), 0.0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def becomes(speed: Speed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "measure_speed", lambda: speed)


@pytest.mark.parametrize(("speed", "name"), [(H100, "full"), (ZEN_4, "large"), (AVX2, "medium"), (OLD, "small")])
def test_a_machine_gets_what_it_finishes_in_a_quarter_of_an_hour(
    speed: Speed, name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    becomes(speed, monkeypatch)
    recipe, url = settle(None, None, said.append)
    assert (recipe.name, url) == (name, "runs/quickstart")
    assert predicted_s(recipe, speed) < 15 * 60
    assert len(said) == 1
    assert said[0].startswith(f"recipe {name}: {recipe.cells} cells")
    noted = json.loads((here / url / NOTE).read_text())
    assert (noted["recipe"], noted.get("precision")) == (name, speed.precision)


def test_the_prediction_is_that_of_the_run_that_was_timed() -> None:
    """14 min 18 s on two cores of a Zen 4, from nothing to the report."""
    assert predicted_s(RECIPES[0], ZEN_4) == pytest.approx(858, rel=0.1)


def test_a_run_that_was_begun_keeps_its_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    becomes(OLD, monkeypatch)
    assert settle(None, "run", said.append)[0].name == "small"
    becomes(H100, monkeypatch)
    assert settle(None, "run", said.append)[0].name == "small"
    assert said[-1] == "recipe small, with which run was begun"
    with pytest.raises(SaescaleError, match="run was begun with the recipe small, not full; give this one another run"):
        settle("full", "run", said.append)
    becomes(OLD, monkeypatch)
    assert settle("full", "other", said.append)[0].name == "full"
    assert settle(None, "other", said.append)[0].name == "full"
    RunDirectory("old").write_spec({"name": "quickstart", "resolved": {}})  # by 0.1.0, which made no note
    assert settle(None, "old", said.append)[0].name == "full"
    with pytest.raises(SaescaleError, match="--recipe huge: there are full, large, medium, small, tiny"):
        settle("huge", "new", said.append)
    assert not Path("new").exists()


@pytest.mark.parametrize("note", [{"recipe": "full", "subject": "chess"}, {"recipe": "huge"}])
def test_a_note_of_what_there_is_not_is_told_in_one_line(note: dict[str, str], here: Path) -> None:
    RunDirectory("run").write_json(NOTE, note)
    with pytest.raises(SaescaleError, match=r"run/quickstart\.json: there is no recipe \w+ of [\w-]+; restore it, or"):
        settle(None, "run", [].append)


def test_the_tiny_one_is_not_timed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "measure_speed", lambda: pytest.fail("timed"))
    assert settle("tiny", None, [].append) == (TINY, "runs/quickstart-tiny")


def test_othello_has_a_quickstart_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "measure_speed", lambda: pytest.fail("timed"))
    recipe, url = settle(None, None, [].append, "othello")
    assert (recipe.name, url) == ("full", "runs/quickstart-othello")
    assert settle("tiny", None, [].append, "othello")[1] == "runs/quickstart-othello-tiny"
    assert settle(None, url, [].append, "othello")[0] == recipe
    made = othello_steps(recipe, None, "off")
    assert (made.sweep.out, made.sweep.store) == (url, made.harvest.out)
    assert made.sweep.eval.tokens <= made.harvest.heldout_tokens
    assert len(made.sweep.grid.combinations()) == 20
    # As deploy/sweeps/othello.yaml trains.
    example = load_spec(str(Path(__file__).parents[2] / "deploy" / "sweeps" / "othello.yaml"))
    assert made.sweep.grid == example.grid
    assert (made.sweep.train.lr, made.sweep.train.batch_tokens) == (example.train.lr, example.train.batch_tokens)
    with pytest.raises(SaescaleError, match="was begun with the subject othello, not smollm2-135m; give this one"):
        settle(None, url, [].append)
    with pytest.raises(SaescaleError, match="--recipe large: there are full, tiny"):
        settle("large", "new", [].append, "othello")
    with pytest.raises(SaescaleError, match="--subject maze: there is a quickstart of smollm2-135m and othello"):
        settle(None, "new", [].append, "maze")
    assert not Path("new").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_has_cells_enough_for_a_law(recipe: Recipe) -> None:
    made = quickstart_steps(recipe, None, "off")
    grid = made.sweep.grid
    sizes = several(grid.n_latents)
    assert min(len(sizes), len(several(grid.k))) >= 4
    assert len(grid.combinations()) >= len(N_K.names) + 2
    assert max(sizes) / min(sizes) >= 8  # or exponents are local slopes
    assert made.sweep.eval.tokens == made.harvest.heldout_tokens
    assert made.sweep.store == made.harvest.out


def test_this_machine_can_be_timed() -> None:
    speed = recipes.measure_speed()
    assert speed.precision in ("fp32", "bf16")
    assert speed.flops_per_s > 1e8
    assert choose(speed) in RECIPES
    assert WITHIN_S < 15 * 60
