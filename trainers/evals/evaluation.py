"""The door of evaluations: what is measured on a trained cell beside the nmse of its training.

An evaluation is a file of this folder, or of a room in it, that defines `needs` and `measure` at its top level: see
README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from saescale.storage.errors import SaescaleError
from saescale.storage.registry import Room

if TYPE_CHECKING:
    from saescale.scaling.metrics import Metric
    from saescale.storage.source import Source
    from saescale.trainers.exchange.trained import Trained
    from saescale.trainers.subjects.subject import Subject

EVALUATIONS = Room("saescale.trainers.evals", "evaluation", marker="measure")

Need = Literal["subject", "labels", "text"]
Kind = TypeVar("Kind")


class Unsuited(SaescaleError):
    """An evaluation is not for subjects, or SAEs, of this kind: there is nothing to mend, and it is said without being
    a failure where anything else is measured."""


class Measurement(NamedTuple):
    """One row of evals.parquet, less what says of which cell and evaluation it is."""

    metric: str
    value: float
    low: float | None = None  # 95 % interval
    high: float | None = None
    at: str = ""  # what of: a latent, a label, a position; empty for the whole cell
    n: int = 0  # samples behind it
    seed: int | None = None  # where something was drawn


class LeftOut(NamedTuple):
    """In place of measurements that cannot be had, where the rest can: a row of evals.parquet that has no value."""

    metric: str  # or what the names of several begin with
    left_out: str  # why


class Evaluation(Protocol):
    """What the file of an evaluation defines.

    `needs` says what it cannot do without: the "subject", one with "labels", one that reads "text". Without any of them
    `measure` gets None for the subject.

    It may define besides:

    `prepare(source, subject) -> Any`: what all cells share, such as forward passes of the subject as it is. That is
    made once in a process, and `measure` gets it as a fourth argument.
    `latents`: how many latents of a cell it looks at where nobody asks for another number, which `measure` gets as a
    keyword of that name; sample.py says which ones.
    `partners(cell, cells) -> ids`: other finished cells that a cell is compared with, from the rows of results.parquet;
    `measure` gets them as a keyword `others`, a list of Trained. A cell without any is left out.
    `metrics`, a Mapping[str, Metric] (scaling/metrics.py): which of its metrics of whole cells are better low or high,
    which lie in [0, 1], and what they would be of an SAE that loses nothing, for laws, plans and reports.
    """

    needs: frozenset[Need]

    def measure(
        self, trained: Trained, source: Source, subject: Subject | None, *prepared: Any, **asked: Any
    ) -> Iterable[Measurement | LeftOut]:
        """On the held-out rows of `source`; `trained` lies on this machine's device. Raises SaescaleError for what it
        cannot be measured on, Unsuited where that is for the kind of subject or SAE. What others have and this cell has
        not is left out by name, so that nobody wonders where it is."""


def require_kind(subject: Subject | None, kind: type[Kind], what: str) -> Kind:
    """The subject. Raises Unsuited where it is of another kind: `what` says what is measured of which."""
    if not isinstance(subject, kind):
        raise Unsuited(f"{what}; {'there is none' if subject is None else f'{subject.name} has none'}")
    return subject


def find_evaluation(name: str) -> Evaluation:
    """The evaluation of that name. Raises SaescaleError with the nearest name for an unknown one."""
    return EVALUATIONS.load(name)


def metrics_of(evaluation: Evaluation) -> Mapping[str, Metric]:
    """What an evaluation declares of its metrics; nothing where it declares none."""
    found: Mapping[str, Metric] = getattr(evaluation, "metrics", {})
    return found
