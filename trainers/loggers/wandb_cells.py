"""Weights & Biases: one run per cell, grouped by sweep. The summary run is in wandb_summary.py.

Logging serves the sweep and never fails it: whatever goes wrong here becomes one warning. Everything that
may wait for a server happens in a thread of its own, so that training does not wait with it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from saescale.storage.columns import CurveRow
from saescale.trainers.cell import Cell
from saescale.trainers.loggers import wandb_client as client
from saescale.trainers.loggers.wandb_client import (
    how_to_read,
    how_to_send,
    init,
    one_line,
    resolve_mode,
    run_id,
    warn,
    without_secrets,
)
from saescale.trainers.loggers.wandb_evals import outcome_of
from saescale.trainers.loggers.wandb_settings import Mode, WandbSettings, wandb_directory
from saescale.trainers.loggers.wandb_summary import Logged, log_summary

if TYPE_CHECKING:
    from wandb import Run

# What the rest of the project needs of W&B, in one place.
__all__ = [
    "Logged", "Mode", "WandbLogger", "WandbSettings", "how_to_read", "log_summary", "resolve_mode", "wandb_directory",
]  # fmt: skip

_LONGEST = 128  # W&B's own bound


class WandbLogger:
    """The runs of a pack's cells (see `saescale.trainers.loggers.interface.CellLogger`).

    directory: a folder on this machine; W&B keeps its files under `directory`/wandb. axes: in what else than
    architecture, n, k and seed cells of the sweep differ (trainers/cell.py), which their names say.
    A cell that is opened again, also by another process, continues its run: the id follows from the sweep's
    name and the cell. W&B drops points at steps that it already has, which is right, because a cell that
    goes on from a checkpoint repeats exactly the steps it had done since.
    """

    def __init__(self, settings: WandbSettings, sweep: str, directory: str, axes: Sequence[str] = ()) -> None:
        self._settings = settings
        self._axes = axes
        self._sweep = sweep
        self._directory = directory
        self._mode = resolve_mode(settings)
        self._runs: dict[str, Run] = {}
        self._stuck = False
        self._thread: ThreadPoolExecutor | None = None

    def open(self, cells: Sequence[Cell], context: Mapping[str, Any]) -> None:
        if self._mode == "off":
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="wandb")
        self._later(self._mode_here)
        for cell in cells:
            self._later(self._open, cell, dict(context))

    def log(self, cell: Cell, row: CurveRow) -> None:
        self._later(self._log, cell.cell_id, row)

    def finish(self, cell: Cell, result: Mapping[str, Any]) -> None:
        self._later(self._finish, cell.cell_id, dict(result))

    def close(self) -> None:
        """Waits until all is written; a cell without a result is marked as interrupted and can be resumed."""
        if self._thread:
            self._later(self._finish_rest)
            self._thread.shutdown(wait=True)
            self._thread = None

    def _later(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._thread:
            self._thread.submit(action, *arguments)

    def _mode_here(self) -> None:
        self._mode = client.reachable(self._mode, self._directory)

    def _open(self, cell: Cell, context: Mapping[str, Any]) -> None:
        if self._mode == "off":
            return
        subject = str(context.get("subject", ""))
        fields = cell.model_dump(exclude={"settings"}) | cell.whole_settings.model_dump()
        shared = {f"context_{key}" if key in fields else key: value for key, value in context.items()}
        try:
            run = init(
                self._settings,
                self._mode,
                self._directory,
                id=run_id(cell.cell_id, self._sweep),
                name=_name({"subject": subject, "site": context.get("site"), **fields}, self._axes, cell.cell_id),
                group=self._sweep,
                job_type="cell",
                tags=[tag[:64] for tag in (cell.architecture, subject, str(context.get("site", ""))) if tag],
                config=without_secrets({**shared, **fields, "cell_id": cell.cell_id}),
            )
            run.define_metric("tokens")
            run.define_metric("flops")
            for name in CurveRow._fields:
                if name not in ("step", "tokens", "flops"):
                    run.define_metric(name, step_metric="tokens")
            self._runs[cell.cell_id] = run
        except Exception as error:
            # What kept this run from opening would keep the next ones waiting too: go one mode down.
            self._mode, then = ("offline", "logged offline") if self._mode == "online" else ("off", "not logged")
            warn(f"{cell.cell_id} is not logged, cells after it are {then}: {one_line(error)}")

    def _log(self, cell_id: str, row: CurveRow) -> None:
        if run := self._runs.get(cell_id):
            try:
                values = {name: value for name, value in row._asdict().items() if value is not None}
                run.log(values, step=values.pop("step"), commit=True)
            except Exception as error:
                del self._runs[cell_id]
                warn(f"{cell_id} is no longer logged: {one_line(error)}")

    def _finish(self, cell_id: str, result: Mapping[str, Any]) -> None:
        run = self._runs.pop(cell_id, None)
        if run is None:
            return
        try:
            run.summary.update(outcome_of(result))
            # Once a run waited in vain for its upload, the others are left to W&B's own end of the process,
            # which ends them all within one FINISH_TIMEOUT instead of one after the other.
            if not self._stuck:
                run.finish(exit_code=0 if result.get("status") == "done" else 1)
        except Exception as error:
            self._stuck = True
            warn(f"{cell_id} is not uploaded to its end: {one_line(error)}; {how_to_send(run.settings.sync_dir)}")

    def _finish_rest(self) -> None:
        for cell_id in list(self._runs):
            self._finish(cell_id, {"status": "interrupted"})


def _name(fields: Mapping[str, Any], axes: Sequence[str], cell_id: str) -> str:
    """What a cell's run is called: unlike cells have unlike names."""
    said = [f"{fields['architecture']} n{fields['n_latents']} k{fields['k']}"]
    said += [f"seed {fields['seed']}"] if fields["seed"] else []
    for axis in axes:
        value = fields.get(axis)
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        said += [f"{axis} {shown}"] if axis in fields else []
    name = " ".join(said)
    # What is cut off may be what two of them differ in.
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]} {cell_id[-8:]}"
