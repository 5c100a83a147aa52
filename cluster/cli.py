"""The command line. Each command imports what it needs when it runs, so that `saescale --help` answers at once."""

import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from saescale.cluster.front import jobs as service_cli
from saescale.cluster.front import laws as laws_cli
from saescale.cluster.front.laws import console, show_notes
from saescale.storage.errors import SaescaleError, one_line

if TYPE_CHECKING:
    from saescale.cluster.front.display import ActorRow
    from saescale.cluster.sweep.driver import SweepOutcome

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measures how sparse autoencoders scale: harvest activations, sweep N and k, fit the laws.",
)

Corpus = Annotated[str, typer.Option(help="python-prose, or a path or URL of .txt, .jsonl or .parquet files.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster (default: RAY_ADDRESS, else a local one).")]
Wandb = Annotated[str, typer.Option(help="auto (online when a key is configured, else offline), online, offline, off.")]


def main() -> None:
    """Runs a command; what a user can act on becomes one line and status 2, the rest one line and status 1."""
    # Before torch is imported, here and in the workers: threads that spin while they wait make everything many times
    # slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A batch system's polite end is treated as Ctrl-C: the workers save their checkpoints first.
    signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in sys.argv
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # what typer makes of KeyboardInterrupt
            _say("interrupted; run the same command again to go on from here")
        raise
    except SaescaleError as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        _say(f"unexpected {type(error).__name__}: {one_line(error)} (traceback: saescale --debug COMMAND ...)")
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measures how sparse autoencoders scale: harvest activations, sweep N and k, fit the laws."""


@app.command()
def quickstart(
    tiny: Annotated[bool, typer.Option("--tiny", help="A few thousand tokens and a 2x2 grid.")] = False,
    out: Annotated[str | None, typer.Option(help="Run directory (default: runs/quickstart).")] = None,
    wandb: Wandb = "auto",
) -> None:
    """From SmolLM2-135M to a fitted L(N, k): harvest, 20 cells, laws, report. Run again, it goes on where it was.

    Example: [bold]saescale quickstart --tiny[/]
    """
    from saescale.cluster.front.quickstart import next_commands, recipe, run_quickstart

    steps = recipe(tiny, out, wandb)
    with _display() as display:
        began = time.monotonic()
        outcome = run_quickstart(steps, display)
    _summary(outcome, time.monotonic() - began, store=steps.sweep.store)
    console.print("\n[bold]Next[/]")
    program = _program()
    for command, meaning in next_commands(outcome):
        console.print(f"  {program} {command}\n      {meaning}", highlight=False, soft_wrap=True)


@app.command()
def harvest(
    subject: Annotated[str, typer.Argument(help="smollm2-135m, hf:<org>/<name> or hf:/path/to/folder.")],
    out: Annotated[str, typer.Option(help="URL of the activation store to write.")],
    layer: Annotated[int, typer.Option(help="The site is resid_post of this layer, counted from 0.")],
    corpus: Corpus = "python-prose",
    tokens: Annotated[int, typer.Option(help="Training rows.")] = 262_144,
    heldout_tokens: Annotated[int, typer.Option(help="Held-out rows, of other documents.")] = 32_768,
    context_length: Annotated[int, typer.Option(help="Text tokens per context.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16, as stored.")] = "float16",
    seed: Annotated[int, typer.Option(help="Of the split and the order of documents and rows.")] = 0,
    actors: Annotated[
        str | None, typer.Option(help="Ray actors that share the work: a number, or auto (one for each GPU or node).")
    ] = None,
    address: Address = None,
) -> None:
    """Writes the residual stream of a subject on a text into an activation store.

    Without --actors and --address this process does it alone. The store is the same whatever the number of actors.

    Example: [bold]saescale harvest hf:openai-community/gpt2 --layer 8 --corpus 'data/*.jsonl' --out stores/gpt2-l8[/]
    """
    from pydantic import ValidationError
    from saescale.trainers.device import set_threads
    from saescale.trainers.harvest.conduct import harvest as run_harvest
    from saescale.trainers.harvest.spec import HarvestSpec

    given = {
        "subject": subject, "out": out, "layer": layer, "corpus": corpus, "tokens": tokens, "dtype": dtype,
        "heldout_tokens": heldout_tokens, "context_length": context_length, "seed": seed,
    }  # fmt: skip
    try:
        spec = HarvestSpec.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise SaescaleError(f"harvest: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    crew: list[ActorRow] = []
    if actors is None and address is None:
        set_threads(os.cpu_count() or 1)
        with _display() as display:
            manifest = run_harvest(spec, display.harvest)
    else:
        wanted = _actors(actors or "auto")
        from saescale.cluster.crew.harvest import harvest_on_actors

        with _display() as display:
            manifest, crew = harvest_on_actors(spec, wanted, address, display.harvest)
    if crew:
        from saescale.cluster.front.display import actor_table

        console.print(actor_table(crew))
    rows, site = sum(shard.rows for shard in manifest.shards), f"{manifest.site.hook} of layer {manifest.site.layer}"
    console.print(f"{out}: {rows:,} rows of {manifest.subject}, {site}, d_model {manifest.d_model}")
    console.print(f"Next: saescale inspect {out}", highlight=False)


@app.command()
def sweep(
    spec: Annotated[str, typer.Argument(help="A sweep file (YAML); deploy/sweeps holds examples.")],
    out: Annotated[str | None, typer.Option(help="Run directory in place of the file's.")] = None,
    address: Address = None,
    wandb: Annotated[str | None, typer.Option(help="W&B mode in place of the file's.")] = None,
    bootstraps: Annotated[int, typer.Option(help="Bootstrap fits behind each interval.", min=0)] = 1000,
    extend: Annotated[
        str | None, typer.Option(help="A sweep file or plan whose cells are added; those that are there stay.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Train the cells that failed again.")] = False,
) -> None:
    """Trains every cell of a grid and fits the laws. Run again, it trains only what has no result yet.

    Example: [bold]saescale sweep deploy/sweeps/smollm2.yaml[/]
    """
    from saescale.cluster.sweep.driver import run_sweep
    from saescale.cluster.sweep.spec import load_spec
    from saescale.scaling.laws.settings import FitSettings

    loaded = load_spec(spec, out=out, wandb=wandb)
    if extend is not None:
        from saescale.cluster.sweep.extend import extend as extended

        loaded, added = extended(loaded, extend)
        console.print(f"{added} cells added to {loaded.grid.size - added}", highlight=False)
    with _display() as display:
        began = time.monotonic()
        outcome = run_sweep(loaded, display, address, FitSettings(bootstraps), extend is not None, retry_failed)
    _summary(outcome, time.monotonic() - began, store=loaded.store)
    console.print(f"\nNext: saescale fit {loaded.out} --law n_k", highlight=False)


app.command()(service_cli.submit)
app.command()(service_cli.status)
app.command()(service_cli.logs)
app.command()(service_cli.stop)
app.command("list")(service_cli.list_jobs)
app.command()(laws_cli.fit)
app.command()(laws_cli.plan)
app.command()(laws_cli.reproduce)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="URL of a run directory.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html (always written) or md besides it; may be given several times."),
    ] = None,
    bootstraps: Annotated[int, typer.Option(help="Bootstrap fits behind each interval.", min=0)] = 1000,
) -> None:
    """Fits the laws again and writes fits.json, the figures and the report of a run directory.

    report.html is one page that needs no network; figures/ has each figure as PNG, PDF and SVG for a paper and as
    JSON for Plotly.

    Example: [bold]saescale report runs/quickstart --format md[/]
    """
    from saescale.cluster.sweep.ledger import provenance_of
    from saescale.scaling.laws.settings import FitSettings
    from saescale.scaling.report.report import FILES, analyse
    from saescale.storage.rundir import RunDirectory

    wanted = [name for name in FILES if name in (formats or ()) or name == "html"]
    if unknown := [name for name in formats or [] if name not in FILES]:
        raise SaescaleError(f"--format {unknown[0]}: there are {' and '.join(FILES)}")
    directory = RunDirectory(run)
    analyse(directory, FitSettings(bootstraps), provenance=provenance_of(directory), formats=wanted)
    pages = [f"{run}/{FILES[name]}" for name in wanted]
    console.print(f"wrote {', '.join(pages)}, {run}/fits.json and {run}/figures/", highlight=False, soft_wrap=True)
    console.print(f"Next: open {pages[0]} in a browser", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="An activation store, a run directory or one cell's folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of a store and check it.")] = False,
) -> None:
    """Says what lies at a URL: a store, a run or a trained SAE.

    Example: [bold]saescale inspect stores/smollm2-135m-l22 --verify[/]
    """
    from saescale.cluster.front.inspection import describe

    for name, value in describe(url, verify).items():
        console.print(f"[bold]{name:<16}[/]{escape(value)}", highlight=False, soft_wrap=True)


def _actors(given: str) -> int | str:
    if given == "auto":
        return given
    if not given.isascii() or not given.isdigit() or not int(given):
        raise SaescaleError(f"harvest: --actors must be a number of at least 1, or auto, not {given!r}")
    return int(given)


def _display() -> Any:
    from saescale.cluster.front.display import Display

    return Display(console)


def _summary(outcome: "SweepOutcome", wall_s: float, store: str) -> None:
    """What a sweep did, its coefficients, and where things lie."""
    from saescale.cluster.front.display import coefficient_table, duration
    from saescale.scaling.laws.fit import fit_notes

    url = outcome.run.url
    if outcome.trained:
        done = f"{outcome.trained} of {outcome.cells} cells trained now, the others before"
        done = f"all {outcome.cells} cells trained" if outcome.trained == outcome.cells else done
    else:
        done = f"all {outcome.cells} cells were done"
    failed = f"; {outcome.failed} failed, see saescale status {url}" if outcome.failed else ""
    console.print(f"\n[bold green]{done}[/] in {duration(wall_s)}{failed}", highlight=False)
    console.print()
    if outcome.fits["fits"]:
        console.print(coefficient_table(outcome.fits, full=False))
    show_notes(fit_notes(outcome.fits))
    console.print()
    for name, place in (
        ("report", f"{url}/report.html"), ("figures", f"{url}/figures/"), ("fits", f"{url}/fits.json"),
        ("results", f"{url}/results.parquet, curves.parquet"), ("trained SAEs", f"{url}/cells/*/sae.safetensors"),
        ("activations", store),
    ):  # fmt: skip
        console.print(f"  {name:<13} {place}", highlight=False, soft_wrap=True)
    if outcome.wandb:
        console.print(f"  {outcome.wandb}", highlight=False, soft_wrap=True)


def _program() -> str:
    """How the user can call saescale from here: by name where the shell finds it, else by the path that ran."""
    ran = Path(sys.argv[0]).absolute()
    found = shutil.which("saescale")
    if found and Path(found).absolute() == ran:
        return "saescale"
    return os.path.relpath(ran) if ran.is_relative_to(Path.cwd()) else str(ran)


if __name__ == "__main__":
    main()
