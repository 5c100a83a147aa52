"""The command about evaluations: what is measured on trained cells beside nmse."""

from typing import Annotated, Any

import typer

from saescale.cluster.front.console import (
    Actors,
    Address,
    ArchitectureFile,
    DeviceMap,
    TrustRemoteCode,
    command,
    console,
    display,
    number_of_actors,
    say,
    show_notes,
    table,
    use_architectures,
)


def evaluate(
    run: Annotated[str, typer.Argument(help="URL of a run directory.")],
    evals: Annotated[
        str | None,
        typer.Option(help="Such as core,n2g, or all (default: core, downstream_loss, and what the sweep file names)."),
    ] = None,
    latents: Annotated[
        int | None, typer.Option(help="How many latents of a cell are looked at by those that look at some.", min=1)
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Measure these cells alone: n_latents=512, k>=16, architecture=topk; repeatable."),
    ] = None,
    cell: Annotated[
        list[str] | None, typer.Option(help="Id of a cell; repeatable (default: all finished cells).")
    ] = None,
    actors: Actors = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    architecture_file: ArchitectureFile = None,
    address: Address = None,
) -> None:
    """Measures evaluations on the trained cells of a run. Run again, it measures only what is not there yet.

    The rows go into evals.parquet of the run directory, each evaluation of each cell when it is done. Without --actors
    and --address this process does it alone. Rows of another number of latents than is asked for are measured again.

    Example: [bold]saescale eval runs/quickstart --evals core,downstream_loss --where n_latents=512[/]
    """
    from saescale.storage.rundir import RunDirectory
    from saescale.storage.writable import require_writable
    from saescale.trainers.device import set_threads, usable_cores
    from saescale.trainers.evals.run import evaluate_run
    from saescale.trainers.evals.wanted import entries
    from saescale.trainers.subjects.spread import most_memory

    use_architectures(architecture_file)
    if device_map is not None:
        most_memory(device_map)
    require_writable(run)
    names = [name.strip().replace("-", "_") for name in (evals or "").split(",") if name.strip()]
    wanted = entries(RunDirectory(run), names, latents, where or ())
    more: dict[str, Any] = {"trust_remote_code": trust_remote_code, "device_map": device_map}
    with display() as shown:
        if actors is None and address is None:
            set_threads(usable_cores())
            done = evaluate_run(run, wanted, cell or (), display=shown, **more)
        else:
            from saescale.cluster.crew.evals import evaluate_on_actors

            many = number_of_actors("eval", actors or "auto")
            done = evaluate_on_actors(run, wanted, cell or (), many, address, shown, **more)
    _show(run, [entry.evaluation for entry in wanted])
    show_notes(done.why)
    say(f"\n{done.measured} measured, {done.there} were there, {done.failed} failed: {run}/evals.parquet")
    say(f"Next: {command('report', run)}")
    if done.failed:
        raise typer.Exit(1)


def _show(run: str, names: list[str]) -> None:
    """Each metric over the cells: how many have it, and its range. Where an evaluation has some of whole cells, those
    of single latents, labels or positions are only counted."""
    import numpy as np

    from saescale.storage.rundir import RunDirectory

    rows = [
        row
        for row in RunDirectory(run).read_evals().to_pylist()
        if row["evaluation"] in names and row["left_out"] is None
    ]
    of_whole_cells = {row["evaluation"] for row in rows if not row["at"]}
    found: dict[tuple[str, str, str], list[float]] = {}
    more = 0
    for row in rows:
        if row["at"] and row["evaluation"] in of_whole_cells:
            more += 1
        else:
            found.setdefault((row["evaluation"], row["metric"], row["at"] or ""), []).append(row["value"])
    shown = table("evaluation", "metric", "at", "cells", "lowest", "median", "highest")
    for key, values in found.items():
        present = [value for value in values if value is not None and value == value]  # NaN where it has no meaning
        numbers = (min(present), float(np.median(present)), max(present)) if present else ()
        shown.add_row(*key, str(len(values)), *(f"{number:.4g}" for number in numbers))
    console.print(shown)
    if more:
        say(f"{more:,} more rows, of single latents, labels or positions, are in evals.parquet")
