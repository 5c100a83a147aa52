"""The ledger: what each cell of a sweep has reached. The truth is in the run directory, this is its bookkeeping."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.compute as pc

from saescale.cluster.sweep.identity import document_of, taken_up
from saescale.cluster.sweep.spec import SweepSpec
from saescale.scaling.compute import Flops
from saescale.storage import checkpoint
from saescale.storage.columns import CURVES, CurveRow
from saescale.storage.errors import Damaged, SaescaleError, SaescaleWarning, Unavailable
from saescale.storage.files import local_path, remove
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.own import own_files
from saescale.trainers.cell import Cell
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.exchange import native
from saescale.trainers.precision import Precision
from saescale.trainers.training.results import Provenance, result_row

T = TypeVar("T")
_ASKED_AT_A_TIME = 16
_READ_FROM_A_STORE = 500  # results, which is a few seconds


class Ledger:
    """Results of finished cells, kept in results.parquet and curves.parquet.

    A cell is finished when its own result.json exists, which its worker writes last, so a driver that dies
    between the two loses nothing: opening the ledger again reads what the cells say.
    """

    def __init__(
        self,
        run: RunDirectory,
        cells: Sequence[Cell],
        stores: Sequence[ActivationStore],
        document: Mapping[str, Any],
        recorded: Mapping[str, Any] | None,
        architectures: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.cells = run, list(cells)
        self.stores = {store.fingerprint: store for store in stores}  # as cells name them
        self.architectures = dict(architectures or {})  # the text of those of the user's own, by their names
        self.document = dict(document)  # what sweep.yaml is to say
        self._recorded = recorded  # what it says
        self.results: dict[str, dict[str, Any]] = {}
        self._written = -math.inf  # when the tables were
        self._writing_s = 0.0  # how long that took
        self._forgotten: list[str] = []  # failed and lost cells whose results go when the sweep begins
        self._without_curve: set[str] = set()
        self._made_again: dict[str, dict[str, Any]] = {}  # results whose own file is damaged
        rows = run.read_results().to_pylist()
        self._known = {row["cell_id"]: row for row in rows if row["status"] in ("done", "failed")}  # by the table
        finished = run.cells_with_results()
        there = [cell for cell in cells if cell.cell_id in finished]
        # The results of thousands of cells in an object store are minutes: what the table says of them is taken.
        cheap = local_path(run.url) is not None or len(there) <= _READ_FROM_A_STORE
        asked = [cell for cell in there if cheap or cell.cell_id not in self._known]
        found = self._known | {
            cell.cell_id: row for cell, row in zip(asked, self._of_each(asked, self._result_of), strict=True)
        }
        for cell in there:
            if (result := found[cell.cell_id]) is not None:
                self.results[cell.cell_id] = result

    def _result_of(self, cell: Cell) -> dict[str, Any] | None:
        """What the table says of the cell, or its own file; where that is damaged it is made again from the table, or
        else from weights and curve. None: the cell is to be trained."""
        known = self._known.get(cell.cell_id)
        try:
            own = self.run.read_cell_result(cell.cell_id)
            return known or own
        except Damaged as error:
            try:
                made = known or self._from_files(cell)
            except SaescaleError as missing:
                self._forgotten.append(cell.cell_id)
                text = f"{error.where} is damaged, and {missing}: the cell's training is lost, and it is trained again"
                warnings.warn(text, SaescaleWarning, stacklevel=3)
                return None
            self._made_again[cell.cell_id] = made
            source = "results.parquet" if known else "the cell's weights and curve, but for its times"
            warnings.warn(f"{error.where} is damaged: it is made again from {source}", SaescaleWarning, stacklevel=3)
            return made

    def _from_files(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell whose result.json is damaged. Raises SaescaleError where its weights are not there, not
        sound or another cell's, or where its curve does not reach its end."""
        trained = native.read(self.run.cell_url(cell.cell_id))
        there = trained.cell
        points = [row for row in self.run.read_cell_curve(cell.cell_id) if row["step"] == cell.steps]
        if there.cell_id != cell.cell_id or not points:
            raise SaescaleError(f"what else is in {self.run.cell_url(cell.cell_id)} is not of its end")
        last = CurveRow(**{name: points[-1][name] for name in CurveRow._fields})
        # The dense equivalent is that of a plan: what AuxK did is counted in the lost file alone.
        flops = Flops(int(last.flops), cell.flops(cell.tokens).dense)
        levels = None
        if trained.sae.settings.levels():  # which no other file has: they are measured again
            held_out = HeldOut(self.stores[cell.store], self.document["eval"]["tokens"])
            levels = held_out.levels(trained.sae, trained.origin, trained.sae.precision == "bf16")
        row = result_row(
            cell, self._provenance(cell), cell.tokens, flops, wall_s=0.0, last=last, error=None, levels=levels
        )
        return row | {"wall_s": None}

    def _provenance(self, cell: Cell) -> Provenance:
        return Provenance.of(self.stores[cell.store], self.document["eval"]["tokens"])

    def begin(self) -> None:
        """Writes sweep.yaml and the ledger: from now on `run` is this sweep's, with all its cells."""
        for cell_id in self._forgotten:
            remove(self.run.result_url(cell_id))
        self._restore()
        self.write_spec()
        self.write()

    def _restore(self) -> None:
        for cell_id, result in self._made_again.items():
            self.run.write_json(f"cells/{cell_id}/result.json", result)
        self._made_again = {}

    def write_spec(self) -> None:
        """Writes sweep.yaml where it is not there yet or lacks cells of an extension."""
        if self._recorded != self.document:
            for name, text in self.architectures.items():
                self.run.write_architecture(name, text)
            self.run.write_spec(self.document)
            self._recorded = self.document

    def settle(self) -> None:
        """Makes the tables say what the cells say, where a driver died before it could or has not taken the time."""
        self._restore()
        if not self.run.has_tables():
            self.write()
        recorded = {row["cell_id"]: (row["status"], row["nmse"]) for row in self.run.read_results().to_pylist()}
        curves = set(pc.unique(self.run.read_curves()["cell_id"]).to_pylist())
        if (
            recorded != {cell_id: (row["status"], row["nmse"]) for cell_id, row in self.results.items()}
            or {cell_id for cell_id, row in self.results.items() if row["status"] == "done"} - curves
        ):
            self.remove_leftovers(self.cells)
            self.write()

    def remove_leftovers(self, cells: Iterable[Cell]) -> None:
        """Removes the checkpoints of cells that have their result: a worker killed between the two leaves them."""
        there = self.run.cell_files()
        for cell in cells:
            names = there.get(cell.cell_id, set())
            if "result.json" in names and any(name.startswith(("checkpoint/", "curve-", "sae-")) for name in names):
                try:
                    result = self.run.read_cell_result(cell.cell_id) or {}
                except Damaged:  # what the table says of it is sound
                    result = self._made_again[cell.cell_id] = self.results[cell.cell_id]
                    self._restore()
                self.run.tidy_cell(cell.cell_id, result)

    def forget_failed(self) -> None:
        """Failed cells are pending again, and go on from their last checkpoint where one is left.

        What is written of them goes with `begin`, when this driver has the run.
        """
        failed = [cell_id for cell_id, result in self.results.items() if result["status"] == "failed"]
        self._forgotten += failed
        for cell_id in failed:
            del self.results[cell_id]
            self._made_again.pop(cell_id, None)

    @property
    def pending(self) -> list[Cell]:
        """Cells without a result."""
        return [cell for cell in self.cells if cell.cell_id not in self.results]

    def checkpoint_steps(self) -> dict[str, list[int]]:
        """The checkpointed steps of each pending cell, newest first; cells without one are absent."""
        there = self.run.cell_files()
        begun = [c.cell_id for c in self.pending if checkpoint.has_any(there.get(c.cell_id, ()))]
        steps = {cell_id: checkpoint.steps(self.run.checkpoint_url(cell_id)) for cell_id in begun}
        return {cell_id: found for cell_id, found in steps.items() if found}

    def steps_reached(self, cells: Iterable[Cell]) -> int:
        """Steps of `cells` that no kill can undo: the newest checkpoint's, or all of a cell that has its result."""

        def reached(cell: Cell) -> int:
            if cell.cell_id in self.results:
                return cell.steps
            return max(checkpoint.steps(self.run.checkpoint_url(cell.cell_id)), default=0)

        return sum(self._of_each(cells, reached))

    def record(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Takes up results of cells, and writes the tables unless that was just done.

        Writing them takes the longer the more cells there are, so it is done for at most a twentieth of the time, and
        not while the run directory does not answer: what is not in a table yet is in its cell's result.json.
        """
        self.results |= {result["cell_id"]: dict(result) for result in results}
        if time.monotonic() - self._written > max(2.0, 20 * self._writing_s):
            try:
                self.write()
            except Unavailable as error:
                self._written = time.monotonic()
                warnings.warn(f"the ledger is written later: {error}", SaescaleWarning, stacklevel=2)

    def take_up(self, cells: Iterable[Cell]) -> None:
        """Records those of `cells` that finished before the worker that trained them died."""
        unknown = [cell for cell in cells if cell.cell_id not in self.results]
        found = self._of_each(unknown, lambda cell: self.run.read_cell_result(cell.cell_id))
        if results := [row for row in found if row is not None]:
            for result in results:
                self.run.tidy_cell(result["cell_id"], result)
            self.record(results)

    def _of_each(self, cells: Iterable[Cell], ask: Callable[[Cell], T]) -> list[T]:
        """What the run directory says of each, asked at a time: an answer of an object store takes a while."""
        with ThreadPoolExecutor(_ASKED_AT_A_TIME) as pool:
            return list(pool.map(ask, cells))

    def fail(self, cell: Cell, why: str) -> None:
        """Marks a cell as failed that no worker could finish. Its last checkpoint stays, for another try."""
        steps = checkpoint.steps(self.run.checkpoint_url(cell.cell_id))
        tokens = cell.batch_tokens * max(steps, default=0)
        row = result_row(cell, self._provenance(cell), tokens, cell.flops(tokens), wall_s=0.0, last=None, error=why)
        # Whoever still trains it somewhere loses it here, unless it has just ended.
        done = self.run.take_cell(cell.cell_id)
        if done is None:
            self.run.write_cell_result(cell.cell_id, row, keep=True)
        self.record([done or row])

    def _described(self, cell: Cell) -> dict[str, Any]:
        """What is known of a cell before it has a result."""
        provenance = self._provenance(cell)
        known = {name: getattr(cell, name) for name in ("store", "n_latents", "k", "architecture", "d_model", "seed")}
        return known | {"subject": provenance.subject, "site": provenance.site}

    def write(self) -> None:
        """results.parquet with one row for every cell of the sweep, and the curves of the finished ones."""
        began = time.monotonic()
        rows = [self.results.get(cell.cell_id, {"cell_id": cell.cell_id, "status": "pending"}) for cell in self.cells]
        described = [self._described(cell) | row for cell, row in zip(self.cells, rows, strict=True)]
        # Those that are there are kept as they are: read cell by cell, they would be read again for every cell.
        there = self.run.read_curves().filter(pc.is_in(pc.field("cell_id"), pa.array(list(self.results), pa.string())))
        missing = self.results.keys() - set(pc.unique(there["cell_id"]).to_pylist()) - self._without_curve
        new = []
        for cell_id in [cell_id for cell_id in self.results if cell_id in missing]:
            curve = self.run.read_cell_curve(cell_id)
            new += curve
            if not curve:  # it failed before its first evaluation
                self._without_curve.add(cell_id)
        self.run.write_curves(pa.concat_tables([there, pa.Table.from_pylist(new, CURVES)]))
        self.run.write_results(described)
        self._written = time.monotonic()
        self._writing_s = self._written - began


def recorded_precision(recorded: Mapping[str, Any] | None) -> Precision | None:
    """What `precision: auto` was when the sweep of a sweep.yaml began: it goes on with that wherever it is resumed."""
    found = (recorded or {}).get("resolved", {}).get("precision")
    return found if found in get_args(Precision) else None


def open_ledger(
    run: RunDirectory,
    recorded: Mapping[str, Any] | None,
    spec: SweepSpec,
    stores: Sequence[ActivationStore],
    precision: Precision,
    extending: bool = False,
) -> Ledger:
    """Picks up the sweep in `run`, or gives the ledger of a new one, of which nothing is written before `begin`.

    `recorded`: the sweep.yaml of `run`, if there is one. `stores`: those of `spec`, opened. `extending`: `spec` may
    have cells and stores besides those of `run`. Raises SaescaleError where `run` holds another sweep.
    """
    own = own_files(spec.grid.architectures)
    document = document_of(spec, stores, precision, own)
    if recorded is not None:
        document = taken_up(run, recorded, spec, document, extending)
    cells = [cell for store in stores for cell in spec.cells(store, precision)]
    return Ledger(run, cells, stores, document, recorded, own)
