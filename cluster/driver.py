"""Runs a sweep from its spec to its report: plans packs, hands them to the pool, keeps the ledger, fits the laws."""

import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cluster.ledger import Ledger, open_ledger, provenance_of, recorded_precision
from cluster.plan import cost, plan_packs
from cluster.spec import SweepSpec
from scaling.report import analyse
from storage.activations import ActivationStore
from storage.errors import SaescaleError, SaescaleWarning
from storage.files import exists, join, list_names
from storage.rundir import RunDirectory
from trainers.cell import Cell
from trainers.evaluate import check_eval_tokens
from trainers.train import PackJob, PackOutcome, wandb_directory
from trainers.wandb_logger import how_to_read, log_summary, resolve_mode

if TYPE_CHECKING:
    from cluster.pool import WorkerState

FULL_VERIFY_BYTES = 8 * 2**30  # stores up to this size are read whole before training starts
MAX_ATTEMPTS = 4  # of a pack that dies again and again without reaching a further checkpoint
POLL_S = 0.5
REPORT = "report.html"
STOP_TIMEOUT_S = 30.0


class SweepProgress(NamedTuple):
    """Where a sweep stands, for whoever shows it."""

    cells: int
    done: int
    failed: int
    fraction: float  # of the FLOPs of the cells that this call has to train
    tokens_per_s: float  # SAE training tokens: stream tokens times the cells that each trains, over all workers
    workers: int


class Display(Protocol):
    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def sweep(self, progress: SweepProgress) -> None: ...


class SweepOutcome(NamedTuple):
    run: RunDirectory
    fits: dict[str, Any]
    cells: int
    failed: int
    trained: int  # cells that this call trained; 0 where all were done before
    wandb: str | None  # how to read what was logged


def run_sweep(spec: SweepSpec, display: Display, address: str | None = None, bootstraps: int = 1000) -> SweepOutcome:
    """Trains every cell of `spec` that has no result yet, fits the laws and writes the report.

    It can be killed at any moment and called again. Raises SaescaleError on a store or run directory that cannot be
    used, and KeyboardInterrupt after the workers have saved their checkpoints.
    """
    store, run = ActivationStore.open(spec.store), RunDirectory(spec.out)
    precision = recorded_precision(run)
    ledger = open_ledger(run, spec, store, precision) if precision else None
    trained = 0
    if ledger is None or ledger.pending:
        verify(store, spec.eval.tokens, display)
        display.stage("starting the workers")
        from cluster.pool import Pool

        resources = spec.resources
        with Pool(spec.grid.size, resources.workers, resources.gpus_per_worker, address) as pool:
            ledger = ledger or open_ledger(run, spec, store, precision or pool.precision)
            trained = len(ledger.pending)
            ledger.write()
            _Sweep(spec, ledger, pool, display).run()
    fits = _analyse(spec, ledger, display, bootstraps)
    failed = sum(result["status"] == "failed" for result in ledger.results.values())
    mode = resolve_mode(spec.wandb)
    wandb = how_to_read(mode, wandb_directory(run.url), spec.wandb, spec.name) if mode != "off" else None
    return SweepOutcome(run, fits, len(ledger.cells), failed, trained, wandb)


def verify(store: ActivationStore, eval_tokens: int, display: Display) -> None:
    """Before any training time is spent: every shard's size and schema, and all its bytes where that is soon done."""
    check_eval_tokens(store, eval_tokens)
    total = sum(shard.bytes for shard in store.manifest.shards)
    display.stage("checking the activation store")
    store.verify(full=total <= FULL_VERIFY_BYTES)


class _Pack(NamedTuple):
    cells: list[Cell]
    attempt: int  # since the pack last got further
    reached: int  # sum of the checkpointed steps of its cells when the attempt began


class _Running(NamedTuple):
    worker: Any
    pack: _Pack


class _Sweep:
    """The packs of one call: those that wait, those that a worker trains, and what becomes of them."""

    def __init__(self, spec: SweepSpec, ledger: Ledger, pool: Any, display: Display) -> None:
        self.spec, self.ledger, self.pool, self.display = spec, ledger, pool, display
        steps = ledger.checkpoint_steps()
        packs = plan_packs(ledger.pending, steps, len(pool.workers), pool.memory, pool.dense)
        self.waiting = deque(_Pack(cells, 1, ledger.steps_reached(cells)) for cells in packs)
        self.running: dict[Any, _Running] = {}
        self.total = sum(cost(cell) for cell in ledger.pending)
        # What is behind the checkpoints is done, but not by this call.
        self.before = sum(cost(cell) * steps.get(cell.cell_id, 0) / cell.steps for cell in ledger.pending)
        self.warned: set[str] = set()
        self.asked = {cell.cell_id: cell for cell in ledger.pending}

    def run(self) -> None:
        import ray

        self.display.stage(f"training {len(self.ledger.pending)} cells in {len(self.waiting)} packs")
        idle = list(self.pool.workers)
        try:
            while self.waiting or self.running:
                while self.waiting and idle:
                    self._start(idle.pop(), self.waiting.popleft())
                ready, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_S)
                idle.extend(self._finish(reference) for reference in ready)
                self.display.sweep(self._progress())
        except BaseException:
            # Whatever ends the sweep, what the other workers have done is saved.
            self._stop()
            raise

    def _start(self, worker: Any, pack: _Pack) -> None:
        job = PackJob(
            cells=pack.cells,
            store=self.spec.store,
            run=self.spec.out,
            sweep=self.spec.name,
            eval=self.spec.eval,
            wandb=self.spec.wandb,
            checkpoint_every_s=self.spec.resources.checkpoint_every_s,
            threads=self.pool.threads,
        )
        self.running[worker.train.remote(job)] = _Running(worker, pack)

    def _finish(self, reference: Any) -> Any:
        """Records what a pack gave, or queues it again when its worker died; returns a worker that is free."""
        import ray

        worker, pack = self.running.pop(reference)
        try:
            outcome: PackOutcome = ray.get(reference)
            self.ledger.record(outcome.results)
            return worker
        except ray.exceptions.RayTaskError as error:
            raise error.cause from (None if isinstance(error.cause, SaescaleError) else error)
        except ray.exceptions.RayActorError as error:
            reached = self.ledger.steps_reached(pack.cells)
            attempt = 1 if reached > pack.reached else pack.attempt + 1
            if attempt > MAX_ATTEMPTS:
                names = ", ".join(cell.cell_id for cell in pack.cells)
                raise SaescaleError(
                    f"the worker died {MAX_ATTEMPTS} times training {names}: {' '.join(str(error).split())[:300]}; "
                    "if it ran out of memory use fewer workers (resources.workers), then run the same command again"
                ) from error
            self._warn(f"a worker died; its {len(pack.cells)} cells go on from their checkpoints")
            self.waiting.append(_Pack(pack.cells, attempt, reached))
            return self.pool.start_worker()

    def _progress(self) -> SweepProgress:
        import ray

        references = {running.worker.state.remote(): running for running in self.running.values()}
        ready, _ = ray.wait(list(references), num_returns=len(references), timeout=POLL_S) if references else ([], [])
        done = sum(cost(cell) for cell_id, cell in self.asked.items() if cell_id in self.ledger.results)
        rate, finished, failed = 0.0, 0, 0
        for reference in ready:
            try:
                state: WorkerState = ray.get(reference)
            except ray.exceptions.RayError:
                continue  # the worker just died: its pack's reference will say so
            for note in state.notes:
                self._warn(note)
            progress = state.progress
            if progress is None:
                continue
            cells = references[reference].pack.cells
            done += sum(cost(cell) * min(1.0, progress.step / cell.steps) for cell in cells)
            rate += progress.tokens_per_s * progress.running
            finished += progress.done
            failed += progress.failed
        statuses = [result["status"] for result in self.ledger.results.values()]
        return SweepProgress(
            cells=len(self.ledger.cells),
            done=statuses.count("done") + finished,
            failed=statuses.count("failed") + failed,
            fraction=min(1.0, max(0.0, done - self.before) / max(1.0, self.total - self.before)),
            tokens_per_s=rate,
            workers=len(self.running),
        )

    def _warn(self, text: str) -> None:
        """Shows a warning, the workers' too, once however often it comes."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, SaescaleWarning, stacklevel=3)

    def _stop(self) -> None:
        """Lets the workers save their checkpoints before they are ended."""
        import ray

        for running in self.running.values():
            running.worker.stop.remote()
        self.display.stage("stopping: the workers save their checkpoints")
        ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=STOP_TIMEOUT_S)
        for reference in ready:
            try:
                self.ledger.record(ray.get(reference).results)
            except ray.exceptions.RayError as error:
                self._warn(f"a worker failed while stopping: {' '.join(str(error).split())[:300]}")


def _analyse(spec: SweepSpec, ledger: Ledger, display: Display, bootstraps: int) -> dict[str, Any]:
    """Fits, figures, report and the summary run in W&B; read back where they are there for these results already."""
    run = ledger.run
    recorded = {row["cell_id"]: row["status"] for row in run.read_results().to_pylist()}
    current = {cell_id: result["status"] for cell_id, result in ledger.results.items()}
    fits = run.read_json("fits.json")
    # The report is written last, so where it is there the rest is.
    if recorded == current and fits is not None and exists(join(run.url, REPORT)):
        return fits
    ledger.write()
    display.stage("fitting the laws, drawing the figures, writing the report")
    provenance = provenance_of(run)
    fits = analyse(run, bootstraps=bootstraps, provenance=provenance)
    if resolve_mode(spec.wandb) != "off":
        figures = [join(run.url, "figures", name) for name in list_names(join(run.url, "figures"))]
        log_summary(spec.wandb, spec.name, provenance, fits, run.read_results(), figures, wandb_directory(run.url))
    return fits
