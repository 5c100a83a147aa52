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
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from pydantic import BaseModel, Field
from saescale.storage import checkpoint
from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.storage.rundir import RunDirectory
from saescale.storage.source import Batches, Order, Source
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import OutOfMemory, default_device, is_out_of_memory, set_threads
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.loggers.interface import CellLogger, NoLogger
from saescale.trainers.loggers.wandb_cells import WandbLogger, WandbSettings, resolve_mode, wandb_directory
from saescale.trainers.preprocess import SAMPLE_TOKENS, Centre, measure_centre, normalise, to_tensor
from saescale.trainers.training.checkpoints import Checkpoint
from saescale.trainers.training.evaluate import Evaluate
from saescale.trainers.training.pack import Pack, stream_loader
from saescale.trainers.training.report import Progress, Report


class PackJob(BaseModel):
    """All that a worker needs to train a pack. Cells must share store, batch_tokens and stream_seed."""

    cells: list[Cell] = Field(min_length=1)
    store: str  # URL
    run: str  # URL of the run directory
    sweep: str  # name; W&B group
    eval: EvalSpec = EvalSpec()
    wandb: WandbSettings = WandbSettings(mode="off")
    checkpoint_every_s: float = Field(default=60.0, gt=0)
    threads: int | None = None  # CPU threads; None leaves torch's own setting
    driver: str | None = None  # who holds the run (storage/lease.py); None: nobody has to


class PackOutcome(NamedTuple):
    results: list[dict[str, Any]]  # rows of results.parquet, of the cells that finished in this call or before
    stopped: bool  # True where `should_stop` ended it early; call again to go on


def train_pack(
    job: PackJob,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PackOutcome:
    """Trains the cells of `job` that have no result yet, from one pass over the stream.

    Raises SaescaleError where the store or a checkpoint is unusable, OutOfMemory where the pack takes more memory
    than there is, Unavailable where a store does not answer, Superseded where another driver took the run over. A cell
    that fails for a reason of its own, such as a loss that diverges, is no error: its result says `failed`, and why.
    """
    try:
        return _train(job, report, should_stop)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{len(job.cells)} cells did not fit into memory: {one_line(error)[:300]}") from error
        raise


def _train(job: PackJob, report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> PackOutcome:
    set_threads(job.threads or torch.get_num_threads())
    # Lightning's trainer and module refer to each other: without this the last pack's weights would still be there.
    gc.collect()
    store, run = ActivationStore.open(job.store), RunDirectory(job.run)
    _check(job.cells, store)
    finished = {cell.cell_id: run.read_cell_result(cell.cell_id) for cell in job.cells}
    results = [result for result in finished.values() if result is not None]
    cells = [cell for cell in job.cells if finished[cell.cell_id] is None]
    if not cells:
        return PackOutcome(results, stopped=False)

    device = default_device()
    resumed = _resume(run, cells, device)
    start, position = (resumed.step, resumed.position) if resumed else (0, None)
    pack = resumed.pack if resumed else Pack(cells, measured_centre(store, cells[0]), device)

    held_out = HeldOut(store, job.eval.tokens, device)
    logger = _logger(job)
    logger.open(cells, _context(job, store))
    evaluate = Evaluate(held_out, job.eval.every_tokens, run, store, logger, job.driver)
    try:
        with _stream(store, cells[0], max(cell.steps for cell in cells), position) as stream:
            # The order matters: a stop is noticed by Report and saved by Checkpoint, which skips finished cells.
            checkpoints = Checkpoint(run, job.checkpoint_every_s, stream, job.driver, start)
            callbacks = [evaluate, Report(report, should_stop, start, stream), checkpoints]
            _trainer(callbacks, device).fit(pack, stream_loader(stream, store.dtype, device))
    finally:
        logger.close()
    return PackOutcome(results + list(evaluate.results.values()), stopped=bool(pack.running))


def _check(cells: Sequence[Cell], store: ActivationStore) -> None:
    if any(cell.store != store.fingerprint for cell in cells):
        raise SaescaleError(
            f"{store.url} is not the store that these cells were planned for (fingerprint {store.fingerprint}); "
            "start a new run directory for a new store"
        )
    if len({(cell.batch_tokens, cell.stream_seed) for cell in cells}) > 1:
        raise SaescaleError("cells of one pack must share batch_tokens and stream_seed: plan them into different packs")


class _Resumed(NamedTuple):
    pack: Pack
    step: int
    position: dict[str, Any]  # of the stream


def _resume(run: RunDirectory, cells: Sequence[Cell], device: torch.device) -> _Resumed | None:
    """The pack at the last step that all cells have a good checkpoint of; None where there is no such step.

    Good means undamaged and, for all cells, from the same order of the stream.
    """
    urls = [run.checkpoint_url(cell.cell_id) for cell in cells]
    steps = [set(checkpoint.steps(url)) for url in urls]
    common = set.intersection(*steps)
    if not common and all(steps):
        text = f"the {len(cells)} cells of a pack have no checkpoint at a common step and start from the beginning"
        warnings.warn(text, SaescaleWarning, stacklevel=2)
    for step in sorted(common, reverse=True):
        try:
            return _restore(urls, cells, step, device)
        except SaescaleError as error:
            text = f"checkpoint at step {step} cannot be used, going back to the one before or to the start: {error}"
            warnings.warn(text, SaescaleWarning, stacklevel=2)
    return None


def _restore(urls: Sequence[str], cells: Sequence[Cell], step: int, device: torch.device) -> _Resumed:
    """Cell by cell, so that the states of two are never in memory beside the pack. Raises SaescaleError."""
    tensors, state, _ = checkpoint.load(urls[0], step)
    position = state.get("stream", {})
    if not position or "variance" not in state:
        raise SaescaleError(f"{urls[0]} does not say the order of its data or the scale of its loss")
    # The centre too comes from the checkpoint, so that the pack goes on with the same bits.
    pack = Pack(cells, Centre(torch.from_numpy(tensors["centre"]), state["variance"]), device)
    for training_cell, url in zip(pack.training_cells, urls, strict=True):
        tensors, state, _ = checkpoint.load(url, step)
        if state.get("stream") != position:
            raise SaescaleError(f"{url} names another order of its data than the rest of the pack, or none")
        try:
            training_cell.restore(tensors, state)
        except (KeyError, TypeError, RuntimeError) as error:  # a part is missing, or has another shape
            raise SaescaleError(f"{url} holds no checkpoint of this cell ({one_line(error)})") from error
    return _Resumed(pack, step, position)


def measured_centre(store: ActivationStore, cell: Cell) -> Centre:
    """Measured on the first rows of the stream."""
    sample = torch.empty(min(SAMPLE_TOKENS, store.rows("train")), store.d_model)
    with _stream(store, cell, -(-len(sample) // cell.batch_tokens)) as stream:
        for number, batch in enumerate(stream):
            part = sample[number * cell.batch_tokens : (number + 1) * cell.batch_tokens]
            part.copy_(normalise(to_tensor(batch.x, store.dtype))[: len(part)])
    return measure_centre(sample)


def _stream(store: Source, cell: Cell, batches: int, position: dict[str, Any] | None = None) -> Batches:
    """From the first batch, or from a checkpoint's `position` on in the order that it was trained in until then."""
    if position is not None:
        return store.resume(position, stop=batches)
    return store.batches(Order("train", cell.stream_seed, cell.batch_tokens), stop=batches)


def _trainer(callbacks: list[L.Callback], device: torch.device) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _context(job: PackJob, store: ActivationStore) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "sweep": job.sweep,
        "run": job.run,
        "store_url": job.store,
        "subject": manifest.subject,
        "site": f"{manifest.site.hook}.{manifest.site.layer}",
        "eval_tokens": job.eval.tokens,
    }


def _logger(job: PackJob) -> CellLogger:
    if resolve_mode(job.wandb) == "off":
        return NoLogger()
    return WandbLogger(job.wandb, job.sweep, wandb_directory(job.run))
