"""What a person sees of a sweep's status: a headline, a table of the grid, what runs, what failed."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saescale.cluster.front.console import command
from saescale.cluster.front.waits import duration, waits_line
from saescale.cluster.sweep.status import CellStatus, JobStatus, SweepStatus
from saescale.scaling.order import in_order
from saescale.storage.columns import is_diverged
from saescale.storage.lease import LiveStanding
from saescale.storage.waiting import Wait

_STYLES = {
    "waiting": "yellow", "starting": "yellow", "running": "cyan", "finished": "green", "stopped": "yellow",
    "failed": "red", "lost": "red", "died": "red", "unfinished": "yellow",
}  # fmt: skip
_MAX_ROWS = 40  # of the grid where no height limits it
_MAX_LISTED = 8  # running, failed and diverged cells
_Row = tuple[int, str, int]  # of the grid: the number of its source, architecture and n_latents
_Sources = dict[str | None, str]  # names by the stores' fingerprints; empty where there is one
_V = TypeVar("_V")


def render(status: SweepStatus, width: int, height: int | None = None, now: float | None = None) -> RenderableType:
    """The whole picture in `width` columns and, where given, `height` lines."""
    head = headline(status, time.time() if now is None else now)
    left = 10_000 if height is None else height - sum(1 + (len(line) - 1) // width for line in head) - 2
    # The grid keeps half of the lines; what it does not need is for the lists.
    sources = _source_names(status)
    rows = len({_row(cell, sources) for cell in status.cells})
    lists = left - min(rows + 2, max(5, left // 2))
    listed: list[RenderableType] = []
    for table, cells in (
        (_running_table, [cell for cell in status.cells if cell.status == "running"]),
        (_failed_table, [cell for cell in status.cells if cell.status == "failed"]),
        (_diverged_table, [cell for cell in status.cells if cell.diverged]),
    ):
        shown = min(len(cells), _MAX_LISTED, max(0, lists - 3))
        if shown:
            listed += ["", table(cells[:shown], width), *_more(len(cells) - shown)]
            used = shown + 2 + (len(cells) > shown)
            lists, left = lists - used, left - used
    parts: list[RenderableType] = list(head)
    if status.cells:
        parts.insert(1, _bar(status, width))
        parts += ["", *_grid(status.cells, sources, width, min(_MAX_ROWS, max(1, left - 3)))]
    return Group(*parts, *listed)


def headline(status: SweepStatus, now: float) -> list[Text]:
    """Its name and state, who drives it, and how far it is."""
    style = _STYLES[status.state]
    lines = [Text.assemble((status.sweep, "bold"), "  ", (status.state, f"bold {style}"), f"  {status.run}")]
    driver, job = status.driver, status.job
    if status.reason:
        lines.append(Text(status.reason, "red" if status.state in ("failed", "lost", "died") else ""))
    if driver is not None and driver.alive:
        lines.append(Text(f"driven for {duration(now - driver.started_at)} by {driver.name}"))
    elif driver is not None and status.state == "died" and not status.reason:
        silent = duration(max(0.0, now - driver.beat_at))
        lines.append(Text(f"its driver ({driver.name}) ended without a word; last heard of {silent} ago", "red"))
    if job is not None:
        lines.append(Text(f"job {job.id}: {job.state}{_since(job, now)}"))
        if job.message and job.message != status.reason:
            lines.append(Text(f"the job said: {job.message}", "red"))
    if status.counts.cells:
        lines.append(Text(", ".join(_counted(status))))
    if names := _source_names(status):
        by = (f"{names[source.store]} {source.counts.done:,}/{source.counts.cells:,}" for source in status.sources)
        lines.append(Text(f"done of each source: {', '.join(by)}"))
    if status.standing is not None and driver is not None and driver.alive:
        lines.append(Text(", ".join(_rates(status))))
        lines += [Text(live_line(live)) for live in status.standing.live]
    lines += [Text(waits_line(Wait(wait.what, wait.since, wait.until), now), "yellow") for wait in status.waits]
    if advice := _advice(status):
        lines.append(Text(advice))
    return lines


def live_line(live: LiveStanding) -> str:
    """What the producer of a live source does."""
    again = f" ({live.again:,} of them again)" if live.again else ""
    most = f" of {live.max_bytes / 1e9:,.1f} GB" if live.max_bytes else ""
    there = f"{live.blocks} blocks on the disk ({live.bytes / 1e9:,.1f}{most})"
    return f"live source: {live.made:,} tokens made{again}, {live.tokens_per_s:,.0f} tokens/s, {there}; {live.state}"


def line(status: SweepStatus) -> str:
    """One line for where there is no terminal."""
    said = [f"{status.sweep} {status.state}", *_counted(status)]
    if status.driver is not None and status.driver.alive:
        said += _rates(status)
    said += [waits_line(Wait(wait.what, wait.since, wait.until), time.time()) for wait in status.waits]
    if status.reason:
        said.append(status.reason)
    return ", ".join(said)


def cells_lines(cells: Iterable[CellStatus]) -> Iterator[str]:
    """Every cell, a line each. Plain text: a table of rich takes seconds for thousands of rows."""
    rows: list[tuple[str, ...]] = [("cell", "architecture", "status", "step", "nmse", "dead", "seconds", "")]
    rows += [
        (cell.cell_id, cell.architecture or "", _word(cell), _steps(cell),
         *map(_number, (cell.nmse, cell.dead_fraction, cell.wall_s)), cell.error or "")
        for cell in cells
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = enumerate(zip(row, widths, strict=True))
        aligned = (text.rjust(width) if 2 < i < 7 else text.ljust(width) for i, (text, width) in texts)
        yield "  ".join(aligned).rstrip()


def _word(cell: CellStatus) -> str:
    """Its status, and where it is done what to hold against it."""
    return "diverged" if cell.diverged else "missed k" if cell.missed_k else cell.status


def jobs_table(jobs: Iterable[JobStatus], now: float) -> Table:
    """Jobs of a cluster, a row each."""
    table = _table("job", "sweep", "state", "submitted", "took", "run directory")
    for job in jobs:
        began = job.submitted_at
        submitted = "" if began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(began))
        took = "" if began is None else duration((job.ended_at or now) - began)
        table.add_row(job.id, job.sweep, job.state, submitted, took, job.run)
    return table


def _since(job: JobStatus, now: float) -> str:
    if job.submitted_at is None:
        return ""
    if job.ended_at is None:
        return f", submitted {duration(now - job.submitted_at)} ago"
    return f", took {duration(job.ended_at - job.submitted_at)}"


def _bar(status: SweepStatus, width: int) -> RenderableType:
    counts = status.counts
    bar = Table.grid()
    ended = counts.done + counts.failed
    bar.add_row(
        ProgressBar(
            total=counts.cells, completed=ended, width=min(width, 80), complete_style="cyan", finished_style="green"
        )
    )
    return bar


def _counted(status: SweepStatus) -> list[str]:
    counts = status.counts
    of_them = [f"{count:,} of them {what}" for count, what in (
        (counts.diverged, "diverged"), (counts.missed_k, "missed k")) if count]  # fmt: skip
    said = [f"{counts.done:,} of {counts.cells:,} cells done" + (f" ({', '.join(of_them)})" if of_them else "")]
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
        said.append(f"{standing.interrupted} pack{'s' if standing.interrupted > 1 else ''} interrupted")
    return said


def _advice(status: SweepStatus) -> str:
    left = status.counts.pending or status.counts.started
    if status.state in ("stopped", "lost", "died", "failed") or (status.state == "unfinished" and left):
        once_up = " when the cluster is up" if status.state == "lost" else ""
        begun = "; it goes on from the checkpoints" if status.counts.started else ""
        return f"Next: run the same command again{once_up}{begun}"
    return f"Next: {command('fit', status.run)}" if status.state == "finished" and status.job is None else ""


def _grid(cells: Sequence[CellStatus], sources: _Sources, width: int, max_rows: int) -> list[RenderableType]:
    """Best nmse by n_latents and k, or how far it is there; of a grid that does not fit, evenly spaced parts.

    A row for each n_latents, of each source and architecture where there are several.
    """
    places: dict[tuple[_Row, int], list[CellStatus]] = defaultdict(list)
    for cell in cells:
        places[_row(cell, sources), cell.k].append(cell)
    order = in_order(architecture for (_, architecture, _), _ in places)
    all_rows = sorted({row for row, _ in places}, key=lambda row: (row[0], order.index(row[1]), row[2]))
    ks, several = sorted({k for _, k in places}), len(order) > 1
    title = "nmse" if len(places) == len(cells) else "best nmse"
    rows = _spread(all_rows, max_rows)
    names = {row: _row_name(row, sources, several) for row in rows}
    texts = {(row, k): _place(places.get((row, k), [])) for row in rows for k in ks}
    first = max(len(title), *map(len, names.values()))
    each = max(*(len(text) for text in texts.values()), *(len(f"k={k}") for k in ks))
    columns = _spread(ks, max(1, (width - first) // (each + 2)))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, justify="right", no_wrap=True)
    for k in columns:
        table.add_column(f"k={k}", justify="right", no_wrap=True, min_width=min(each, 6))
    for row in rows:
        table.add_row(names[row], *(texts[row, k] for k in columns))
    hidden = [
        f"{more:,} more {name}"
        for more, name in ((len(all_rows) - len(rows), "n_latents"), (len(ks) - len(columns), "k"))
        if more
    ]
    return [table, *([Text(f"... and {', '.join(hidden)}: --cells lists all", "dim")] if hidden else [])]


def _row(cell: CellStatus, sources: _Sources) -> _Row:
    """Which row of the grid it stands in; 0.1.0 had no other architecture."""
    place = list(sources).index(cell.store) if cell.store in sources else len(sources)
    return place, cell.architecture or "topk", cell.n_latents


def _row_name(row: _Row, sources: _Sources, architectures: bool) -> str:
    source, architecture, n_latents = row
    words = [*list(sources.values())[source : source + 1], *([architecture] if architectures else [])]
    return " ".join([*words, f"n={n_latents}"])


def _source_names(status: SweepStatus) -> _Sources:
    """What the sources of a sweep over several are called, as briefly as tells them apart."""
    names: _Sources = {}
    for parts in (("site",), ("subject", "site"), ("subject", "site", "store")):
        names = {s.store: " ".join(str(getattr(s, part) or "?")[:40] for part in parts) for s in status.sources}
        if len(set(names.values())) == len(names):
            break
    return names


def _spread(values: list[_V], count: int) -> list[_V]:
    """At most `count` of them, with the first and the last."""
    if len(values) <= count:
        return values
    return values[:1] if count == 1 else [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _place(cells: Sequence[CellStatus]) -> Text:
    """What all seeds of one n_latents and k have reached."""
    if not cells:
        return Text("")
    statuses = Counter(cell.status for cell in cells)
    style = "red" if statuses["failed"] else ""
    best = min((cell.nmse for cell in cells if cell.status == "done" and cell.nmse is not None), default=None)
    if statuses["done"]:
        number = "done" if best is None else f"{best:.3g}" if is_diverged(best) else f"{best:.4f}"
        whole = statuses["done"] == len(cells)
        style = style or ("red" if is_diverged(best) else "green")
        return Text(number if whole else f"{number} ({statuses['done']}/{len(cells)})", style)
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
    table.add_column("why", no_wrap=True, overflow="ellipsis", max_width=max(20, width - 32))
    for cell in cells:
        table.add_row(cell.cell_id, escape(cell.error or "see its result.json"))
    return table


def _diverged_table(cells: Sequence[CellStatus], width: int) -> Table:
    table = _table("diverged", "nmse", "why it counts as diverged")
    for cell in cells:
        table.add_row(cell.cell_id, _number(cell.nmse), "above 1, worse than the mean alone: fits leave it out")
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
