"""Runs a sweep from its spec to its report: checks the stores, plans packs, has them trained, fits the laws."""

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from saescale.cluster.sweep.awaited import AwaitedCells, kept_for_later
from saescale.cluster.sweep.cautions import cautions_of_each
from saescale.cluster.sweep.evaluate import evaluate, missing_evaluations
from saescale.cluster.sweep.identity import provenance_of
from saescale.cluster.sweep.ledger import Ledger, open_ledger, recorded_precision
from saescale.cluster.sweep.meshes import check_meshes
from saescale.cluster.sweep.spec import SweepSpec
from saescale.cluster.sweep.stores import open_stores, verify
from saescale.cluster.sweep.watcher import SweepDisplay
from saescale.scaling.figures.palette import colours_of
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report.report import analyse, is_current
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.files import join, list_names, local_path, read_bytes
from saescale.storage.lease import Lease, read_driver, require_free
from saescale.storage.live import is_live
from saescale.storage.rundir import RunDirectory
from saescale.storage.waiting import waiting
from saescale.storage.writable import require_lasting, require_writable
from saescale.trainers.loggers.wandb_cells import how_to_read, log_summary, resolve_mode, wandb_directory
from saescale.trainers.precision import Precision

if TYPE_CHECKING:
    from saescale.cluster.crew.live import Producing
    from saescale.trainers.harvest.live_spec import LiveSpec

JOB = "SAESCALE_JOB"  # in the environment of a submitted sweep: the id of its Ray job
_SETTINGS = FitSettings()
WANDB = "wandb.json"  # what was logged, and how to read it


class SweepOutcome(NamedTuple):
    run: RunDirectory
    fits: dict[str, Any]
    cells: int
    failed: int
    trained: int  # cells that this call trained; 0 where all were done before
    wandb: str | None  # how to read what was logged


def run_sweep(
    spec: SweepSpec,
    display: SweepDisplay,
    address: str | None = None,
    settings: FitSettings = _SETTINGS,
    extending: bool = False,
    retry_failed: bool = False,
) -> SweepOutcome:
    """Trains every cell of `spec` that has no result yet, fits the laws and writes the report.

    `extending`: spec.out may hold the same sweep with fewer cells (extend.py), and gets the others. `retry_failed`:
    cells that failed are trained again. It can be killed at any moment and called again. Raises SaescaleError on a
    store or run directory that cannot be used, also because another driver works on it, and KeyboardInterrupt after
    the workers have saved their checkpoints.
    """
    run = RunDirectory(spec.out)
    trained = 0
    for url in (spec.out, *spec.stores):  # its workers are other processes
        require_lasting(url)
    check_meshes(spec.planned, spec.resources)  # before a live source is begun
    with ExitStack() as held:
        awaited, lives = AwaitedCells(), spec.lives
        # Without them nobody knows yet what the cells are; the others begin when it is known what they are needed for.
        new = {url: lives.pop(url) for url in list(lives) if not is_live(url)}
        produced = [_produce(new, run, address, held, display, awaited)] if new else []
        stores = open_stores(spec)
        recorded = run.read_spec()
        if recorded is None:
            require_writable(run.url)  # before any minute is spent
        precision = recorded_precision(recorded) or _precision(spec, address, held)
        ledger = open_ledger(run, recorded, spec, stores, precision, extending)
        if retry_failed:
            ledger.forget_failed()
        lease, job = None, os.environ.get(JOB)
        if ledger.pending:
            for caution in cautions_of_each(spec, {store.url: store.d_model for store in stores}):
                warnings.warn(caution, SaescaleWarning, stacklevel=2)
            if recorded is not None:
                require_writable(run.url)
            dead = require_free(run.url)  # now, or somebody would wait for workers in vain
            verify(stores, spec.eval.tokens, display)
            steps = ledger.checkpoint_steps()
            awaited.begin(ledger, steps)
            if lives:
                produced.append(_produce(lives, run, address, held, display, awaited))
            display.stage("starting the workers")
            # Only here: a sweep that is finished is shown without the seconds that Ray takes to import.
            from saescale.cluster.crew.head import HeadLost, explained
            from saescale.cluster.crew.train_crew import TrainCrew
            from saescale.cluster.sweep.execute import Execution
            from saescale.cluster.sweep.gang import Meshes
            from saescale.cluster.sweep.meshes import plan_meshes
            from saescale.cluster.sweep.packing import BATCH_FLOPS, pack_cells
            from saescale.cluster.sweep.turns import Turns

            auto = precision if spec.train.precision == "auto" else None
            taken = [each.taken for each in produced]
            beside = {name: sum(each.get(name, 0.0) for each in taken) for each in taken for name in each}
            with TrainCrew(len(ledger.cells), spec.resources, address, auto, beside or None) as crew:
                trained = len(ledger.pending)
                remote = local_path(run.url) is None
                needs = crew.needs(stores, spec.eval.tokens, remote)
                flops = BATCH_FLOPS["cuda" if crew.on_gpu else "cpu"]
                live = {store.fingerprint: spec.lives[store.url] for store in stores if store.url in spec.lives}
                on_mesh = crew.needs_on_mesh(stores, spec.eval.tokens, remote)
                layouts = plan_meshes(ledger.pending, spec.resources, crew.most, crew.memory, needs, on_mesh)
                single = [cell for cell in ledger.pending if cell.cell_id not in layouts]
                packs = [[cell] for cell in ledger.pending if cell.cell_id in layouts]
                packs += pack_cells(single, steps, crew.count, crew.memory, needs, flops, set(live)) if single else []
                meshes = Meshes(layouts, on_mesh)
                turns = Turns(awaited, {name for name, source in live.items() if source.remove_hidden_states})
                if layouts:
                    crew.widen(len(single) + sum(layout.ranks for layout in layouts.values()))
                for note in kept_for_later(spec.lives, ledger, packs, crew.count):
                    crew.warn(note)
                # Not before the plan stands: a sweep that cannot be run leaves no run directory behind.
                lease = held.enter_context(Lease(run.url, job, dead))
                ledger.begin()
                try:
                    with explained():
                        Execution(spec, ledger, crew, needs, packs, steps, lease, display, turns, meshes).run()
                except HeadLost as error:
                    lease.end("lost", str(error))
                    raise
            for each in produced:
                each.done = True
        else:
            if not _is_concluded(run, settings) or missing_evaluations(spec, run).missing:
                lease = held.enter_context(Lease(run.url, job))
            # Cells of an extension may have their results already.
            ledger.write_spec()
        evaluate(spec, RunDirectory(run.url, lease.driver if lease else None), address, display)
        fits, wandb = _analyse(spec, ledger, display, settings)
        if lease is not None:
            lease.end("finished")
    failed = sum(result["status"] == "failed" for result in ledger.results.values())
    return SweepOutcome(run, fits, len(ledger.cells), failed, trained, wandb)


def _produce(
    lives: Mapping[str, "LiveSpec"],
    run: RunDirectory,
    address: str | None,
    held: ExitStack,
    display: SweepDisplay,
    awaited: AwaitedCells,
) -> "Producing":
    """Has the blocks of these live sources made until `held` ends."""
    from saescale.cluster.crew.live import producing

    require_writable(run.url)
    return held.enter_context(producing(lives, address, display.stage, awaited.of))


def _precision(spec: SweepSpec, address: str | None, held: ExitStack) -> Precision:
    """That of a sweep which begins: as it names it, or what `auto` is (crew/precision.py)."""
    if spec.train.precision != "auto":
        return spec.train.precision
    from saescale.cluster.crew.precision import auto_precision

    return auto_precision(spec.resources, address, held)


def _is_concluded(run: RunDirectory, settings: FitSettings) -> bool:
    """Whether the driver that trained the last cells also fitted the laws and said so."""
    last = read_driver(run.url)
    return (last is None or last.state == "finished") and is_current(run, settings)


def _analyse(
    spec: SweepSpec, ledger: Ledger, display: SweepDisplay, settings: FitSettings
) -> tuple[dict[str, Any], str | None]:
    """Fits, figures, report and the summary run in W&B; read back where they are there for these results already."""
    run = ledger.run
    ledger.settle()
    made = None
    fits = run.read_json("fits.json") if is_current(run, settings) else None
    if fits is None:
        display.stage("fitting the laws, drawing the figures, writing the report")
        made = analyse(run, settings, provenance=provenance_of(run, ledger.document))
        fits = made.document
    mode = resolve_mode(spec.wandb)
    if mode == "off":
        return fits, None
    logged = run.read_json(WANDB)
    if not _is_logged(logged, fits, mode):
        display.stage("logging the summary to W&B")
        figures = _drawn(run) if made is None else made.figure_files()
        folder = wandb_directory(run.url)
        provenance, results = provenance_of(run, ledger.document), run.read_results()
        with waiting("W&B to take the summary"):
            colours = colours_of(fits)
            done = log_summary(
                spec.wandb, spec.name, provenance, fits, results, figures, folder, colours, run.read_evals()
            )
        read = f"W&B: {done.url}" if done.url else how_to_read(done.mode, folder, spec.wandb, spec.name)
        if not done.whole:
            read += "; the summary was not sent whole, run the sweep again to send it"
        logged = {"made_from": _made_from(fits), "mode": done.mode, "whole": done.whole, "read": read}
        # Last, so that an interrupted summary is logged again.
        run.write_json(WANDB, logged)
    return fits, logged["read"]


def _drawn(run: RunDirectory) -> dict[str, bytes]:
    """The files of the figures of an earlier analysis, by their names."""
    folder, found = join(run.url, "figures"), {}
    for name in list_names(folder):
        try:
            found[name] = read_bytes(join(folder, name))
        except (OSError, SaescaleError) as error:
            warnings.warn(f"the figure {name} is not logged: {one_line(error)}", SaescaleWarning, stacklevel=2)
    return found


def _made_from(fits: dict[str, Any]) -> dict[str, Any]:
    """What a summary is of: the laws' cells and settings, and the evaluations where there are any."""
    evaluated = {"evaluations": fits["evaluations"]} if "evaluations" in fits else {}
    return {**fits["made_from"], **evaluated}


def _is_logged(logged: dict[str, Any] | None, fits: dict[str, Any], mode: str) -> TypeGuard[dict[str, Any]]:
    """Whether what WANDB says of an earlier summary leaves nothing to do: it is of these fits and whole, and on the
    server where there is one now."""
    return (
        logged is not None
        and isinstance(logged.get("read"), str)
        and logged.get("made_from") == _made_from(fits)
        and logged.get("whole") is True
        and (mode != "online" or logged.get("mode") == "online")
    )
