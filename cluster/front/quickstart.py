"""`saescale quickstart`: from SmolLM2-135M to a fitted L(N, k) on this machine."""

import gc
import os
from typing import NamedTuple

from saescale.cluster.front.display import Display
from saescale.cluster.sweep.driver import SweepOutcome, run_sweep
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.trainers.device import set_threads
from saescale.trainers.harvest import conduct as harvesting
from saescale.trainers.harvest.conduct import HarvestSpec


class Recipe(NamedTuple):
    harvest: HarvestSpec
    sweep: SweepSpec


def recipe(tiny: bool, out: str | None, wandb: str) -> Recipe:
    """What the quickstart harvests and sweeps; `out` replaces the run directory.

    On so little data it takes small batches, several passes and six times the paper's learning rate for cells to come
    near convergence (measured at k = 32 after 786,432 tokens: 4 times gives nmse 0.239 at N = 512 and 0.185 at 4096,
    8 times 0.239 and 0.176, 16 times 0.363 and 0.192). The dead window and the average of the weights are scaled to
    the short run.
    """
    name = "quickstart-tiny" if tiny else "quickstart"
    store = f"stores/smollm2-135m-l22{'-tiny' if tiny else ''}"
    sizes = {"tokens": 4_096, "heldout_tokens": 1_024, "shard_rows": 4_096, "row_group_rows": 512} if tiny else {}
    grid = {"n_latents": [512, 1024, 2048, 4096, 8192], "k": [8, 16, 32, 64]}
    if tiny:
        grid = {"n_latents": [256, 512], "k": [8, 16]}
    sweep = {
        "name": name,
        "store": store,
        "out": out or f"runs/{name}",
        "grid": grid,
        "train": {
            "tokens": 16_384 if tiny else 1_048_576,
            "batch_tokens": 256 if tiny else 1_024,
            "lr": {"at": 16_384, "value": 1.2e-3, "exponent": -0.5},
            "auxk": {"dead_after_tokens": 4_096 if tiny else 65_536},
            "ema": 0.9 if tiny else 0.99,
        },
        "eval": {"tokens": 1_024 if tiny else 32_768, "every_tokens": 4_096 if tiny else 98_304},
        "wandb": {"mode": wandb},
    }
    harvest = HarvestSpec.model_validate({"subject": "smollm2-135m", "layer": 22, "out": store, **sizes})
    return Recipe(harvest, parse_spec(sweep, "the quickstart"))


def run_quickstart(recipe: Recipe, display: Display) -> SweepOutcome:
    """Harvests what is missing, trains what is missing, fits. Raises what `harvest` and `run_sweep` raise."""
    set_threads(os.cpu_count() or 1)
    harvesting.harvest(recipe.harvest, display.harvest)
    gc.collect()  # the subject is not needed any more, and the workers need its memory
    return run_sweep(recipe.sweep, display)


def next_commands(outcome: SweepOutcome) -> list[tuple[str, str]]:
    """Three commands of saescale that go on from here, and what each does."""
    finished = [row for row in outcome.run.read_results().to_pylist() if row["status"] == "done"]
    cells = [outcome.run.cell_url(min(finished, key=lambda row: row["nmse"])["cell_id"])] if finished else []
    return [
        (f"fit {outcome.run.url} --law n", "one law again, with all coefficients; also of your own CSV"),
        *((f"inspect {url}", "the SAE with the lowest nmse") for url in cells),
        (f"sweep {outcome.run.url}/sweep.yaml --out runs/mine", "copy and edit this file to sweep your own grid"),
    ]
