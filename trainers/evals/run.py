"""Evaluations of the finished cells of a run directory, whose rows go into its evals.parquet.

What is there already is not measured again, and each evaluation of each cell is written when it is done: killed at any
moment, the same call goes on from there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.files import join
from saescale.storage.manifest import Manifest
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.own import digests, own_files, require_same
from saescale.trainers.evals.evaluation import EVALUATIONS, Evaluation, find_evaluation
from saescale.trainers.exchange.native import FILE, read
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import ReadsText, Subject, get_subject


class Evaluated(NamedTuple):
    """What a call did, in pairs of cell and evaluation; `failed` says why, a line each."""

    measured: int
    there: int
    failed: tuple[str, ...]


def evaluate_run(
    url: str,
    names: Sequence[str] = (),
    cells: Sequence[str] = (),
    cache: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    trust_remote_code: bool = False,
) -> Evaluated:
    """Measures the named evaluations (all that there are where none is named) on the named cells (all finished ones).

    The source of each cell is the store of sweep.yaml that it was trained on; its subject is loaded once, in the
    arithmetic of the harvest, and only where an evaluation needs it; `cache` is its folder for downloads, and with
    `trust_remote_code` Python code that comes with it is run. `progress(done, total, what)` is called before each and
    at the end. One that fails for a cell is told in `failed`, and the others go on.

    Raises SaescaleError for an unknown evaluation or cell, and where `url` is no run with a finished cell or none of
    its stores can be opened.
    """
    run = RunDirectory(url)
    recorded = (run.read_spec() or {}).get("resolved", {}).get("architectures", {})
    own = own_files(name for name in recorded if name in ARCHITECTURES.names())
    require_same(recorded, digests(own), url)
    evaluations = {name.replace("-", "_"): find_evaluation(name) for name in names or EVALUATIONS.names()}
    if not evaluations:
        raise SaescaleError("there is no evaluation; see trainers/evals/README.md for how to add one")
    found = _cells(run, cells)
    table = run.read_evals()
    there = set(zip(table["cell_id"].to_pylist(), table["evaluation"].to_pylist(), strict=True))
    missing = [(cell, name) for cell in found for name in evaluations if (cell, name) not in there]
    kept = len(found) * len(evaluations) - len(missing)
    if not missing:
        return Evaluated(0, kept, ())
    bench = _Bench(run, cache, trust_remote_code)
    missing = bench.in_order(missing)
    failed = []
    for done, (cell, name) in enumerate(missing):
        if progress is not None:
            progress(done, len(missing), f"{name} of {cell}")
        try:
            run.write_evals(cell, name, bench.rows(cell, evaluations[name]))
        except SaescaleError as error:
            failed.append(f"{name} of {cell}: {error}")
        except Exception as error:  # a mistake in one evaluation, maybe of the user's own, must not end the others
            failed.append(f"{name} of {cell}: {type(error).__name__}: {one_line(error)}")
    if progress is not None:
        progress(len(missing), len(missing), "")
    return Evaluated(len(missing) - len(failed), kept, tuple(failed))


def _cells(run: RunDirectory, wanted: Sequence[str]) -> list[str]:
    """Ids of the finished cells, in the order of the alphabet."""
    files = run.cell_files()
    finished = sorted(cell for cell, names in files.items() if {"result.json", FILE} <= names)
    if unknown := [cell for cell in wanted if cell not in finished]:
        raise SaescaleError(
            f"{run.url}: there is no finished cell {unknown[0]}; there are {', '.join(finished) or 'none'}"
        )
    if not finished:
        raise SaescaleError(f"{run.url} is no run directory with a finished cell; run saescale sweep first")
    return list(wanted) or finished


class _Bench:
    """What evaluations of one run share, each of it loaded when it is first needed."""

    def __init__(self, run: RunDirectory, cache: str | None, trust_remote_code: bool) -> None:
        self._run, self._cache, self._trusted = run, cache, trust_remote_code
        self._sources: dict[str, ActivationStore] | None = None
        self._broken: list[str] = []  # why others could not be opened
        self._subject: tuple[Manifest, Subject] | None = None
        self._trained: tuple[str, Trained] | None = None

    def in_order(self, missing: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Pairs of cell and evaluation by the subjects of their stores, of which one at a time is loaded."""
        stores = {row["cell_id"]: row["store"] for row in self._run.read_results().to_pylist()}
        subjects = [source.subject for source in self.sources().values()]

        def place(pair: tuple[str, str]) -> int:
            source = self.sources().get(stores.get(pair[0]) or "")
            return subjects.index(source.subject) if source else len(subjects)

        return sorted(missing, key=place)

    def rows(self, cell: str, evaluation: Evaluation) -> list[dict[str, Any]]:
        """Rows of evals.parquet. Raises SaescaleError where there is none."""
        trained = self._cell(cell)
        source = self.sources().get(trained.cell.store)
        if source is None:
            there = "; ".join(
                [*(f"{store.url} is now {identity}" for identity, store in self.sources().items()), *self._broken]
            )
            raise SaescaleError(
                f"it was trained on the store {trained.cell.store}, and {there}; give sweep.yaml the store that it was "
                "trained on"
            )
        subject = self.subject(source, evaluation) if evaluation.needs else None
        rows = [measurement._asdict() for measurement in evaluation.measure(trained, source, subject)]
        if not rows:
            raise SaescaleError("it measured nothing")
        return rows

    def sources(self) -> dict[str, ActivationStore]:
        """The run's stores by their fingerprints. Raises SaescaleError where none can be opened."""
        if self._sources is None:
            recorded, found = recorded_sources(self._run.read_spec() or {}), {}
            for source in recorded:
                try:
                    store = ActivationStore.open(source.url)
                    found[store.identity] = store
                except SaescaleError as error:  # those of the others can be measured
                    self._broken.append(str(error))
            if not found:
                nothing = f"{join(self._run.url, 'sweep.yaml')} names no store"
                raise SaescaleError("; ".join(self._broken) or nothing)
            self._sources = found
        return self._sources

    def subject(self, source: ActivationStore, evaluation: Evaluation) -> Subject:
        """The subject of the source, with what the evaluation needs."""
        manifest = source.manifest
        if self._subject is None or not _same_subject(self._subject[0], manifest):
            self._subject = None  # before another one takes memory
            subject = get_subject(manifest.subject, self._cache, _computed_in(manifest), None, self._trusted)
            if subject.fingerprint != manifest.fingerprint:
                raise SaescaleError(
                    f"the subject {subject.name} has other weights ({subject.fingerprint}) than those that were "
                    f"harvested ({manifest.fingerprint}); give this machine the same ones"
                )
            self._subject = manifest, subject
        subject = self._subject[1]
        if "labels" in evaluation.needs and not subject.labels:
            raise SaescaleError(f"the subject {subject.name} has no labels")
        if "text" in evaluation.needs and not isinstance(subject, ReadsText):
            raise SaescaleError(f"the subject {subject.name} reads no text")
        return subject

    def _cell(self, cell: str) -> Trained:
        if self._trained is None or self._trained[0] != cell:
            self._trained = cell, read(self._run.cell_url(cell))
        return self._trained[1]


def _computed_in(manifest: Manifest) -> str:
    """The arithmetic of the harvest."""
    return str(manifest.created_with.get("computed_in", "auto"))


def _same_subject(first: Manifest, second: Manifest) -> bool:
    return (first.subject, first.fingerprint, _computed_in(first)) == (
        second.subject, second.fingerprint, _computed_in(second),
    )  # fmt: skip
