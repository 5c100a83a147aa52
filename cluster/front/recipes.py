"""The sizes of the quickstart of each subject, and which of them this machine finishes within a quarter of an hour.

A timing may choose the recipe, since the recipe is stated and recorded; what it never chooses is the precision.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

NOTE = "quickstart.json"  # in the run directory: which recipe, and what the machine was found to do
WITHIN_S = 11 * 60.0  # of the quarter of an hour: timings of a few seconds are no promise
_KS = (8, 16, 32, 64)


class Recipe(NamedTuple):
    """What is harvested and what is trained on it. Of `rows` every cell sees some passes, `tokens` in all."""

    name: str
    rows: int
    heldout: int
    tokens: int
    n_latents: tuple[int, ...]
    k: tuple[int, ...] = _KS
    batch_tokens: int = 1_024
    dead_after_tokens: int = 65_536
    ema: float = 0.99
    every_tokens: int = 98_304  # between two points of a curve

    @property
    def cells(self) -> int:
        return len(self.n_latents) * len(self.k)


# From the most to the least work. Each has four N and four k at least, and nmse falls in N at every k.
RECIPES = (
    Recipe("full", 262_144, 32_768, 1_048_576, (512, 1_024, 2_048, 4_096, 8_192)),
    Recipe("large", 163_840, 16_384, 655_360, (512, 1_024, 2_048, 4_096, 8_192), every_tokens=65_536),
    Recipe("medium", 98_304, 8_192, 393_216, (512, 1_024, 2_048, 4_096), _KS, 1_024, 32_768, 0.98, 32_768),
    Recipe("small", 49_152, 4_096, 196_608, (256, 512, 1_024, 2_048), _KS, 512, 16_384, 0.98, 16_384),
)
TINY = Recipe("tiny", 4_096, 1_024, 16_384, (256, 512), (8, 16), 256, 4_096, 0.9, 4_096)
_BOARD_KS = (4, 8, 16, 32, 64)
OF_SUBJECT: Mapping[str, Sequence[Recipe]] = {
    "smollm2-135m": (*RECIPES, TINY),
    # One pass each: games have no end. Small enough for any two cores, so nothing is timed.
    "othello": (
        Recipe("full", 1_048_576, 32_768, 1_048_576, (128, 256, 512, 1_024), _BOARD_KS, 512, 65_536, 0.99, 131_072),
        Recipe("tiny", 16_384, 2_048, 16_384, (64, 128), (8, 16), 256, 4_096, 0.9, 8_192),
    ),
}
DEFAULT = "smollm2-135m"


class Speed(NamedTuple):
    """What a machine does with all its cores."""

    precision: str  # of the products
    flops_per_s: float  # of products like those of the subject and of the encoders
    gather_s: float  # a token's: the sum of 32 rows of a decoder


# SmolLM2-135M up to layer 22; how much of the products' speed its forward pass has; the sparse part of a step in
# gathers; Ray, laws, figures. From a full run on two cores of a Zen 4: 858 s, a quarter of that the harvest.
_D_MODEL = 576
_SUBJECT_FLOPS = 163e6
_SUBJECT_SHARE = 0.55
_GATHERS = 5.5
_FIXED_S = 120.0


def predicted_s(recipe: Recipe, speed: Speed) -> float:
    """Seconds from nothing to the report, downloads aside."""
    harvest = (recipe.rows + recipe.heldout) * _SUBJECT_FLOPS / (_SUBJECT_SHARE * speed.flops_per_s)
    evaluated = recipe.tokens / recipe.every_tokens * recipe.heldout  # rows
    product = 2 * _D_MODEL * sum(recipe.n_latents) * len(recipe.k)  # FLOPs of a token, of all cells
    products = product * (recipe.tokens + evaluated) / speed.flops_per_s
    sparse = _GATHERS * speed.gather_s * recipe.cells * (recipe.tokens + 0.3 * evaluated)
    return harvest + products + sparse + _FIXED_S


def measure_speed() -> Speed:
    """Of this machine, in about 3 seconds; a GPU counts as fast enough for anything here."""
    import torch
    from torch.nn import functional as F

    from saescale.trainers.device import default_device, fast_precision

    device = default_device()
    precision = fast_precision(device)
    if device.type != "cpu":
        return Speed(precision, float("inf"), 0.0)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(1_024, _D_MODEL).to(kind)
    shapes = [torch.randn(rows, _D_MODEL).to(kind) for rows in (1_536, 4_096)]
    product_s = _seconds(lambda: [F.linear(x, weight) for weight in shapes])
    decoder, values = torch.randn(8_192, _D_MODEL), torch.rand(1_024, 32)
    chosen = torch.randint(0, len(decoder), values.shape, generator=torch.Generator().manual_seed(0))
    gather_s = _seconds(lambda: F.embedding_bag(chosen, decoder, mode="sum", per_sample_weights=values))
    flops = sum(2 * len(x) * weight.numel() for weight in shapes)
    return Speed(precision, flops / product_s, gather_s / len(x))


def _seconds(work: Callable[[], object], for_s: float = 1.5) -> float:
    """Of one call in the mean: a machine that is busy now will be so later too."""
    work()
    began, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < for_s:
        work()
        calls += 1
    return took / calls


def choose(speed: Speed) -> Recipe:
    """The one with the most work that is predicted to end in time, else the one with the least."""
    return next((recipe for recipe in RECIPES if predicted_s(recipe, speed) <= WITHIN_S), RECIPES[-1])


def why(recipe: Recipe, speed: Speed) -> str:
    """One line: what was chosen, and by what."""
    own, full = (predicted_s(each, speed) / 60 for each in (recipe, RECIPES[0]))
    chosen = f"recipe {recipe.name}: {recipe.cells} cells of {recipe.tokens:,} tokens"
    if recipe == RECIPES[0]:
        return f"{chosen}, about {own:.0f} min here"
    did = f"{speed.flops_per_s / 1e9:.0f} GFLOP/s in {speed.precision} here"
    slow = "" if own * 60 <= WITHIN_S else "; only --tiny is quicker"
    return f"{chosen}, about {own:.0f} min ({did}; --recipe full would take about {full:.0f} min{slow})"


def find_recipe(name: str, subject: str = DEFAULT) -> Recipe | None:
    """None where that subject has none of that name, or no quickstart."""
    return next((recipe for recipe in OF_SUBJECT.get(subject, ()) if recipe.name == name), None)


def recorded_recipe(run: RunDirectory) -> tuple[str, Recipe] | None:
    """The subject and what a run directory was begun with; runs of saescale 0.1.0, which wrote no note, had the full
    recipe. Raises SaescaleError where the note says what there is not."""
    remedy = "restore it, or begin in another run directory (--out)"
    note = run.read_json(NOTE, remedy=remedy)
    if note is not None and isinstance(note.get("recipe"), str):
        subject = str(note.get("subject", DEFAULT))
        if (recipe := find_recipe(note["recipe"], subject)) is None:
            raise SaescaleError(f"{run.url}/{NOTE}: there is no recipe {note['recipe']} of {subject}; {remedy}")
        return subject, recipe
    return (DEFAULT, RECIPES[0]) if run.read_spec() is not None else None


def named(subject: str, recipe: Recipe | str | None) -> str:
    """What a quickstart is called where it has the default run directory."""
    name = recipe.name if isinstance(recipe, Recipe) else recipe
    return "-".join(["quickstart", *([subject] if subject != DEFAULT else []), *(["tiny"] if name == "tiny" else [])])


def settle(
    asked: str | None, out: str | None, say: Callable[[str], None], subject: str = DEFAULT
) -> tuple[Recipe, str]:
    """The recipe and its run directory: as asked, or as the run directory was begun, or what this machine can do,
    which is written down at once. `say` is told which and why, in one line.

    Raises SaescaleError for a subject that has no quickstart, and where the run directory was begun with another
    recipe or subject than the one that is asked for.
    """
    if subject not in OF_SUBJECT:
        raise SaescaleError(f"--subject {subject}: there is a quickstart of {' and '.join(OF_SUBJECT)}")
    url = out or f"runs/{named(subject, asked)}"
    wanted, run = find_recipe(asked, subject) if asked else None, RunDirectory(url)
    if asked and wanted is None:
        raise SaescaleError(f"--recipe {asked}: there are {', '.join(recipe.name for recipe in OF_SUBJECT[subject])}")
    begun = recorded_recipe(run)
    if begun and begun[0] != subject:
        raise SaescaleError(
            f"{url} was begun with the subject {begun[0]}, not {subject}; give this one another run directory (--out), "
            "or remove that one"
        )
    there = begun[1] if begun else None
    if there and wanted and there != wanted:
        raise SaescaleError(
            f"{url} was begun with the recipe {there.name}, not {wanted.name}; give this one another run directory "
            "(--out), or remove that one"
        )
    note: dict[str, Any] = {}
    if there:
        recipe = there
        say(f"recipe {recipe.name}, with which {url} was begun")
    elif wanted:
        recipe = wanted
        say(f"recipe {recipe.name}, as asked for")
    elif subject != DEFAULT:
        recipe = OF_SUBJECT[subject][0]
        say(f"recipe {recipe.name}: {recipe.cells} cells of {recipe.tokens:,} tokens")
    else:
        speed = measure_speed()
        recipe, note = choose(speed), speed._asdict()
        say(why(recipe, speed))
    if not there:
        run.write_json(NOTE, {"recipe": recipe.name, **({"subject": subject} if subject != DEFAULT else {}), **note})
    return recipe, url


def names() -> Sequence[str]:
    """Of all recipes, from the most to the least work."""
    return [recipe.name for recipe in (*RECIPES, TINY)]
