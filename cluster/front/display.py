"""What a person sees while a command works: bars on a terminal, a line now and then where there is none."""

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from saescale.cluster.front.waits import SaysWaits, duration
from saescale.storage.errors import SaescaleWarning
from saescale.storage.lease import Standing

if TYPE_CHECKING:
    from saescale.cluster.crew.harvest_worker import ActorRow

LINE_EVERY_S = 10.0
ACTORS_SHOWN = 4


class Display:
    """Stages, harvest and sweep progress, warnings; a context manager around one command's work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=4,
        )
        self._waits = SaysWaits(self._say)
        self._task: TaskID | None = None
        self._kind = self._reached = self._stage = ""
        self._began = self._line = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._bars.start()
        self._waits.start()
        self._showwarning, warnings.showwarning = warnings.showwarning, self._warn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._showwarning
        self._waits.end()
        self._end_bar()
        self._bars.stop()

    def stage(self, text: str) -> None:
        self._end_bar()
        if text != self._stage:
            self._stage = text
            self.console.print(f"[bold]·[/] {escape(text)}", highlight=False, soft_wrap=True)

    def harvest(
        self, done: int, total: int, tokens_per_s: float, stage: str, actors: Sequence[float] | None = None
    ) -> None:
        """Progress of a harvest: rows of `total`; `actors` has the tokens/s of each where several share it."""
        if done == 0 and tokens_per_s == 0:
            self.stage(stage)
            return
        left = (total - done) / tokens_per_s if tokens_per_s else None
        self._show("harvest", done, total, f"{tokens_per_s:,.0f} tokens/s{_by_actor(actors or ())}", left)

    def sweep(self, standing: Standing) -> None:
        """Progress of a sweep: finished cells of all, rate, and time left from the share of the FLOPs done."""
        finished = standing.done + standing.failed
        failed = f" ({standing.failed} failed)" if standing.failed else ""
        rate = f"{standing.fraction:.0%} of the FLOPs{failed}, {standing.tokens_per_s:,.0f} SAE tokens/s"
        self._show("cells", finished, standing.cells, rate, standing.left_s)

    def training(self, done: int, total: int, sequences_per_s: float, words: str) -> None:
        """Progress of the training of a subject: sequences of `total`, and how it does."""
        if not sequences_per_s:
            self.stage(words)
            return
        left = (total - done) / sequences_per_s
        self._show("sequences", done, total, f"{sequences_per_s:,.0f} sequences/s, {words}", left)

    def patching(self, done: int, total: int) -> None:
        """Progress of activation patching: heads and MLPs of `total`."""
        since = time.monotonic() - self._began if self._kind == "parts" else 0.0
        rate = done / since if since else 0.0
        self._show("parts", done, total, f"{rate:.1f} heads and MLPs/s", (total - done) / rate if rate else None)

    def evals(self, done: int, total: int, what: str, left_s: float | None) -> None:
        """Progress of evaluations, in pairs of cell and evaluation, and what each costs; first what is predicted."""
        if done == 0:
            about = "" if left_s is None else f", about {duration(left_s)} for all"
            self.stage(f"{total:,} to measure: {what}{about}")
        self._show("evaluations", done, total, what, left_s)

    def _show(self, kind: str, done: int, total: int, rate: str, left: float | None) -> None:
        if kind != self._kind:
            self._end_bar()
            self._kind, self._began, self._line = kind, time.monotonic(), time.monotonic()
        self._reached = f"{kind} {done:,}/{total:,}"
        remaining = f"{duration(left)} left" if left is not None else "time left: measuring"
        if self.console.is_terminal:
            if self._task is None:
                self._task = self._bars.add_task(kind, total=total, rate="", left="")
            self._bars.update(self._task, completed=done, rate=rate, left=remaining)
        elif time.monotonic() - self._line >= LINE_EVERY_S:
            self._line = time.monotonic()
            self.console.print(f"  {self._reached}, {rate}, {remaining}", highlight=False)

    def _end_bar(self) -> None:
        """Leaves one line in place of the bar: how far it came, and how long that took."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        if self._kind:
            took = duration(time.monotonic() - self._began)
            self.console.print(f"  {self._reached} in {took}", highlight=False)
        self._task, self._kind = None, ""

    def _warn(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # A user can act on what saescale says, not on what its libraries say to programmers.
        if issubclass(category, SaescaleWarning):
            self._say(f"warning: {message}")

    def _say(self, line: str) -> None:
        """A line whose first word says what it is: `warning: ...`, `waiting for ...`."""
        kind, _, text = line.partition(" ")
        self.console.print(f"[yellow]{kind}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _by_actor(rates: Sequence[float]) -> str:
    """Each actor's rate where a line has room for them, else the slowest and the fastest."""
    if not rates:
        return ""
    if len(rates) > ACTORS_SHOWN:
        return f" ({len(rates)} actors: {min(rates):,.0f} to {max(rates):,.0f})"
    return f" (by actor: {', '.join(f'{rate:,.0f}' for rate in rates)})"


def actor_table(actors: Sequence["ActorRow"]) -> Table:
    """What each actor of a harvest computed."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("actor", "node", "shards", "rows", "tokens/s"):
        table.add_column(name, justify="left" if name == "node" else "right")
    for row in actors:
        table.add_row(str(row.actor), escape(row.node), str(row.shards), f"{row.rows:,}", f"{row.tokens_per_s:,.0f}")
    return table


def coefficient_table(fits: Mapping[str, Any], laws: Collection[str] | None = None) -> Table:
    """The coefficients of fits.json with their 95 % intervals, of these laws (None: of all)."""
    # Only here: a status needs none of what fits laws.
    from saescale.scaling.laws.notes import coefficient_rows, kind_rows

    table = Table(box=None, header_style="bold", pad_edge=False)
    if any(entry.get("of") for entry in fits["fits"]):
        for name in ("law", "kind of cells", "coefficients, 95 %"):
            table.add_column(name)
        before = ""
        for law, kind, words in kind_rows({"fits": [e for e in fits["fits"] if laws is None or e["law"] in laws]}):
            table.add_row(escape(law) if law != before else "", escape(kind), words)
            before = law
        return table
    for name in ("law", "coefficient", "value", "95 % interval"):
        table.add_column(name, justify="right" if name == "value" else "left")
    previous = ""
    shown = [entry for entry in fits["fits"] if laws is None or entry["law"] in laws]
    for row in coefficient_rows({"fits": shown}):
        interval = "" if row.low is None or row.high is None else f"{row.low:.3g} to {row.high:.3g}"
        table.add_row(row.law if row.law != previous else "", row.coefficient, f"{row.value:.4g}", interval)
        previous = row.law
    return table
