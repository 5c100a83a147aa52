"""How far a sweep is: its ledger (results.parquet), what its driver says (driver-N.json), and its job on a cluster.

Imports neither torch nor Ray, and reads no file for each cell: with 10,000 cells the answer takes a few requests.
"""

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from saescale.storage import checkpoint
from saescale.storage.columns import is_diverged, misses_k
from saescale.storage.documents import YAML_LOADER, yaml_reason
from saescale.storage.errors import Damaged, SaescaleError, SaescaleWarning
from saescale.storage.lease import Driver, RunningCell, Standing, WaitsFor, read_driver
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import SPEC, RunDirectory, has_weights

# Files of single cells, such as a checkpoint's pointer, are read for so many cells at most: details of a few that just
# changed, not of thousands.
MAX_READ = 32

CellState = Literal["done", "failed", "running", "started", "pending"]
SweepState = Literal["waiting", "starting", "running", "finished", "stopped", "failed", "lost", "died", "unfinished"]


# What is known of a sweep whose job alone is known.
_JOB_STATES: Mapping[str, SweepState] = {
    "pending": "waiting", "running": "starting", "succeeded": "finished", "stopped": "stopped", "failed": "failed",
}  # fmt: skip


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class CellStatus(_Document):
    """One cell. status: done, failed, running (a worker has it), started (it has a checkpoint and nobody trains it)
    or pending. nmse and dead_fraction are final when it is done, those of the last evaluation while it runs."""

    cell_id: str
    n_latents: int
    k: int
    architecture: str | None = None  # None: not known, as of pending cells of 0.1.0
    seed: int
    store: str | None = None  # fingerprint; this and the next two None: not known
    subject: str | None = None
    site: str | None = None
    status: CellState
    step: int | None = None
    steps: int | None = None
    nmse: float | None = None
    dead_fraction: float | None = None
    l0_error: float | None = None
    wall_s: float | None = None  # seconds of training
    worker: str | None = None  # HOST/PID
    error: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether it ended, and reconstructs worse than the mean alone: fits leave it out."""
        return self.status == "done" and is_diverged(self.nmse)

    @property
    def missed_k(self) -> bool:
        """Whether it ended with L0 more than 10 % off its target k: fits take the L0 that was measured."""
        return self.status == "done" and misses_k(self.l0_error)


_CELLS = TypeAdapter(list[CellStatus])
_COLUMNS = [
    "cell_id", "n_latents", "k", "architecture", "seed", "store", "subject", "site", "status", "nmse", "dead_fraction",
    "l0_error", "wall_s", "error",
]  # fmt: skip


class Counts(_Document):
    """Cells of the sweep, all of them and by status; `diverged` and `missed_k` are among those done."""

    cells: int = 0
    done: int = 0
    diverged: int = 0
    missed_k: int = 0
    failed: int = 0
    running: int = 0
    started: int = 0
    pending: int = 0


class SourceStatus(_Document):
    """The cells over one of the sweep's stores, which `store` is the fingerprint of."""

    store: str | None
    subject: str | None
    site: str | None
    counts: Counts


class DriverStatus(_Document):
    """The process that drives or last drove the run. Times in seconds since 1970."""

    name: str
    host: str
    pid: int
    job: str | None
    alive: bool
    started_at: float
    beat_at: float  # when it was last heard of


class JobStatus(_Document):
    """The job on a Ray cluster that was asked for. Times in seconds since 1970."""

    id: str
    sweep: str
    run: str
    state: Literal["pending", "running", "stopped", "succeeded", "failed"]
    message: str | None  # why it failed
    submitted_at: float | None
    ended_at: float | None

    @property
    def active(self) -> bool:
        return self.state in ("pending", "running")


class SweepStatus(_Document):
    """What `saescale status --json` prints.

    state: waiting (its job waits for the cluster), starting (the job runs, no driver has the run yet), running,
    finished (every cell has a result and the laws are fitted), stopped (on request), failed (see `reason`), lost (the
    cluster's head went away under it), died (the driver was killed, or ended without saying so), unfinished (nothing is
    known of a driver).
    standing: what the driver said last, None where there never was one; its rates and times are of now only while
    `driver.alive`. waits: what a driver that lives has waited for since some seconds. sources: of a sweep over several
    stores, each. Counts are fresher than the rows of `cells`, and than those of `sources`, by the cells that ended in a
    pack still at work.
    """

    format: Literal[1] = 1
    sweep: str
    run: str
    state: SweepState
    reason: str | None = None
    driver: DriverStatus | None = None
    job: JobStatus | None = None
    counts: Counts = Counts()
    standing: Standing | None = None
    waits: list[WaitsFor] = []
    sources: list[SourceStatus] = []
    cells: list[CellStatus] = []

    @property
    def active(self) -> bool:
        """Whether something may still change by itself."""
        return self.state in ("waiting", "starting", "running")


class NoRun(SaescaleError):
    """There is no run directory (yet)."""

    SAID = "is not a run directory"


def read_status(url: str) -> SweepStatus:
    """The status of the run directory `url`. Raises SaescaleError where it holds no run or a damaged file."""
    run = RunDirectory(url)
    name = _sweep_name(url)
    # Before the ledger, so that what the driver counts as done is there already.
    driver = read_driver(url)
    alive = driver is not None and driver.lives()
    results = run.read_results(lambda rows: _untrained(run, rows))
    cells = _recorded(results.select(_COLUMNS).to_pylist(), url)
    if driver is not None and alive:
        cells = _with_running(cells, driver.standing.running)
    elif any(cell.status == "pending" for cell in cells):
        cells = _with_files(cells, run)
    counts = _count(cells, driver.standing if driver is not None and alive else Standing())
    state, reason = _state(driver, alive, counts)
    return SweepStatus(
        sweep=name,
        run=url,
        state=state,
        reason=reason,
        driver=None if driver is None else _driver_status(driver, alive),
        counts=counts,
        standing=None if driver is None else driver.standing,
        waits=driver.waits if driver is not None and alive else [],
        sources=_sources(cells),
        cells=cells,
    )


def with_job(status: SweepStatus | None, job: JobStatus) -> SweepStatus:
    """`status` of the job's run directory, None while that holds no run, as its job has it."""
    if status is None or not status.cells:
        state = _JOB_STATES[job.state]
        return SweepStatus(sweep=job.sweep, run=job.run, state=state, reason=job.message, job=job)
    update: dict[str, Any] = {"job": job}
    driven = status.driver is not None and status.driver.alive
    if job.active and not driven:
        # What an earlier driver left says nothing about this one.
        update |= {"state": "waiting" if job.state == "pending" else "starting", "reason": None}
    elif job.state == "failed" and not driven and (status.driver is None or status.driver.job != job.id):
        # It ended before it had the run.
        update |= {"state": "failed", "reason": job.message}
    return status.model_copy(update=update)


def _sweep_name(url: str) -> str:
    """The name in sweep.yaml, without reading what may be a list of thousands of cells."""
    run = RunDirectory(url)
    content = run.read_spec_bytes()
    if content is None:
        raise NoRun(f"{url} {NoRun.SAID}: there is no {SPEC} of a sweep that ran in it")
    try:
        found = next(_top_level(content, "name"), None)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise run.damaged_spec(yaml_reason(error)) from error
    if found is None:
        raise run.damaged_spec("it has no name: it is no sweep's")
    return found


def _top_level(content: bytes, key: str) -> Iterator[str]:
    depth, previous = 0, None
    for event in yaml.parse(content, Loader=YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        scalar = event.value if isinstance(event, yaml.ScalarEvent) and depth == 1 else None
        if scalar is not None and previous == key:
            yield scalar
        previous = scalar


def _recorded(rows: list[dict[str, Any]], url: str) -> list[CellStatus]:
    try:
        return _CELLS.validate_python(rows)
    except ValidationError as error:
        raise SaescaleError(f"the ledger of {url} is damaged; run the sweep again, which restores it") from error


def _with_running(cells: list[CellStatus], running: list[RunningCell]) -> list[CellStatus]:
    found = {cell.cell_id: cell for cell in running}
    return [
        cell.model_copy(update=found[cell.cell_id].model_dump() | {"status": "running"})
        if cell.status == "pending" and cell.cell_id in found
        else cell
        for cell in cells
    ]


def _with_files(cells: list[CellStatus], run: RunDirectory) -> list[CellStatus]:
    """One listing tells of results that came after the ledger was last written, and of checkpoints."""
    listed, read = run.cell_files(), 0
    found = []
    for cell in cells:
        names = listed.get(cell.cell_id, set())
        if cell.status != "pending" or not ("result.json" in names or checkpoint.has_any(names)):
            found.append(cell)
            continue
        read += 1
        if "result.json" in names:
            result = (_result(run, cell.cell_id) if read <= MAX_READ else None) or {}
            # Weights are written before the result, and only of a cell that did not fail.
            status = "done" if has_weights(names) else "failed"
            found += _recorded([cell.model_dump() | {"status": status} | result], run.url)
        else:
            steps = checkpoint.steps(run.checkpoint_url(cell.cell_id)) if read <= MAX_READ else []
            found.append(cell.model_copy(update={"status": "started", "step": steps[0] if steps else None}))
    return found


def _result(run: RunDirectory, cell_id: str) -> dict[str, Any] | None:
    try:
        return run.read_cell_result(cell_id)
    except Damaged as error:
        warnings.warn(str(error), SaescaleWarning, stacklevel=2)
        return None


def _untrained(run: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the cells that sweep.yaml names besides `rows`, for where the ledger does not have them."""
    from saescale.cluster.sweep.spec import parse_recorded

    recorded = run.read_spec()
    if recorded is None:
        return []
    spec, sources = parse_recorded(recorded, run.url), recorded_sources(recorded)
    # Several cells of one combination are told apart by their names alone. Without axes torch need not be loaded.
    cells = spec.grid.combinations()
    if spec.has_axes:
        try:
            cells = [cell.combination for cell in spec.planned()]
        except SaescaleError as error:
            warnings.warn(f"cells that wait may be missing here: {error}", SaescaleWarning, stacklevel=2)
    several = len(sources) > 1  # of one store, tables of 0.1.0 do not say which it is
    fields = ("n_latents", "k", "architecture", "seed")
    known = Counter((row.get("store") if several else None, *(row.get(name) for name in fields)) for row in rows)
    named = {row.get("cell_id") for row in rows}
    folders = defaultdict(list)
    for cell_id in sorted(run.cell_files().keys() - named, reverse=True):
        folders[cell_id.rpartition("-")[0]].append(cell_id)
    found: list[dict[str, Any]] = []
    for source, cell in itertools.product(sources, cells):
        if known[which := (source.fingerprint if several else None, *cell)]:
            known[which] -= 1
            continue
        name = f"n{cell.n_latents}-k{cell.k}-s{cell.seed}"
        cell_id = folders[name].pop() if folders[name] else name
        told = {"store": source.fingerprint, "subject": source.subject, "site": source.site}
        # Over which of several stores a cell was begun, the name of its folder does not say.
        told = told if cell_id == name or not several else {}
        found.append(cell._asdict() | told | {"cell_id": cell_id, "status": "pending"})
    return found


def _sources(cells: list[CellStatus]) -> list[SourceStatus]:
    """Of each store, where there are several."""
    groups: dict[tuple[str | None, ...], list[CellStatus]] = defaultdict(list)
    for cell in cells:
        groups[cell.store, cell.subject, cell.site].append(cell)
    if len({store for store, _, _ in groups if store}) < 2:
        return []
    return [
        SourceStatus(store=store, subject=subject, site=site, counts=_count(own, Standing()))
        for (store, subject, site), own in groups.items()
    ]


def _count(cells: list[CellStatus], standing: Standing) -> Counts:
    statuses = [cell.status for cell in cells]
    # Cells that end before their pack does are known to the driver alone.
    done, failed = max(statuses.count("done"), standing.done), max(statuses.count("failed"), standing.failed)
    started = statuses.count("started")
    running = min(statuses.count("running"), len(cells) - done - failed)
    pending = len(cells) - done - failed - running - started
    return Counts(
        cells=len(cells), done=done, diverged=sum(cell.diverged for cell in cells),
        missed_k=sum(cell.missed_k for cell in cells), failed=failed, running=running,
        started=started, pending=pending,
    )  # fmt: skip


def _state(driver: Driver | None, alive: bool, counts: Counts) -> tuple[SweepState, str | None]:
    if driver is None:
        return ("finished" if counts.cells and counts.cells == counts.done + counts.failed else "unfinished"), None
    if driver.state != "running":
        return driver.state, driver.error
    return ("running" if alive else "died"), None


def _driver_status(driver: Driver, alive: bool) -> DriverStatus:
    return DriverStatus(
        name=driver.name, host=driver.host, pid=driver.pid, job=driver.job, alive=alive,
        started_at=driver.started_at, beat_at=driver.beat_at,
    )  # fmt: skip
