"""What a person sees of a sweep's status: a headline, a table of the grid, what runs, what failed."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.display import duration
from cluster.status import CellStatus, JobStatus, SweepStatus

_STYLES = {
    "waiting": "yellow", "starting": "yellow", "running": "cyan", "finished": "green", "stopped": "yellow",
    "failed": "red", "died": "red", "unfinished": "yellow",
}  # fmt: skip
_MAX_ROWS = 40  # of the grid where no height limits it
_MAX_LISTED = 8  # running and failed cells
_NUMBER_WIDTH = 11  # of a column of the grid, with the space before it


def render(status: SweepStatus, width: int, height: int | None = None, now: float | None = None) -> RenderableType:
    """The whole picture in `width` columns and, where given, `height` lines."""
    head = headline(status, time.time() if now is None else now)
    running = [cell for cell in status.cells if cell.status == "running"]
    failed = [cell for cell in status.cells if cell.status == "failed"]
    left = 10_000 if height is None else height - sum(1 + len(line) // width for line in head) - 2
    # The grid keeps a third of the lines; what it does not need is for the lists.
    rows = len({cell.n_latents for cell in status.cells})
    lists = left - min(rows + 2, max(4, left // 3))
    parts: list[RenderableType] = list(head)
    if status.counts.cells:
        parts.insert(1, _bar(status, width))
    listed: list[RenderableType] = []
    for cells, table in ((running, _running_table), (failed, _failed_table)):
        shown = min(len(cells), _MAX_LISTED, max(0, lists - 3))
        if shown:
            listed += ["", table(cells[:shown], width), *_more(len(cells) - shown)]
            lists -= shown + 2 + (len(cells) > shown)
            left -= shown + 2 + (len(cells) > shown)
    if status.cells:
        parts += ["", *_grid(status.cells, width, min(_MAX_ROWS, max(1, left - 3)))]
    return Group(*parts, *listed)


def headline(status: SweepStatus, now: float) -> list[Text]:
    """Its name and state, who drives it, and how far it is."""
    style = _STYLES[status.state]
    lines = [Text.assemble((status.sweep, "bold"), "  ", (status.state, f"bold {style}"), f"  {status.run}")]
    driver, job = status.driver, status.job
    if status.reason:
        lines.append(Text(status.reason, "red" if status.state in ("failed", "died") else ""))
    if driver is not None and driver.alive:
        lines.append(Text(f"driven by {driver.name} for {duration(now - driver.started_at)}"))
    elif driver is not None and status.state == "died":
        silent = duration(max(0.0, now - driver.beat_at))
        lines.append(Text(f"its driver ({driver.name}) ended without a word; last heard of {silent} ago", "red"))
    if job is not None:
        since = "" if job.submitted_at is None else f", submitted {duration((job.ended_at or now) - job.submitted_at)}"
        since += " before" if since and job.ended_at else " ago" if since else ""
        lines.append(Text(f"job {job.id}: {job.state}{since}"))
        if job.message and job.message != status.reason:
            lines.append(Text(f"the job said: {job.message}", "red"))
    if status.counts.cells:
        lines.append(Text(", ".join(_counted(status))))
    if status.standing is not None and driver is not None and driver.alive:
        lines.append(Text(", ".join(_rates(status))))
    if advice := _advice(status):
        lines.append(Text(advice))
    return lines


def line(status: SweepStatus) -> str:
    """One line for where there is no terminal."""
    said = [f"{status.sweep} {status.state}", *_counted(status)]
    if status.driver is not None and status.driver.alive:
        said += _rates(status)
    if status.reason:
        said.append(status.reason)
    return ", ".join(said)


def cells_table(cells: Iterable[CellStatus]) -> Table:
    """Every cell, a row each."""
    table = _table("cell", "status", "step", "nmse", "dead", "seconds")
    for cell in cells:
        said = cell.status + (f": {cell.error}" if cell.error else "")
        numbers = [_number(value) for value in (cell.nmse, cell.dead_fraction, cell.wall_s)]
        table.add_row(cell.cell_id, escape(said), _steps(cell), *numbers)
    return table


def jobs_table(jobs: Iterable[JobStatus], now: float) -> Table:
    """Jobs of a cluster, a row each."""
    table = _table("job", "sweep", "state", "submitted", "took", "run directory")
    for job in jobs:
        began = job.submitted_at
        submitted = "" if began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(began))
        took = "" if began is None else duration((job.ended_at or now) - began)
        table.add_row(job.id, job.sweep, job.state, submitted, took, job.run)
    return table


def _bar(status: SweepStatus, width: int) -> RenderableType:
    counts = status.counts
    return ProgressBar(total=counts.cells, completed=counts.done + counts.failed, width=min(width, 80))


def _counted(status: SweepStatus) -> list[str]:
    counts = status.counts
    said = [f"{counts.done:,} of {counts.cells:,} cells done"]
    said += [
        f"{count:,} {name}"
        for name, count in (
            ("running", counts.running), ("failed", counts.failed), ("started", counts.started),
            ("pending", counts.pending),
        )
        if count
    ]  # fmt: skip
    return said


def _rates(status: SweepStatus) -> list[str]:
    standing = status.standing
    if standing is None:
        return []
    said = [f"{standing.fraction:.0%} of the FLOPs", f"{standing.tokens_per_s:,.0f} SAE tokens/s"]
    said.append("time left: measuring" if standing.left_s is None else f"{duration(standing.left_s)} left")
    if standing.interrupted:
        said.append(f"{standing.interrupted} packs interrupted")
    return said


def _advice(status: SweepStatus) -> str:
    if status.state in ("stopped", "died", "failed") or (status.state == "unfinished" and status.counts.pending):
        return "Next: run the same command again; it goes on from the checkpoints"
    if status.state == "unfinished" and status.counts.started:
        return "Next: run the same command again; it goes on from the checkpoints"
    return f"Next: saescale fit {status.run}" if status.state == "finished" and status.job is None else ""


def _grid(cells: Sequence[CellStatus], width: int, max_rows: int) -> list[RenderableType]:
    """Best nmse by n_latents and k, or how far it is there."""
    places: dict[tuple[int, int], list[CellStatus]] = defaultdict(list)
    for cell in cells:
        places[cell.n_latents, cell.k].append(cell)
    sizes, ks = sorted({n for n, _ in places}), sorted({k for _, k in places})
    columns = max(1, (width - 10) // _NUMBER_WIDTH)
    table = Table(box=None, header_style="bold", pad_edge=False)
    several = max(len(found) for found in places.values()) > 1
    table.add_column("nmse (done/cells)" if several else "nmse", justify="right")
    for k in ks[:columns]:
        table.add_column(f"k={k}", justify="right", no_wrap=True)
    for n_latents in sizes[:max_rows]:
        row = [_place(places.get((n_latents, k), [])) for k in ks[:columns]]
        table.add_row(f"n={n_latents}", *row)
    hidden = [
        f"{more:,} more {name}"
        for more, name in ((len(sizes) - max_rows, "n_latents"), (len(ks) - columns, "k"))
        if more > 0
    ]
    return [table, *([Text(f"... and {', '.join(hidden)}: --cells lists all", "dim")] if hidden else [])]


def _place(cells: Sequence[CellStatus]) -> Text:
    """What all seeds of one n_latents and k have reached."""
    if not cells:
        return Text("")
    statuses = Counter(cell.status for cell in cells)
    style = "red" if statuses["failed"] else ""
    best = min((cell.nmse for cell in cells if cell.status == "done" and cell.nmse is not None), default=None)
    if statuses["done"]:
        number = "done" if best is None else f"{best:.4f}"
        return Text(number if len(cells) == 1 else f"{number} {statuses['done']}/{len(cells)}", style or "green")
    if statuses["failed"]:
        return Text("failed" if len(cells) == 1 else f"{statuses['failed']} failed", style)
    if statuses["running"]:
        shares = [cell.step / cell.steps for cell in cells if cell.step is not None and cell.steps]
        return Text(f"{sum(shares) / len(cells):.0%}" if shares else "running", "cyan")
    return Text("started", "yellow") if statuses["started"] else Text("·", "dim")


def _running_table(cells: Sequence[CellStatus], width: int) -> Table:
    table = _table("running", "worker", "step", "nmse", "dead")
    for cell in cells:
        table.add_row(cell.cell_id, cell.worker or "", _steps(cell), _number(cell.nmse), _number(cell.dead_fraction))
    return table


def _failed_table(cells: Sequence[CellStatus], width: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("failed", no_wrap=True)
    table.add_column("why", no_wrap=True, overflow="ellipsis", max_width=width - 30)
    for cell in cells:
        table.add_row(cell.cell_id, escape(cell.error or "see its result.json"))
    return table


def _more(count: int) -> list[RenderableType]:
    return [Text(f"... and {count:,} more: --cells lists all", "dim")] if count > 0 else []


def _steps(cell: CellStatus) -> str:
    if cell.step is None:
        return ""
    return f"{cell.step:,}/{cell.steps:,}" if cell.steps else f"{cell.step:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        numeric = column in ("step", "nmse", "dead", "seconds", "took")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column in ("cell", "running", "job"))
    return table
