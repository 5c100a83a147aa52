"""The commands about sweeps that run elsewhere: submit, status, logs, stop, list. Ray is imported only where it is
needed, so that the status of a run directory comes at once."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.markup import escape

from saescale.cluster.front.console import (
    ArchitectureFile,
    Bootstraps,
    Extend,
    Json,
    RetryFailed,
    SweepOut,
    SweepWandb,
    command,
    console,
    say,
    say_marked,
    say_stores,
    use_architectures,
)
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.jobs.service import Service
    from saescale.cluster.sweep.spec import SweepSpec
    from saescale.cluster.sweep.status import SweepStatus
    from saescale.storage.lease import Driver

REFRESH_S = 2.0
REFRESH_THERE_S = 20.0  # where each look is a job on the cluster
LINE_EVERY_S = 10.0


class Look(NamedTuple):
    """What was seen, and in how many seconds one may look again."""

    status: "SweepStatus"
    again_s: float


Address = Annotated[
    str | None,
    typer.Option(help="Ray's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, else an http RAY_ADDRESS)."),
]
Job = Annotated[str, typer.Argument(help="What submit printed; `saescale list` names all.")]


def submit(
    spec: Annotated[str, typer.Argument(help="A sweep file (YAML); store and out must be where all nodes see them.")],
    address: Address = None,
    out: SweepOut = None,
    wandb: SweepWandb = None,
    bootstraps: Bootstraps = 1000,
    extend: Extend = None,
    retry_failed: RetryFailed = False,
    architecture_file: ArchitectureFile = None,
    python: Annotated[str, typer.Option(help="The interpreter on the cluster that has Ray and torch.")] = "python",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show its log until it ends.")] = False,
) -> None:
    """Runs a sweep as a job on a Ray cluster; it goes on when this machine is switched off.

    What goes there is the sweep file as it was understood, the files of architectures of your own that it names (also
    those below SAESCALE_PATH) and saescale's own code, no other file and no environment variable of this machine: keys
    of W&B or of the object store belong into the cluster's environment. The token of the
    cluster is taken from RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token.

    Example: [bold]saescale submit sweep.yaml --address http://head:8265[/]
    """
    from saescale.cluster.jobs.service import Service, require_shared
    from saescale.cluster.sweep.extend import read_extension
    from saescale.cluster.sweep.spec import load_spec
    from saescale.scaling.laws.settings import FitSettings

    use_architectures(architecture_file)
    loaded = load_spec(spec, out=out, wandb=wandb)
    extension = read_extension(loaded, extend) if extend is not None else None
    say_stores(loaded.stores)
    require_shared(loaded, extension)
    _caution(loaded)
    _require_writable(loaded.out)
    _require_free(loaded.out)
    service = Service(address)
    job = service.submit(loaded, extension, FitSettings(bootstraps), python, retry_failed)
    cells = loaded.size
    about = escape(f": {cells} cells of {loaded.name} to {service.address}, run directory {loaded.out}")
    say_marked(f"submitted [bold]{job}[/]{about}")
    say(f"Next: {command('status', job, '--address', service.address, '--watch')}")
    say(f"      {command('logs', job, '--address', service.address, '-f')}")
    say(f"      {command('stop', job, '--address', service.address)}")
    if follow:
        _follow(service, job)


def status(
    what: Annotated[str, typer.Argument(help="URL of a run directory, or a job.")],
    address: Address = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until the sweep ends.")] = False,
    cells: Annotated[bool, typer.Option("--cells", help="List every cell.")] = False,
) -> None:
    """How far a sweep is: cells done, running and failed, tokens/s, time left, nmse so far.

    Of a run directory it tells what the ledger and the driver say; of a job the same and what the cluster says of it.
    A run directory that only the cluster sees is read there, which takes some seconds. --json prints one document:
    format, sweep, run, state (waiting, starting, running, finished, stopped, failed, lost, died, unfinished),
    reason, driver, job, counts, standing (of the FLOPs, rates, time left, workers), waits, sources (of a sweep over
    several stores) and cells; with --watch one on every line.

    Example: [bold]saescale status runs/quickstart --watch[/]
    """
    look = _look(what, address)
    if not watch:
        found = look().status
        if as_json:
            print(found.model_dump_json())
        else:
            _show(found, cells)
        return
    with _ended_by_ctrl_c("the sweep goes on"):
        if as_json:
            for found in _looks(look):
                print(found.model_dump_json(), flush=True)
        elif console.is_terminal:
            _watch_live(look, cells)
        else:
            _watch_lines(look)


def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
) -> None:
    """What the driver of a job has printed.

    Example: [bold]saescale logs smollm2-layer22-1a2b3c4d -f --address http://head:8265[/]
    """
    from saescale.cluster.jobs.service import Service

    service = Service(address)
    if follow:
        _follow(service, job)
    else:
        print(service.logs(job), end="")


def stop(
    what: Annotated[str, typer.Argument(help="A job, or the run directory of a sweep on this machine.")],
    address: Address = None,
) -> None:
    """Ends a sweep after its workers have saved their checkpoints; submitted or swept again, it goes on from there.

    Example: [bold]saescale stop smollm2-layer22-1a2b3c4d --address http://head:8265[/]
    """
    if _is_run(what):
        _stop_run(what, address)
        return
    _stop_job(what, address)


def list_jobs(address: Address = None, as_json: Json = False) -> None:
    """The sweeps that were submitted to a cluster, the newest first.

    Example: [bold]saescale list --address http://head:8265[/]
    """
    from saescale.cluster.jobs.service import Service

    service = Service(address)
    found = service.jobs()
    if as_json:
        print(json.dumps([job.model_dump() for job in found]))
    elif found:
        from saescale.cluster.front.status_view import jobs_table

        console.print(jobs_table(found, time.time()))
    else:
        say(f"no sweep was submitted to {service.address}")


def _is_run(what: str) -> bool:
    """A job's name has no slash; a folder of that name here wins."""
    return "/" in what or "\\" in what or os.path.isdir(what)


def _look(what: str, address: str | None) -> Callable[[], Look]:
    """What looks at it."""
    if _is_run(what):
        from saescale.cluster.sweep.status import read_status

        return lambda: Look(read_status(what), REFRESH_S)
    if not any(os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")) and not address:
        raise SaescaleError(f"there is no run directory {what} here; of a job give the cluster too (--address)")
    from saescale.cluster.jobs.job_status import look_at_job
    from saescale.cluster.jobs.service import Service

    service = Service(address)

    def look() -> Look:
        status, near = look_at_job(service, what)
        return Look(status, REFRESH_S if near else REFRESH_THERE_S)

    return look


def _looks(look: Callable[[], Look]) -> Iterator["SweepStatus"]:
    while True:
        found = look()
        yield found.status
        if not found.status.active:
            return
        time.sleep(found.again_s)


def _show(found: "SweepStatus", all_cells: bool) -> None:
    from saescale.cluster.front.status_view import cells_lines, render

    if all_cells:
        print("\n".join(cells_lines(found.cells)), end="\n\n")
    console.print(render(found, console.width), highlight=False, soft_wrap=not console.is_terminal)


def _watch_live(look: Callable[[], Look], all_cells: bool) -> None:
    from rich.live import Live

    from saescale.cluster.front.status_view import render

    last = None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for last in _looks(look):
            live.update(render(last, console.width, console.height - 1), refresh=True)
    if last is not None:
        _show(last, all_cells)


def _watch_lines(look: Callable[[], Look]) -> None:
    """A line when something changed, but not too many."""
    from saescale.cluster.front.status_view import line

    shown, at = "", 0.0
    for found in _looks(look):
        said = line(found)
        if said != shown and (not found.active or not shown or time.monotonic() - at >= LINE_EVERY_S):
            print(said, flush=True)
            shown, at = said, time.monotonic()


def _require_writable(run: str) -> None:
    """Refuses early what the job would; only the cluster may see the folder, reach the object store or have its keys,
    and where it is so the job will say it."""
    from saescale.storage.errors import Unavailable
    from saescale.storage.files import local_path
    from saescale.storage.writable import require_writable

    try:
        path = local_path(run)
        if path is None or os.path.exists(os.path.dirname(path)):
            require_writable(run)
    except Unavailable:
        return
    except SaescaleError as error:
        if "credentials" not in type(error.__cause__).__name__.lower():
            raise


def _require_free(run: str) -> None:
    """Refuses early what the driver would refuse after a minute; where the run is not readable here, it will."""
    from saescale.storage.lease import read_driver

    try:
        driver = read_driver(run)
    except SaescaleError:
        return
    if driver is not None and driver.lives():
        raise SaescaleError(
            f"{run} is driven already ({driver.name}); look on with `{command('status', run)}`, or end that one first: "
            f"{command('stop', driver.job or run)}"
        )


def _caution(spec: "SweepSpec") -> None:
    """Says now what the driver would say in the job's log."""
    from saescale.cluster.sweep.cautions import cautions_of_each
    from saescale.storage.live import open_source

    widths: dict[str, int | None] = {}
    for url in spec.stores:
        try:
            widths[url] = open_source(url).d_model
        except SaescaleError:  # maybe only the cluster sees it
            widths[url] = None
    for caution in cautions_of_each(spec, widths):
        say_marked(f"[yellow]warning:[/] {escape(caution)}")


def _follow(service: "Service", job: str) -> None:
    import asyncio

    async def show() -> None:
        async for text in service.follow(job):
            print(text, end="", flush=True)

    with _ended_by_ctrl_c(f"the job goes on; {command('stop', job)} ends it"):
        asyncio.run(show())
        ended = service.job(job)
        say(f"{job}: {ended.state}")
    if ended.state != "succeeded":
        raise typer.Exit(1)


@contextmanager
def _ended_by_ctrl_c(meaning: str) -> Iterator[None]:
    """Who only looks on ends nothing but the looking."""
    try:
        yield
    except KeyboardInterrupt:
        say(meaning)
        raise typer.Exit(0) from None


def _stop_job(job: str, address: str | None) -> None:
    from saescale.cluster.jobs.service import Service

    service = Service(address)
    before = service.job(job)
    if not before.active:
        say(f"{job} has ended already: {before.state}")
        return
    say("stopping: the workers save their checkpoints")
    ended = service.stop(job)
    say(f"{job}: {ended.state}; the checkpoints are in {ended.run}")
    if ended.state == "stopped":
        say("Next: submit the same sweep again; it goes on from there")


def _stop_run(run: str, address: str | None) -> None:
    from saescale.storage.lease import read_driver

    driver = read_driver(run)
    if driver is None or not driver.lives():
        raise SaescaleError(f"nothing drives {run} now; `{command('status', run)}` says how far it is")
    if driver.job is not None:
        _stop_job(driver.job, address)
        return
    if not driver.is_here:
        raise SaescaleError(f"{run} is driven on another machine ({driver.name}): run `{command('stop', run)}` there")
    say("stopping: the workers save their checkpoints")
    os.kill(driver.pid, signal.SIGTERM)
    _wait_until_ended(driver)
    say(f"stopped; the checkpoints are in {run}")
    say("Next: run the same command again; it goes on from there")


def _wait_until_ended(driver: "Driver", timeout: float = 90.0) -> None:
    deadline = time.monotonic() + timeout
    while driver.may_live():
        if time.monotonic() > deadline:
            raise SaescaleError(f"{driver.name} has not ended {timeout:.0f} s after it was told to; tell it again")
        time.sleep(0.2)
