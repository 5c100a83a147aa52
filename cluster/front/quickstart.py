"""`saescale quickstart`: from a subject to fitted laws on this machine: L(N, k) of SmolLM2-135M, and of a board of
Othello how much is recovered."""

import gc
from typing import Any, NamedTuple

from saescale.cluster.front.board_picture import draw_best_boards
from saescale.cluster.front.display import Display
from saescale.cluster.front.recipes import DEFAULT, RECIPES, TINY, Recipe, named, settle
from saescale.cluster.sweep.driver import SweepOutcome, run_sweep
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.storage.writable import require_lasting, require_writable
from saescale.trainers.device import set_threads, usable_cores
from saescale.trainers.harvest import conduct as harvesting
from saescale.trainers.harvest.conduct import HarvestSpec


class Steps(NamedTuple):
    harvest: HarvestSpec
    sweep: SweepSpec


def quickstart_steps(recipe: Recipe, out: str | None, wandb: str) -> Steps:
    """What the quickstart harvests and sweeps by a recipe; `out` replaces the run directory.

    On so little data it takes small batches, several passes and six times the paper's learning rate for cells to come
    near convergence (measured at k = 32 after 786,432 tokens: 4 times gives nmse 0.239 at N = 512 and 0.185 at 4096,
    8 times 0.239 and 0.176, 16 times 0.363 and 0.192). The dead window and the average of the weights are scaled to
    the short run.
    """
    of_size = "" if recipe.name == "full" else f"-{recipe.name}"
    sweep = _sweep(recipe, f"quickstart{of_size}", f"stores/smollm2-135m-l22{of_size}", out, wandb)
    sweep["train"]["lr"] = {"at": 16_384, "value": 1.2e-3, "exponent": -0.5}
    return _steps(recipe, {"subject": DEFAULT, "layer": 22}, sweep)


def othello_steps(recipe: Recipe, out: str | None, wandb: str) -> Steps:
    """The same on the third layer of the small model of Othello, which knows the board best with the fourth; trained as
    deploy/sweeps/othello.yaml says, whose learning rates were tried."""
    store = f"stores/othello-l2{'-tiny' if recipe.name == 'tiny' else ''}"
    sweep = _sweep(recipe, named("othello", recipe), store, out, wandb)
    sweep["train"]["lr"] = {"at": 512, "value": 4e-3, "exponent": -0.5}
    sweep["eval"] |= {
        "tokens": min(recipe.heldout, 16_384), "evaluations": ["core", "board_probe", "board_recovery"],
    }  # fmt: skip
    return _steps(recipe, {"subject": "othello", "layer": 2, "batch_contexts": 256}, sweep)


def _sweep(recipe: Recipe, name: str, store: str, out: str | None, wandb: str) -> dict[str, Any]:
    """A sweep file's keys, as far as the recipe says them: all but the learning rate."""
    return {
        "name": name,
        "store": store,
        "out": out or f"runs/{name}",
        "grid": {"n_latents": list(recipe.n_latents), "k": list(recipe.k)},
        "train": {
            "tokens": recipe.tokens,
            "batch_tokens": recipe.batch_tokens,
            "auxk": {"dead_after_tokens": recipe.dead_after_tokens},
            "ema": recipe.ema,
        },
        "eval": {"tokens": recipe.heldout, "every_tokens": recipe.every_tokens},
        "wandb": {"mode": wandb},
    }


def _steps(recipe: Recipe, harvest: dict[str, Any], sweep: dict[str, Any]) -> Steps:
    sizes = {"out": sweep["store"], "tokens": recipe.rows, "heldout_tokens": recipe.heldout}
    if recipe.name == TINY.name:
        sizes |= {"shard_rows": 4_096, "row_group_rows": 512}
    return Steps(HarvestSpec.model_validate(harvest | sizes), parse_spec(sweep, "the quickstart"))


def full_sweep() -> SweepSpec:
    """That of the full recipe, whose results are published in deploy/results."""
    return quickstart_steps(RECIPES[0], None, "off").sweep


def run_quickstart(
    asked: str | None, out: str | None, wandb: str, display: Display, subject: str = DEFAULT
) -> SweepOutcome:
    """Harvests what is missing, trains what is missing, fits, by the recipe that is asked for or fits this machine.

    Raises what `settle`, `harvest` and `run_sweep` raise.
    """
    set_threads(usable_cores())
    require_lasting(out or "runs")
    require_writable(out or "runs")
    require_writable("stores")
    recipe, url = settle(asked, out, display.stage, subject)
    todo = (quickstart_steps if subject == DEFAULT else othello_steps)(recipe, url, wandb)
    harvesting.harvest(todo.harvest, display.harvest)
    gc.collect()  # the subject is not needed any more, and the workers need its memory
    outcome = run_sweep(todo.sweep, display)
    if subject != DEFAULT:
        display.stage("drawing boards as latents see them")
        draw_best_boards(outcome.run)
    return outcome


def next_commands(outcome: SweepOutcome, subject: str = DEFAULT) -> list[tuple[tuple[str, ...], str]]:
    """The words of three commands of saescale that go on from here, and what each does."""
    finished = [row for row in outcome.run.read_results().to_pylist() if row["status"] == "done"]
    cells = [outcome.run.cell_url(min(finished, key=lambda row: row["nmse"])["cell_id"])] if finished else []
    law = (("fit", outcome.run.url, "--law", "n"), "one law again, with all coefficients; also of your own CSV")
    if subject != DEFAULT:
        of_metric = ("fit", outcome.run.url, "--metric", "board_recovery.coverage")
        law = (of_metric, "the same of another metric: how well single latents tell the board")
    return [
        law,
        *((("inspect", url), "the SAE with the lowest nmse") for url in cells),
        (
            ("sweep", f"{outcome.run.url}/sweep.yaml", "--out", "runs/mine"),
            "copy and edit this file to sweep your own grid",
        ),
    ]
