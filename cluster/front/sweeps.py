"""The commands that train: quickstart and sweep; and report, which writes again what they end with."""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from saescale.cluster.front.console import (
    Address,
    ArchitectureFile,
    Bootstraps,
    Extend,
    RetryFailed,
    SweepOut,
    SweepWandb,
    command,
    console,
    display,
    say,
    say_marked,
    say_stores,
    show_notes,
    use_architectures,
)
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.sweep.driver import SweepOutcome

Wandb = Annotated[str, typer.Option(help="auto (online when a key is configured, else offline), online, offline, off.")]


def quickstart(
    tiny: Annotated[bool, typer.Option("--tiny", help="A few thousand tokens and a 2x2 grid: --recipe tiny.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="full, large, medium, small, tiny (default: what 15 minutes allow here)."),
    ] = None,
    subject: Annotated[
        str, typer.Option(help="smollm2-135m, or othello: how much of a board that is known is recovered.")
    ] = "smollm2-135m",
    out: Annotated[str | None, typer.Option(help="Run directory (default: runs/quickstart).")] = None,
    wandb: Wandb = "auto",
) -> None:
    """From SmolLM2-135M to a fitted L(N, k): harvest, 16 or 20 cells, laws, report.

    It times this machine for a few seconds, and says which recipe it takes. Run again, it goes on where it was. Of
    othello there are full and tiny; its weights come with saescale, and it ends with a picture of boards as latents
    see them.

    Example: [bold]saescale quickstart --tiny[/]
    Example: [bold]saescale quickstart --subject othello[/]
    """
    from saescale.cluster.front.quickstart import next_commands, run_quickstart

    if tiny and recipe not in (None, "tiny"):
        raise SaescaleError(f"--tiny is a recipe, and --recipe {recipe} another: give one of them")
    with display() as shown:
        began = time.monotonic()
        outcome = run_quickstart("tiny" if tiny else recipe, out, wandb, shown, subject)
    _summary(outcome, time.monotonic() - began)
    if subject == "othello":
        _recovered(outcome)
    console.print("\n[bold]Next[/]")
    program = _program()
    for words, meaning in next_commands(outcome, subject):
        say(f"  {shlex.join((program, *words))}\n      {meaning}")


def sweep(
    spec: Annotated[str, typer.Argument(help="A sweep file (YAML); deploy/sweeps holds examples.")],
    out: SweepOut = None,
    address: Address = None,
    wandb: SweepWandb = None,
    bootstraps: Bootstraps = 1000,
    extend: Extend = None,
    retry_failed: RetryFailed = False,
    architecture_file: ArchitectureFile = None,
) -> None:
    """Trains every cell of a grid and fits the laws. Run again, it trains only what has no result yet.

    Example: [bold]saescale sweep deploy/sweeps/smollm2.yaml[/]
    """
    from saescale.cluster.sweep.driver import run_sweep
    from saescale.cluster.sweep.spec import load_spec
    from saescale.scaling.laws.settings import FitSettings

    use_architectures(architecture_file)
    loaded = load_spec(spec, out=out, wandb=wandb)
    if extend is not None:
        from saescale.cluster.sweep.extend import extend as extended

        loaded, added = extended(loaded, extend)
        console.print(f"{added} cells added to {loaded.size - added}", highlight=False)
    say_stores(loaded.stores)
    with display() as shown:
        began = time.monotonic()
        outcome = run_sweep(loaded, shown, address, FitSettings(bootstraps), extend is not None, retry_failed)
    _summary(outcome, time.monotonic() - began)
    law = next((entry["law"] for entry in outcome.fits["fits"]), None)
    say(f"\nNext: {command('fit', loaded.out, '--law', law) if law else command('status', loaded.out)}")


def report(
    run: Annotated[str, typer.Argument(help="URL of a run directory.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html (always written) or md besides it; may be given several times."),
    ] = None,
    bootstraps: Bootstraps = 1000,
) -> None:
    """Fits the laws again and writes fits.json, the figures and the report of a run directory.

    report.html is one page that needs no network; figures/ has each figure as PNG, PDF and SVG for a paper and as
    JSON for Plotly.

    Example: [bold]saescale report runs/quickstart --format md[/]
    """
    from saescale.cluster.sweep.identity import provenance_of
    from saescale.scaling.laws.settings import FitSettings
    from saescale.scaling.report.report import FILES, analyse
    from saescale.storage.rundir import RunDirectory
    from saescale.storage.writable import require_writable

    wanted = [name for name in FILES if name in (formats or ()) or name == "html"]
    if unknown := [name for name in formats or [] if name not in FILES]:
        raise SaescaleError(f"--format {unknown[0]}: there are {' and '.join(FILES)}")
    directory = RunDirectory(run)
    require_writable(run)
    provenance = provenance_of(directory, directory.read_spec())
    analyse(directory, FitSettings(bootstraps), provenance=provenance, formats=wanted)
    pages = [f"{run}/{FILES[name]}" for name in wanted]
    say(f"wrote {', '.join(pages)}, {run}/fits.json and {run}/figures/")
    say(f"Next: open {shlex.quote(pages[0])} in a browser")


def _summary(outcome: "SweepOutcome", wall_s: float) -> None:
    """What a sweep did, its coefficients, and where things lie."""
    from saescale.cluster.front.display import duration
    from saescale.storage.recorded import recorded_sources

    url = outcome.run.url
    if outcome.trained:
        done = f"{outcome.trained} of {outcome.cells} cells trained now, the others before"
        done = f"all {outcome.cells} cells trained" if outcome.trained == outcome.cells else done
    else:
        done = f"all {outcome.cells} cells were done"
    failed = f"; {outcome.failed} failed, see {command('status', url)}" if outcome.failed else ""
    say_marked(f"\n[bold green]{done}[/] in {duration(wall_s)}{escape(failed)}")
    console.print()
    _laws(outcome)
    console.print()
    for name, place in (
        ("report", f"{url}/report.html"), ("figures", f"{url}/figures/"), ("fits", f"{url}/fits.json"),
        ("results", f"{url}/results.parquet, curves.parquet"), ("trained SAEs", f"{url}/cells/*/sae*"),
        ("activations", ", ".join(source.url for source in recorded_sources(outcome.run.read_spec() or {}))),
    ):  # fmt: skip
        say(f"  {name:<13} {place}")
    if outcome.wandb:
        say(f"  {outcome.wandb}")


def _recovered(outcome: "SweepOutcome") -> None:
    """The laws of how much of the board is recovered, where it peaks, and where the picture lies."""
    from saescale.cluster.front.board_picture import METRICS, PICTURE
    from saescale.cluster.front.display import coefficient_table
    from saescale.scaling.laws.notes import metric_document

    for name in METRICS:
        own = metric_document(outcome.fits["metrics"], name)
        say(f"\n{name}, {own['better']} is better; laws are of {own['fitted']}")
        if own["fits"]:
            console.print(coefficient_table(own))
        for entry in own["skipped"]:
            say(f"no law: {entry['reason']}")
        for entry in outcome.fits["peaks"]:
            if entry["metric"] == name and entry["words"]:
                say(entry["words"])
    say(f"\n  boards        {outcome.run.url}/{PICTURE}")


def _laws(outcome: "SweepOutcome") -> None:
    """L(N, k) and its exponents, which is what a grid is for, and how to see the others."""
    from saescale.cluster.front.display import coefficient_table
    from saescale.scaling.laws.notes import fit_notes

    fitted = list(dict.fromkeys(entry["law"] for entry in outcome.fits["fits"]))
    shown = ["n_k"] if "n_k" in fitted else fitted[:1]
    if shown:
        console.print(coefficient_table(outcome.fits, shown))
    of_those = {key: [entry for entry in outcome.fits[key] if entry["law"] in shown] for key in ("fits", "skipped")}
    show_notes(fit_notes(outcome.fits | (of_those if shown else {})))
    if others := [law for law in fitted if law not in shown]:
        say(f"fitted too: {', '.join(others)}; {command('fit', outcome.run.url, '--law', others[0])}")


def _program() -> str:
    """How the user can call saescale from here: by name where the shell finds it, else by the path that ran."""
    ran = Path(sys.argv[0]).absolute()
    found = shutil.which("saescale")
    if found and Path(found).absolute() == ran:
        return "saescale"
    return os.path.relpath(ran) if ran.is_relative_to(Path.cwd()) else str(ran)
