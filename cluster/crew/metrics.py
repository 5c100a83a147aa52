"""What a worker tells Prometheus: Ray's metrics, which the agent of its node exports with the prefix `ray_`.

How long a series lives is Ray's doing (2.60): a worker hands its agent every ten seconds what was set since, and the
agent forgets a gauge that was not set again for twenty. So the gauges of a cell or a pack that ended disappear by
themselves half a minute later at the latest, also those of a worker that was killed. Until then those that people add
up are 0, and those of a cell hold its last evaluation. NaN is not exported, so it cannot mark an end. Counters stay as
long as the agent: one of each kind for every sweep and worker process. A worker that is ended hands over what it has.
"""

import functools
import os
import socket
import warnings
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from ray.util.metrics import Counter, Gauge

from saescale.storage.errors import SaescaleWarning, one_line
from saescale.trainers.cell import Cell
from saescale.trainers.training.job import PackJob
from saescale.trainers.training.report import CellProgress, Progress

_PACK = ("sweep", "worker")
# cell_id alone would tell the series apart: the others are there to group and to label by, and make no more of them.
_CELL = (*_PACK, "cell_id", "n_latents", "k", "seed")

NOTHING = Progress(
    step=0,
    steps=0,
    tokens_per_s=0.0,
    running=0,
    done=0,
    failed=0,
    stream_wait=0.0,
    cells=(),
    ended=(),
    trained_tokens=0,
)

_Arguments = ParamSpec("_Arguments")


def _never_fails(
    method: Callable[Concatenate["WorkerMetrics", _Arguments], None],
) -> Callable[Concatenate["WorkerMetrics", _Arguments], None]:
    """A pack is worth more than its metrics: the first error switches them off, with one warning."""

    @functools.wraps(method)
    def guarded(self: "WorkerMetrics", *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self.on:
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.on = False
                text = f"{self.worker} exports no metrics any more: {type(error).__name__}: {one_line(error)[:300]}"
                warnings.warn(text, SaescaleWarning, stacklevel=2)

    return guarded


class WorkerMetrics:
    """The metrics of the packs that this process trains, one after another: `start`, `update` ..., `end`.

    No method raises. `worker` is HOST/PID, a label of every series beside those that Ray adds.
    """

    def __init__(self) -> None:
        self.worker = f"{socket.gethostname()}/{os.getpid()}"
        self.on = True
        self._series: _Series | None = None
        self._cells: dict[str, Cell] = {}
        self._last = NOTHING

    @_never_fails
    def start(self, job: PackJob) -> None:
        """The updates that follow are about this pack."""
        self._series = self._series or _Series()
        self._tags = {"sweep": job.sweep, "worker": self.worker}
        self._cells = {cell.cell_id: cell for cell in job.cells}
        self._last = NOTHING

    @_never_fails
    def update(self, progress: Progress) -> None:
        """Takes over what a pack reports."""
        assert self._series is not None
        self._series.set_pack(progress, self._tags)
        for cell in (*progress.cells, *progress.ended):
            self._series.set_cell(cell, self._cell_tags(cell.cell_id))
        self._series.count(self._last, progress, self._tags)
        self._last = progress

    @_never_fails
    def end(self) -> None:
        """The pack runs no more, whatever ended it."""
        if self._series is None or self._last is NOTHING:
            return
        self._series.set_pack(NOTHING, self._tags)
        if not self._last.running:
            self._series.packs_finished.inc(1, self._tags)

    def _cell_tags(self, cell_id: str) -> dict[str, str]:
        cell = self._cells[cell_id]
        numbers = {"n_latents": str(cell.n_latents), "k": str(cell.k), "seed": str(cell.seed)}
        return self._tags | numbers | {"cell_id": cell_id}


class _Series:
    """Names, what they mean, and where in a report each value stands."""

    def __init__(self) -> None:
        self.stream_rate = Gauge(
            "saescale_stream_tokens_per_second", "Tokens of the stream a second, since the pack began", _PACK
        )
        self.sae_rate = Gauge(
            "saescale_sae_tokens_per_second", "The same, times the cells that train on each of them", _PACK
        )
        self.stream_wait = Gauge(
            "saescale_stream_wait_ratio", "Share of the last half second or longer spent waiting for the stream", _PACK
        )
        self.running = Gauge("saescale_cells_running", "Cells of the pack that train", _PACK)
        self.nmse = Gauge("saescale_nmse_ratio", "Held-out nmse of a cell at its last evaluation", _CELL)
        self.dead = Gauge(
            "saescale_dead_fraction_ratio", "Dead fraction of a cell's latents at its last evaluation", _CELL
        )
        # Ray adds _total to the name of a counter that lacks it.
        self.done = Counter("saescale_cells_done_total", "Cells that reached their last step", _PACK)
        self.failed = Counter("saescale_cells_failed_total", "Cells that failed", _PACK)
        self.packs_finished = Counter("saescale_packs_finished_total", "Packs of which no cell is left", _PACK)
        self.tokens = Counter("saescale_sae_tokens_total", "Tokens trained on, summed over the cells", _PACK)

    def set_pack(self, progress: Progress, tags: dict[str, str]) -> None:
        self.stream_rate.set(float(progress.tokens_per_s), tags)
        self.sae_rate.set(float(progress.tokens_per_s * progress.running), tags)
        self.stream_wait.set(float(progress.stream_wait), tags)
        self.running.set(progress.running, tags)

    def set_cell(self, cell: CellProgress, tags: dict[str, str]) -> None:
        if cell.nmse is not None and cell.dead_fraction is not None:
            self.nmse.set(float(cell.nmse), tags)
            self.dead.set(float(cell.dead_fraction), tags)

    def count(self, before: Progress, now: Progress, tags: dict[str, str]) -> None:
        growth = (
            (self.done, now.done - before.done),
            (self.failed, now.failed - before.failed),
            (self.tokens, now.trained_tokens - before.trained_tokens),
        )
        for counter, more in growth:
            if more > 0:  # Ray refuses to add 0
                counter.inc(more, tags)
