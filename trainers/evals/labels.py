"""The ground truth of the rows of a store, recomputed from what the subject read; a store holds none."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import Subject

POSITIONS = 4_096  # that are labelled at a time: a label may be thousands of numbers


def heldout_labels(source: Source, subject: Subject, rows: int | None = None) -> dict[str, np.ndarray]:
    """Every label of the subject at the first `rows` held-out rows (None: all): {name: [rows, ...]}.

    Raises SaescaleError where the subject has none, or rows of the source do not lead back to its contexts.
    """
    parts = list(heldout_label_parts(source, subject, rows))
    order = np.argsort(np.concatenate([here for here, _ in parts]))
    return {name: np.concatenate([labels[name] for _, labels in parts])[order] for name in parts[0][1]}


class Halves(NamedTuple):
    """Rows of a store: activations [rows, d_model] as stored, the document of each, labels. Something is chosen or
    fitted on the rows of `first`, bool [rows], and measured on the others, which are of other documents."""

    act: Tensor
    doc: np.ndarray
    labels: dict[str, np.ndarray]
    first: np.ndarray

    def those(self, which: np.ndarray) -> "Halves":
        """Some of them, by their numbers."""
        labels = {name: values[which] for name, values in self.labels.items()}
        return Halves(self.act[torch.from_numpy(which)], self.doc[which], labels, self.first[which])


def heldout_halves(source: Source, subject: Subject, most: int) -> Halves:
    """The first `most` held-out rows, or all where there are fewer. Raises SaescaleError as `heldout_labels` does."""
    number = min(most, source.rows("heldout")) if isinstance(source, ActivationStore) else most
    rows = source.heldout(number, ("act", "doc"))
    # Documents of such subjects have no order: every other one.
    first = np.searchsorted(np.unique(rows.doc), rows.doc) % 2 == 0
    return Halves(to_tensor(rows.act, source.dtype), rows.doc, heldout_labels(source, subject, number), first)


def heldout_label_parts(
    source: Source, subject: Subject, rows: int | None = None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The same some rows at a time, in any order: their numbers [some], and their labels {name: [some, ...]}."""
    if not isinstance(source, ActivationStore):
        raise SaescaleError(f"labels are recomputed for activation stores, not for {type(source).__name__}")
    if not subject.labels:
        raise SaescaleError(f"the subject {subject.name} has no labels")
    places = heldout_places(source, subject, rows)
    lengths = np.array([len(ids) for ids in places.contexts])
    order = np.argsort(places.context, kind="stable")
    ends = np.cumsum(np.bincount(places.context, minlength=len(lengths)))
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)  # numbers of contexts
        for some in np.split(alike, range(step := max(1, POSITIONS // length), len(alike), step)):
            here = np.concatenate([order[ends[each - 1] if each else 0 : ends[each]] for each in some])
            labels = subject.label(np.stack([places.contexts[each] for each in some]))
            context, pos = np.searchsorted(some, places.context[here]), places.pos[here]
            yield here, {name: values[context, pos] for name, values in labels.items()}
