"""Trains one pack from the stream to its results, in this process and without Ray.

    results = train_pack(PackJob(cells=[...], store="stores/smollm2", run="runs/grid", sweep="grid"))

Everything that must survive lies in the run directory: a pack that was killed at any moment goes on from its cells'
last common checkpoint when `train_pack` is called again, and ends with the same weights to the last bit, provided that
it has the same number of threads: the kernels' sums do not depend on that, but torch's products between them may.
A checkpoint holds parameters, moments, average, dead counters and the place in the stream; no generator's state, since
nothing is drawn after a cell's first weights, which its seed gives.
"""

import gc
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.live import open_source
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Order, Source
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.own import take
from saescale.trainers.cell import Cell
from saescale.trainers.device import OutOfMemory, default_device, is_out_of_memory, keep_no_large_blocks, set_threads
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.loggers.interface import CellLogger, NoLogger
from saescale.trainers.loggers.wandb_cells import WandbLogger, resolve_mode, wandb_directory
from saescale.trainers.mesh.mesh import ONE, Group
from saescale.trainers.preprocess import SAMPLE_TOKENS, Centre, measure_centre, normalise, to_tensor
from saescale.trainers.training.after_batch import AfterBatch
from saescale.trainers.training.checkpoints import Checkpoints, resume
from saescale.trainers.training.evaluate import Evaluator
from saescale.trainers.training.job import PackJob
from saescale.trainers.training.pack import Pack, stream_loader
from saescale.trainers.training.report import Progress, Reporter
from saescale.trainers.training.results import Provenance, Records


class PackOutcome(NamedTuple):
    results: list[dict[str, Any]]  # rows of results.parquet, of the cells that finished in this call or before
    stopped: bool  # True where `should_stop` ended it early; call again to go on


def train_pack(
    job: PackJob,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    group: Group = ONE,
    device: torch.device | None = None,
) -> PackOutcome:
    """Trains the cells of `job` that have no result yet, from one pass over the stream, on `device` (default: the one
    that there is).

    Where several processes share the cells, each calls this with its `group` (trainers/mesh); the first of them writes
    what is one file, reports, and says when to stop. An error in one process ends it, and then the others.

    Raises SaescaleError where the store or a checkpoint is unusable, OutOfMemory where the pack takes more memory
    than there is, Unavailable where a store does not answer, Superseded where another driver took the run over. A cell
    that fails for a reason of its own, such as a loss that diverges, is no error: its result says `failed`, and why.
    """
    take(job.architectures)
    try:
        return _train(job, report, should_stop, group, device or default_device())
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{len(job.cells)} cells did not fit into memory: {one_line(error)[:300]}") from error
        raise


def _train(
    job: PackJob,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    group: Group,
    device: torch.device,
) -> PackOutcome:
    set_threads(job.threads or torch.get_num_threads())
    # A cell is shared since memory is scarce, and plans count on it. On two cores steps take 4 % (replicas) and 12 %
    # (shards) longer for it, one process alone 3 to 16 %.
    if group is not ONE and device.type == "cpu":
        keep_no_large_blocks()
    # Lightning's trainer and module refer to each other: without this the last pack's weights would still be there.
    gc.collect()
    source = open_source(job.store, [cell.cell_id for cell in job.cells])
    run, first = RunDirectory(job.run, job.driver), group.rank == 0
    _check(job, source)
    finished = _taken(run, job, group)
    results = [result for result in finished.values() if result is not None]
    cells = [cell for cell in job.cells if finished[cell.cell_id] is None]
    if not cells or group.agree([should_stop()])[0]:
        return PackOutcome(results, stopped=bool(cells))

    resumed = resume(run, cells, device, group)
    start = resumed.step if resumed else 0
    with ExitStack() as measured:
        pack = resumed.pack if resumed else Pack(cells, _centre(source, cells[0], group, measured), device, group)

        held_out = HeldOut(source, job.eval.tokens, device, job.store)
        logger = _logger(job) if first else NoLogger()
        logger.open(cells, _context(job, source))
        records = Records(run, Provenance.of(source, job.eval.tokens), logger, group)
        last = max(cell.steps for cell in cells)
        stream = source.resume(resumed.position, last) if resumed else source.batches(order(cells[0]), stop=last)
    try:
        with stream:
            after = AfterBatch(
                Evaluator(held_out, job.eval.every_tokens),
                records,
                Reporter(report if first else lambda progress: None, start, stream),
                Checkpoints(run, job.checkpoint_every_s, stream, start, group),
                should_stop,
                group,
            )
            stream.while_waiting = partial(after.wait, pack)
            _trainer(after, device).fit(pack, stream_loader(stream, source.dtype, device))
    finally:
        logger.close()
    return PackOutcome(results + list(records.results.values()), stopped=bool(pack.running))


def _taken(run: RunDirectory, job: PackJob, group: Group) -> dict[str, dict[str, Any] | None]:
    """The results that cells have; the others are taken, once for all processes that share them."""
    ids = [cell.cell_id for cell in job.cells]
    finished: dict[str, dict[str, Any] | None] = {}
    if group.rank == 0:
        # Each is a few requests, which take a while in an object store.
        with ThreadPoolExecutor(16) as pool:
            finished = dict(zip(ids, pool.map(run.take_cell, ids), strict=True))
    finished, turns = group.tell_first((finished, {name: run.turn(name) for name in ids}))
    for name, turn in turns.items():
        run.share_turn(name, turn)
    return finished


def _centre(source: ActivationStore, cell: Cell, group: Group, measured: ExitStack) -> Centre:
    """As the first process measured it: sums of another one, with other threads, could have other bits. All measure, so
    that each waits for its rows by itself, and not for another one beyond the deadline of a mesh. Until `measured` is
    left, a live source keeps those rows: they are what a pack is trained on first."""
    b_pre, variance = group.tell_first(tuple(measured.enter_context(measured_centre(source, cell))))
    return Centre(b_pre, variance)


def _check(job: PackJob, source: Source) -> None:
    if any(cell.store != source.identity for cell in job.cells):
        raise SaescaleError(
            f"{job.store} is not the store that these cells were planned for (fingerprint {source.identity}); "
            "start a new run directory for a new store"
        )
    if any(cell.heldout_rows not in (None, job.eval.tokens) for cell in job.cells):
        raise SaescaleError(f"these cells are measured on other held-out rows than {job.eval.tokens} (eval.tokens)")
    if len({(cell.batch_tokens, cell.stream_seed) for cell in job.cells}) > 1:
        raise SaescaleError("cells of one pack must share batch_tokens and stream_seed: plan them into different packs")


def order(cell: Cell) -> Order:
    """The order of the data that `cell`, and every other of its pack, is trained in."""
    return Order("train", cell.stream_seed, cell.batch_tokens)


@contextmanager
def measured_centre(source: ActivationStore, cell: Cell) -> Iterator[Centre]:
    """Measured on the first 32,768 rows of the stream, or on all where there are fewer; that stream stays open."""
    sample = torch.empty(min(SAMPLE_TOKENS, source.rows("train")), source.d_model)
    parts = sample.split(cell.batch_tokens)
    with source.batches(order(cell), stop=len(parts)) as stream:
        for part in parts:
            part.copy_(normalise(to_tensor(next(stream).x, source.dtype))[: len(part)])
        del part, parts
        centre = measure_centre(sample)
        del sample
        yield centre


class _OwnSignals(L.Callback):
    """SIGTERM does what it did before. Lightning's handler lets a training go on to the end of a batch, which may have
    to be waited for, and then ends the process as if all were well."""

    def __init__(self) -> None:
        self._at_terminate = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pack: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread() and self._at_terminate is not None:
            signal.signal(signal.SIGTERM, self._at_terminate)


def _trainer(callback: L.Callback, device: torch.device) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        # What shares a cell is the mesh's affair: to Lightning each process is one alone.
        plugins=[LightningEnvironment()],
        max_epochs=1,
        callbacks=[_OwnSignals(), callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _context(job: PackJob, source: ActivationStore) -> dict[str, Any]:
    return {
        "sweep": job.sweep,
        "run": job.run,
        "store_url": job.store,
        "subject": source.subject,
        "site": source.site.name,
        "corpus": source.manifest.corpus,
        "eval_tokens": job.eval.tokens,
    }


def _logger(job: PackJob) -> CellLogger:
    if resolve_mode(job.wandb) == "off":
        return NoLogger()
    return WandbLogger(job.wandb, job.sweep, wandb_directory(job.run), job.axes)
