"""Weights & Biases: one run per cell, grouped by sweep, and one summary run with the fits and figures.

Logging serves the sweep and never fails it: whatever goes wrong here becomes one warning. Everything that
may wait for a server happens in a thread of its own, so that training does not wait with it.
"""

import hashlib
import json
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, field_validator

from storage.errors import SaescaleWarning
from storage.files import local_path
from trainers.cell import Cell, CurveRow
from trainers.subjects import cache_folder

if TYPE_CHECKING:
    from wandb import Run, Settings

Mode = Literal["online", "offline", "off"]

# Seconds to wait for the server when a run opens, when it closes, and when asking whether it is there at all.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 60.0
PROBE_TIMEOUT = 10.0
# At most so many seconds of points are lost when the process is killed.
FLUSH_INTERVAL = 2.0

_FINAL = ("nmse", "l0", "dead_fraction", "dead_fraction_long", "tokens", "flops", "flops_dense", "wall_s")
_SUMMARY = (*_FINAL, "status", "error")
_SECRET_KEY = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$|^key$", re.IGNORECASE)
# What an address can carry besides the place: user:password@ and the query of a presigned URL.
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]*@|(?<=\S)\?\S*(signature|token|key|sig)\S*=\S*", re.IGNORECASE)


class WandbSettings(BaseModel):
    """The `wandb:` section of a sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = "saescale"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "off"] = "auto"

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, mode: object) -> object:
        # YAML reads an unquoted `off` as false.
        return "off" if mode is False else mode


# --- online, offline or off


def resolve_mode(settings: WandbSettings) -> Mode:
    """What `mode` means on this machine. Never prompts, contacts no server, raises nothing.

    `auto` obeys WANDB_MODE where that says `offline` or `disabled`, and else is online when a key is
    configured for the server in question (WANDB_BASE_URL): in the environment, netrc or W&B's settings.
    `online` without a key becomes `offline` with a warning, because asking for one would stop the sweep.
    """
    if settings.mode in ("off", "offline"):
        return settings.mode
    try:
        found = _server()
        from wandb.sdk.lib import wbauth

        if settings.mode == "auto" and found.mode in ("disabled", "offline", "dryrun"):
            return "off" if found.mode == "disabled" else "offline"
        auth = wbauth.authenticate_session(host=found.base_url, source="saescale", prompt=False, update_session=False)
    except Exception as error:
        _warn(f"could not look for a key ({_one_line(error)}): logging offline")
        return "offline"
    if auth is None and settings.mode == "online":
        _warn(f"mode is online but {found.base_url} has no key (run `wandb login`): logging offline")
    return "online" if auth else "offline"


def how_to_read(mode: Mode, directory: str, settings: WandbSettings, sweep: str) -> str:
    """The one line that tells users where the runs of `sweep` are and how to look at them."""
    if mode == "off":
        return "W&B is off"
    if mode == "offline":
        return f"W&B: {_offline_runs(directory)}"
    entity = settings.entity or os.environ.get("WANDB_ENTITY")
    if entity is None:
        return f"W&B: group {sweep!r} of your project {settings.project!r} at {_server().app_url}"
    return f"W&B: {_group_url(entity, settings.project, sweep)}"


def wandb_directory(run: str) -> str:
    """Where W&B keeps the files of a sweep on this machine: the run directory, or the cache when that is remote."""
    return local_path(run) or str(cache_folder() / "wandb" / hashlib.sha256(run.encode()).hexdigest()[:12])


# --- one run per cell


class WandbLogger:
    """The runs of a pack's cells (see `trainers.loggers.CellLogger`).

    directory: a folder on this machine; W&B keeps its files under `directory`/wandb.
    A cell that is opened again, also by another process, continues its run: the id follows from the sweep's
    name and the cell. W&B drops points at steps that it already has, which is right, because a cell that
    goes on from a checkpoint repeats exactly the steps it had done since.
    """

    def __init__(self, settings: WandbSettings, sweep: str, directory: str) -> None:
        self._settings = settings
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
        self._mode = _reachable(self._mode, self._directory)

    def _open(self, cell: Cell, context: Mapping[str, Any]) -> None:
        if self._mode == "off":
            return
        subject = str(context.get("subject", ""))
        fields = cell.model_dump()
        shared = {f"context_{key}" if key in fields else key: value for key, value in context.items()}
        try:
            run = _init(
                self._settings,
                self._mode,
                self._directory,
                id=_run_id(cell.cell_id, self._sweep),
                name=f"n{cell.n_latents} k{cell.k}" + (f" seed {cell.seed}" if cell.seed else ""),
                group=self._sweep,
                job_type="cell",
                tags=[tag[:64] for tag in (cell.activation, subject) if tag],
                config=_without_secrets({**shared, **fields, "cell_id": cell.cell_id}),
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
            _warn(f"{cell.cell_id} is not logged, cells after it are {then}: {_one_line(error)}")

    def _log(self, cell_id: str, row: CurveRow) -> None:
        if run := self._runs.get(cell_id):
            try:
                values = row._asdict()
                run.log(values, step=values.pop("step"), commit=True)
            except Exception as error:
                del self._runs[cell_id]
                _warn(f"{cell_id} is no longer logged: {_one_line(error)}")

    def _finish(self, cell_id: str, result: Mapping[str, Any]) -> None:
        run = self._runs.pop(cell_id, None)
        if run is None:
            return
        try:
            run.summary.update(_without_secrets({key: result[key] for key in _SUMMARY if key in result}))
            # Once a run waited in vain for its upload, the others are left to W&B's own end of the process,
            # which ends them all within one FINISH_TIMEOUT instead of one after the other.
            if not self._stuck:
                run.finish(exit_code=0 if result.get("status") == "done" else 1)
        except Exception as error:
            self._stuck = True
            _warn(f"{cell_id} is not uploaded to its end: {_one_line(error)}; {run.settings.sync_dir} has all of it")

    def _finish_rest(self) -> None:
        for cell_id in list(self._runs):
            self._finish(cell_id, {"status": "interrupted"})


# --- the summary run


class Coefficient(NamedTuple):
    """One number of fits.json with its 95 % interval."""

    law: str
    coefficient: str
    value: float
    low: float | None
    high: float | None


def log_summary(
    settings: WandbSettings,
    sweep: str,
    context: Mapping[str, Any],
    fits: Mapping[str, Any],
    results: pa.Table,
    figures: Sequence[str],
    directory: str,
) -> str | None:
    """The run that holds the outcome of a sweep: coefficients, results, figures, and an artifact of both files.

    fits: the document of fits.json. results: the table of results.parquet. figures: paths or URLs of PNGs.
    Calling it again (a new analysis) updates the same run. Returns the address of the group when it is
    online, else None. Raises nothing.
    """
    try:
        mode = _reachable(resolve_mode(settings), directory)
        if mode == "off":
            return None
        # Errors of cells and sources of fits quote URLs.
        fits = _without_secrets(fits)
        results = pa.Table.from_pylist(_without_secrets(results.to_pylist()), schema=results.schema)
        return _log_summary(settings, mode, sweep, context, fits, results, figures, directory)
    except Exception as error:
        _warn(f"the summary of {sweep}: {_one_line(error)}; the run directory has all of it")
        return None


def _log_summary(
    settings: WandbSettings,
    mode: Mode,
    sweep: str,
    context: Mapping[str, Any],
    fits: Mapping[str, Any],
    results: pa.Table,
    figures: Sequence[str],
    directory: str,
) -> str | None:
    wandb = _import_wandb()
    from PIL import Image

    coefficients = list(_coefficients(fits))
    laws = {name: fit.get("formula") for name, fit in _named(fits)}
    run = _init(
        settings,
        mode,
        directory,
        id=_run_id("summary", sweep),
        name=f"{sweep} summary",
        group=sweep,
        job_type="summary",
        config=_without_secrets({**context, "laws": laws}),
    )
    try:
        shown = {
            "coefficients": wandb.Table(columns=list(Coefficient._fields), data=[list(c) for c in coefficients]),
            "results": wandb.Table(
                columns=results.column_names,
                data=[list(row.values()) for row in results.to_pylist()],
                allow_mixed_types=True,
            ),
        }
        for figure in figures:
            name = os.path.splitext(os.path.basename(figure))[0]
            with fsspec.open(figure, "rb") as file:
                shown[f"figures/{name}"] = wandb.Image(Image.open(file))
        run.log(shown)
        for c in coefficients:
            bounds = {"value": c.value, "low": c.low, "high": c.high}
            run.summary.update({f"{c.law}/{c.coefficient}/{bound}": value for bound, value in bounds.items()})
        for law, fit in _named(fits):
            quality = {key: fit[key] for key in ("points", "rms_log_residual") if key in fit}
            run.summary.update({f"{law}/{key}": value for key, value in quality.items()})
        artifact = wandb.Artifact("fits-" + re.sub(r"[^\w.-]", "-", sweep)[:100], type="fits")
        with artifact.new_file("fits.json") as file:
            json.dump(fits, file, indent=1)
        with artifact.new_file("results.parquet", mode="wb") as file:
            pq.write_table(results, file)
        run.log_artifact(artifact)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=0)
    return _group_url(run.entity, settings.project, sweep) if mode == "online" else None


def _named(fits: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, fit): the law's name, numbered from the second fit of the same law on."""
    seen: Counter[str] = Counter()
    for fit in fits.get("fits", []):
        law = fit["law"]
        seen[law] += 1
        yield (law if seen[law] == 1 else f"{law}-{seen[law]}"), fit


def _coefficients(fits: Mapping[str, Any]) -> Iterator[Coefficient]:
    for law, fit in _named(fits):
        named = dict(fit.get("coefficients", {}))
        named.update({f"exponent_of_n_at_k{k}": c for k, c in (fit.get("exponent_of_n_at_k") or {}).items()})
        for name, c in named.items():
            yield Coefficient(law, name, c["value"], c.get("low"), c.get("high"))


# --- what both kinds of run share


def _import_wandb() -> ModuleType:
    # Read when wandb is imported: no crash reports to its makers, and no lines of its own among ours.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def _init(settings: WandbSettings, mode: Mode, directory: str, **what: Any) -> "Run":
    """Opens a run within INIT_TIMEOUT seconds or raises; an existing one with the same id is continued."""
    wandb = _import_wandb()
    os.makedirs(directory, exist_ok=True)  # else wandb silently writes to a temporary folder
    # Artifacts and tables that wait for their upload lie beside the runs, not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", os.path.abspath(os.path.join(directory, "wandb")))
    run: Run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=mode,
        dir=directory,
        resume="allow",
        reinit="create_new",
        allow_val_change=True,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_INTERVAL,
            # The folder in which a user happens to stand is not part of the experiment: upload none of it.
            disable_git=True,
            disable_code=True,
            # A pack's cells share one device: sampling it once per cell would only multiply one curve.
            x_disable_stats=True,
        ),
        **what,
    )
    return run


def _run_id(what: str, sweep: str) -> str:
    return f"{what}-{hashlib.sha256(sweep.encode()).hexdigest()[:8]}"


def _reachable(mode: Mode, directory: str) -> Mode:
    """`mode`, or offline (with a warning) when it is online and the server gives no answer of any kind.

    A cluster without internet then keeps its runs, to be uploaded from elsewhere, and waits for none of them.
    """
    if mode != "online":
        return mode
    url = _server().base_url
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT):
            return mode
    except urllib.error.HTTPError:
        return mode
    except Exception as error:
        # Certificates are for wandb to judge: it may know of others than Python does.
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return mode
        _warn(f"no answer from {url}: {_one_line(error)}; {_offline_runs(directory)}")
        return "offline"


def _server() -> "Settings":
    """W&B's own settings of this process: environment, then files."""
    _import_wandb()
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings


def _offline_runs(directory: str) -> str:
    runs = shlex.quote(os.path.join(directory, "wandb"))
    return f"offline runs: read them with `wandb leet {runs}`, upload with `wandb sync {runs}/offline-run-*`"


def _group_url(entity: str, project: str, group: str) -> str:
    return f"{_server().app_url}/{quote(entity)}/{quote(project)}/groups/{quote(group, safe='')}"


def _without_secrets(value: Any) -> Any:
    """`value` as JSON-like data, less entries whose key names a secret and less the secret parts of URLs."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(k): _without_secrets(v) for k, v in value.items() if not _SECRET_KEY.search(str(k))}
    if isinstance(value, list | tuple):
        return [_without_secrets(v) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRET_IN_URL.sub("", str(value))


def _one_line(error: BaseException) -> str:
    text = _SECRET_IN_URL.sub("", f"{type(error).__name__}: {error}")
    if key := os.environ.get("WANDB_API_KEY"):
        text = text.replace(key, "***")
    return " ".join(text.split())[:300]


def _warn(text: str) -> None:
    warnings.warn(f"W&B: {text}", SaescaleWarning, stacklevel=2)
