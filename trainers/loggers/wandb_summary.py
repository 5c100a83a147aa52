"""The summary run of a sweep in Weights & Biases: its laws, figures, results, and an artifact of the files."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from saescale.scaling.metrics import metrics_table
from saescale.storage.columns import EVALS, is_diverged, misses_k
from saescale.trainers.loggers import wandb_client as client
from saescale.trainers.loggers.wandb_client import (
    group_url,
    how_to_send,
    import_wandb,
    init,
    one_line,
    resolve_mode,
    run_id,
    warn,
    without_secrets,
)
from saescale.trainers.loggers.wandb_evals import log_metrics
from saescale.trainers.loggers.wandb_settings import Mode, WandbSettings
from saescale.trainers.loggers.wandb_workspace import Arms, save_workspace

_NO_COLOURS: Mapping[str, str] = {}
_FILES = (".pdf", ".svg", ".png")  # figures as the artifact holds them


class Coefficient(NamedTuple):
    """One number of fits.json with its 95 % interval."""

    law: str
    coefficient: str
    value: float
    low: float | None
    high: float | None


class Compared(NamedTuple):
    """An architecture at one N and L0: its nmse with its 95 % interval, and the measured L0 of its cells."""

    of: str
    n_latents: float
    k: float
    architecture: str
    nmse: float
    low: float | None
    high: float | None
    l0: float | None


class Logged(NamedTuple):
    """What became of a summary. `mode`: how it was logged, after asking whether the server is there. `url`: where to
    look when it is online. `whole`: all that this mode can do is done, so that logging it again would add nothing."""

    mode: Mode
    url: str | None
    whole: bool


def log_summary(
    settings: WandbSettings,
    sweep: str,
    context: Mapping[str, Any],
    fits: Mapping[str, Any],
    results: pa.Table,
    figures: Mapping[str, bytes],
    directory: str,
    colours: Mapping[str, str] = _NO_COLOURS,
    evals: pa.Table | None = None,
) -> Logged:
    """The run that holds the outcome of a sweep: coefficients, results, figures, and an artifact of the files.

    fits: the document of fits.json. results: the table of results.parquet. evals: that of evals.parquet, whose metrics
    of whole cells stand beside the results, and in the summaries of the cells' own runs. figures: files of figures by
    their names; those with Plotly's JSON are interactive, others shown as their PNG, and PDF, SVG and PNG go into the
    artifact.
    colours: #rrggbb of each architecture where there are several, in the order of the figures.
    Calling it again (a new analysis, or one that was not logged whole) updates the same run. The URL is that of the
    group and, with wandb-workspaces, of a workspace of its panels. Raises nothing: what could not be sent is one
    warning.
    """
    mode: Mode = "offline"
    try:
        mode = client.reachable(resolve_mode(settings), directory)
        if mode == "off":
            return Logged(mode, None, True)
        # Errors of cells and sources of fits quote URLs.
        fits = without_secrets(fits)
        results = pa.Table.from_pylist(without_secrets(results.to_pylist()), schema=results.schema)
        evals = EVALS.empty_table() if evals is None else evals
        return _log_summary(settings, mode, sweep, context, fits, results, evals, figures, directory, colours)
    except Exception as error:
        warn(f"the summary of {sweep}: {one_line(error)}; the run directory has all of it")
        return Logged(mode, None, False)


def _log_summary(
    settings: WandbSettings,
    mode: Mode,
    sweep: str,
    context: Mapping[str, Any],
    fits: Mapping[str, Any],
    results: pa.Table,
    evals: pa.Table,
    figures: Mapping[str, bytes],
    directory: str,
    colours: Mapping[str, str],
) -> Logged:
    coefficients = list(_coefficients(fits))
    marks = {
        "cells_diverged": sum(is_diverged(row.get("nmse")) for row in results.to_pylist()),
        "cells_missed_k": sum(misses_k(row.get("l0_error")) for row in results.to_pylist()),
    }
    run = init(
        settings,
        mode,
        directory,
        id=run_id("summary", sweep),
        name=f"{sweep} summary",
        group=sweep,
        job_type="summary",
        config=without_secrets({**context, "laws": {name: fit.get("formula") for name, fit in _named(fits)}}),
    )
    shown = dict(_figures(figures))
    # Each part on its own: what one of them meets does not keep the others back.
    parts: dict[str, Callable[[], Any]] = {
        "figures": lambda: run.log(shown) if shown else None,
        "tables": lambda: run.log(_tables(fits, coefficients, metrics_table(results, evals))),
        "coefficients": lambda: run.summary.update(_flat(fits, coefficients) | marks),
        "artifact": lambda: run.log_artifact(_artifact(sweep, fits, results, figures)),
    }
    failed = []
    for name, send in parts.items():
        try:
            send()
        except Exception as error:
            failed.append(f"{name} ({one_line(error)})")
    if failed:
        warn(f"of the summary of {sweep} these are not logged: {'; '.join(failed)}; the run directory has all of it")
    sync_dir = run.settings.sync_dir
    whole = log_metrics(settings, mode, sweep, results, evals, directory) and not failed
    try:
        run.finish(exit_code=1 if failed else 0)
    except Exception as error:
        # wandb keeps what an online run logs, but not its artifacts.
        warn(
            f"the summary of {sweep} is not uploaded to its end: {one_line(error)}; {how_to_send(sync_dir)} "
            "but for its artifact, whose files are in the run directory"
        )
        return Logged(mode, None, False)
    if mode != "online":
        return Logged(mode, None, whole)
    # Panels are a help for readers: a server or a machine that cannot make them will not do so the next time either.
    runs = {run_id(row["cell_id"], sweep): row["architecture"] for row in results.to_pylist()} if colours else {}
    arms = Arms(colours, {run: name for run, name in runs.items() if name in colours})
    view = save_workspace(run.entity, settings.project, sweep, list(shown), arms)
    url = group_url(run.entity, settings.project, sweep) + (f" and, as panels, {view}" if view else "")
    return Logged(mode, url, whole)


def _tables(fits: Mapping[str, Any], coefficients: Sequence[Coefficient], results: pa.Table) -> dict[str, Any]:
    wandb = import_wandb()
    rows = [list(row.values()) for row in results.to_pylist()]
    compared = list(_compared(fits))
    tables = {"comparison": wandb.Table(columns=list(Compared._fields), data=[list(c) for c in compared])}
    return (tables if compared else {}) | {
        "coefficients": wandb.Table(columns=list(Coefficient._fields), data=[list(c) for c in coefficients]),
        "results": wandb.Table(columns=results.column_names, data=rows, allow_mixed_types=True),
    }


def _flat(fits: Mapping[str, Any], coefficients: Sequence[Coefficient]) -> dict[str, Any]:
    """The numbers of the laws by names such as "n_k/alpha/low", by which runs are compared."""
    flat: dict[str, Any] = {}
    for c in coefficients:
        flat |= {f"{c.law}/{c.coefficient}/{bound}": getattr(c, bound) for bound in ("value", "low", "high")}
    for law, fit in _named(fits):
        flat |= {f"{law}/{key}": fit[key] for key in ("points", "rms_log_residual") if key in fit}
    return flat


def _figures(files: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
    """(name, what W&B shows): interactive where there is Plotly's JSON, else the PNG. One that cannot be read costs a
    warning, not the others."""
    wandb = import_wandb()
    of_kind: dict[str, dict[str, bytes]] = {".json": {}, ".png": {}}
    for file, content in files.items():
        name, kind = os.path.splitext(file)
        of_kind.get(kind, {})[name] = content
    for name in of_kind[".json"] | of_kind[".png"]:
        try:
            if name in of_kind[".json"]:
                from plotly.graph_objects import Figure

                yield f"figures/{name}", wandb.Plotly(Figure(json.loads(of_kind[".json"][name])))
            else:
                from PIL import Image

                yield f"figures/{name}", wandb.Image(Image.open(io.BytesIO(of_kind[".png"][name])))
        except Exception as error:
            warn(f"the figure {name} is not logged: {one_line(error)}")


def _artifact(sweep: str, fits: Mapping[str, Any], results: pa.Table, figures: Mapping[str, bytes]) -> Any:
    """fits.json, results.parquet and the figures as files."""
    artifact = import_wandb().Artifact("fits-" + re.sub(r"[^\w.-]", "-", sweep)[:100], type="fits")
    with artifact.new_file("fits.json") as file:
        json.dump(fits, file, indent=1)
    with artifact.new_file("results.parquet", mode="wb") as file:
        pq.write_table(results, file)
    for name, content in figures.items():
        if name.endswith(_FILES):
            with artifact.new_file(f"figures/{name}", mode="wb") as file:
                file.write(content)
    return artifact


def _compared(fits: Mapping[str, Any]) -> Iterator[Compared]:
    """The comparison of architectures at equal N and L0."""
    for entry in fits.get("comparison", []):
        of = ", ".join(map(str, entry["of"].values()))
        for point in entry["equal_l0"]:
            for name, found in point["nmse"].items():
                yield Compared(
                    of, point["n_latents"], point["k"], name, found["value"], found["low"], found["high"], found["l0"]
                )


def _named(fits: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, fit): the law's name with what is held fixed, whether it has a floor, and its kind of cells where there
    are several, such as "n-k8-floor-gated"; of a metric after its name, "downstream_loss.kl/n_k"."""
    seen: Counter[str] = Counter()
    of_metrics = [fit for entry in fits.get("metrics", []) for fit in entry["fits"]]
    for fit in (*fits.get("fits", []), *of_metrics):
        law = (f"{fit['metric']}/" if "metric" in fit else "") + fit["law"]
        law += "".join(f"-{column}{value:g}" for column, value in (fit.get("at") or {}).items())
        law += "-floor" if fit.get("floor") else ""
        law += "".join(f"-{value}" for value in (fit.get("of") or {}).values())
        seen[law] += 1
        yield (law if seen[law] == 1 else f"{law}-{seen[law]}"), fit


def _coefficients(fits: Mapping[str, Any]) -> Iterator[Coefficient]:
    for law, fit in _named(fits):
        named = dict(fit.get("coefficients", {}))
        named.update({f"exponent_of_n_at_k{k}": c for k, c in (fit.get("exponent_of_n_at_k") or {}).items()})
        for name, c in named.items():
            yield Coefficient(law, name, c["value"], c.get("low"), c.get("high"))
