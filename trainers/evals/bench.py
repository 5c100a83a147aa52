"""What the evaluations of one run share in a process: stores, the subject, what they prepare, the cell at hand."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saescale.scaling.metrics import document
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.files import join
from saescale.storage.live import open_source
from saescale.storage.manifest import Manifest
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.own import digests, not_here, own_files, require_same
from saescale.trainers.device import default_device
from saescale.trainers.evals.evaluation import Evaluation, Unsuited, find_evaluation, metrics_of
from saescale.trainers.evals.plan import Pair, finished_cells
from saescale.trainers.exchange.native import read
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import ReadsText, Subject, get_subject


class Measured(NamedTuple):
    """What became of one evaluation of one cell: rows of evals.parquet, or why there are none."""

    pair: Pair
    rows: list[dict[str, Any]]
    error: str | None
    seconds: float  # of this cell alone
    shared_s: float  # of what all cells share, where it was made for this one
    unsuited: bool = False  # it is not for this kind of subject or SAE
    metrics: Mapping[str, Any] = {}  # what the evaluation declares of its metrics, as evals.parquet keeps it


class AtHand(NamedTuple):
    """What an evaluation of a cell takes."""

    evaluation: Evaluation
    trained: Trained
    source: ActivationStore
    subject: Subject | None


class Bench:
    """Measures in this process. Each store is opened, each subject loaded and each evaluation prepared when it is first
    needed, on the device of this machine and in the arithmetic of the harvest; one subject at a time.

    `cache`: folder for downloads; with `trust_remote_code` Python code that comes with a subject is run; `device_map`
    spreads a subject over devices (subjects/spread.py; default: as it was for a live source of the run). Raises
    SaescaleError where none of the run's stores can be opened, or an architecture of the user's is not that of the run.
    """

    def __init__(
        self,
        run: RunDirectory,
        cache: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | None = None,
    ) -> None:
        self._run, self._cache, self._trusted, self._device_map = run, cache, trust_remote_code, device_map
        self._device_maps: dict[str, str] = {}  # of the harvests of live sources, by their identities
        document = run.read_spec() or {}
        recorded = document.get("resolved", {}).get("architectures", {})
        own = own_files(name for name in recorded if name in ARCHITECTURES.names())
        require_same(recorded, digests(own), run.url)
        self._without: dict[str, str] = {}  # cells whose architecture is a file of the user's that is not here
        if absent := [name for name in recorded if name not in ARCHITECTURES.names()]:
            cells = ((row["cell_id"], row["architecture"]) for row in run.read_results().to_pylist())
            self._without = {cell: name for cell, name in cells if name in absent}
        self._broken: list[str] = []  # why others could not be opened
        self._sources = self._opened(document)
        self._subject: tuple[Manifest, Subject | SaescaleError] | None = None
        self._prepared: dict[tuple[str, str], Any] = {}  # or the error, by evaluation and store
        self._trained: tuple[str, Trained] | None = None
        self._shared_s = 0.0

    def _opened(self, document: dict[str, Any]) -> dict[str, ActivationStore]:
        """The run's stores by their fingerprints."""
        found = {}
        for source in recorded_sources(document):
            try:
                store = open_source(source.url)
                found[store.identity] = store
                if (device_map := self._device_map or source.device_map) is not None:
                    self._device_maps[store.identity] = device_map
            except SaescaleError as error:  # those of the others can be measured
                self._broken.append(str(error))
        if not found:
            nothing = f"{join(self._run.url, 'sweep.yaml')} names no store"
            raise SaescaleError("; ".join(self._broken) or nothing)
        return found

    @property
    def spread(self) -> bool:
        """Whether a subject may lie on several devices."""
        return bool(self._device_maps)

    def in_order(self, missing: Sequence[Pair]) -> list[Pair]:
        """By the subjects of the cells' stores, of which one at a time is loaded."""
        stores = {cell: row["store"] for cell, row in finished_cells(self._run).items()}
        subjects = [source.subject for source in self._sources.values()]

        def place(pair: Pair) -> int:
            source = self._sources.get(stores.get(pair.cell) or "")
            return subjects.index(source.subject) if source else len(subjects)

        return sorted(missing, key=place)

    def measure(self, pair: Pair) -> Measured:
        """Whatever goes wrong is told as its error: a mistake in one, maybe the user's own, must not end the others."""
        began, self._shared_s = time.monotonic(), 0.0
        rows: list[dict[str, Any]] = []
        metrics: Mapping[str, Any] = {}
        error, unsuited = None, False
        try:
            rows = self._rows(pair)
            metrics = document(pair.evaluation, metrics_of(find_evaluation(pair.evaluation)))
        except SaescaleError as problem:
            error, unsuited = str(problem), isinstance(problem, Unsuited)
        except Exception as problem:
            error = f"{type(problem).__name__}: {one_line(problem)}"
        seconds = time.monotonic() - began
        return Measured(pair, rows, error, seconds - self._shared_s, self._shared_s, unsuited, metrics)

    def lay_out(self, cell: str, name: str) -> AtHand:
        """What the evaluation of that name takes of a cell. Raises SaescaleError where any of it cannot be had."""
        evaluation, trained = find_evaluation(name), self._cell(cell)
        source = self._sources.get(trained.cell.store)
        if source is None:
            there = [f"{store.url} is now {identity}" for identity, store in self._sources.items()]
            raise SaescaleError(
                f"it was trained on the store {trained.cell.store}, and {'; '.join([*there, *self._broken])}; give "
                "sweep.yaml the store that it was trained on"
            )
        subject = self._subject_for(source, evaluation) if evaluation.needs else None
        return AtHand(evaluation, trained, source, subject)

    def _rows(self, pair: Pair) -> list[dict[str, Any]]:
        self._cell(pair.cell)  # whose reading is no part of what cells share
        began = time.monotonic()
        try:
            at_hand = self.lay_out(pair.cell, pair.evaluation)
            prepared = self._prepare(pair.evaluation, at_hand)
        finally:
            self._shared_s = time.monotonic() - began
        evaluation = at_hand.evaluation
        asked: dict[str, Any] = {}
        kept: dict[str, Any] = {}  # of what was asked, in each row
        if hasattr(evaluation, "latents"):
            kept["latents"] = asked["latents"] = pair.latents or evaluation.latents
        if pair.others:
            asked["others"] = [self._read(other) for other in pair.others]
            kept["others"] = " ".join(pair.others)
        found = evaluation.measure(at_hand.trained, at_hand.source, at_hand.subject, *prepared, **asked)
        rows = [measurement._asdict() | kept for measurement in found]
        if not rows:
            raise SaescaleError("it measured nothing")
        return rows

    def _prepare(self, name: str, at_hand: AtHand) -> list[Any]:
        """What the evaluation's `prepare` gives, where it has one."""
        evaluation, _, source, subject = at_hand
        if not hasattr(evaluation, "prepare"):
            return []
        key = (name, source.identity)
        if key not in self._prepared:
            try:
                self._prepared[key] = evaluation.prepare(source, subject)
            except SaescaleError as error:  # it would be the same for every other cell
                self._prepared[key] = error
        if isinstance(self._prepared[key], SaescaleError):
            raise self._prepared[key]
        return [self._prepared[key]]

    def _subject_for(self, source: ActivationStore, evaluation: Evaluation) -> Subject:
        """The subject of the source, with what the evaluation needs."""
        manifest = source.manifest
        if self._subject is None or not _same_subject(self._subject[0], manifest):
            self._subject, self._prepared = None, {}  # before another one takes memory
            self._subject = manifest, self._loaded(manifest, self._device_maps.get(source.identity))
        subject = self._subject[1]
        if isinstance(subject, SaescaleError):
            raise subject
        if "labels" in evaluation.needs and not subject.labels:
            raise Unsuited(f"the subject {subject.name} has no labels")
        if "text" in evaluation.needs and not isinstance(subject, ReadsText):
            raise Unsuited(f"the subject {subject.name} reads no text")
        return subject

    def _loaded(self, manifest: Manifest, device_map: str | None) -> Subject | SaescaleError:
        """The subject, or why there is none: it is not tried again for every cell."""
        try:
            subject = get_subject(
                manifest.subject, self._cache, _computed_in(manifest), None, self._trusted, device_map
            )
        except SaescaleError as error:
            return error
        if subject.fingerprint != manifest.fingerprint:
            return SaescaleError(
                f"the subject {subject.name} has other weights ({subject.fingerprint}) than those that were "
                f"harvested ({manifest.fingerprint}); give this machine the same ones"
            )
        return subject

    def _cell(self, cell: str) -> Trained:
        if name := self._without.get(cell):  # in the same words for all of them, which are one line then
            raise not_here(self._run.url, name)
        if self._trained is None or self._trained[0] != cell:
            self._trained = cell, self._read(cell)
        return self._trained[1]

    def _read(self, cell: str) -> Trained:
        found = read(self._run.cell_url(cell))
        params = {name: tensor.to(default_device()) for name, tensor in found.sae.params.items()}
        return found._replace(sae=found.sae.like(params))


def _computed_in(manifest: Manifest) -> str:
    """The arithmetic of the harvest."""
    return str(manifest.created_with.get("computed_in", "auto"))


def _same_subject(first: Manifest, second: Manifest) -> bool:
    return (first.subject, first.fingerprint, _computed_in(first)) == (
        second.subject, second.fingerprint, _computed_in(second),
    )  # fmt: skip
