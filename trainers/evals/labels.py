"""The ground truth of the rows of a store, recomputed from what the subject read; a store holds none."""

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.subjects.subject import Subject


def heldout_labels(source: Source, subject: Subject, rows: int | None = None) -> dict[str, np.ndarray]:
    """Every label of the subject at the first `rows` held-out rows (None: all): {name: [rows, ...]}.

    Raises SaescaleError where the subject has none, or rows of the source do not lead back to its contexts.
    """
    if not isinstance(source, ActivationStore):
        raise SaescaleError(f"labels are recomputed for activation stores, not for {type(source).__name__}")
    places = heldout_places(source, subject, rows)
    lengths = np.array([len(ids) for ids in places.contexts])
    found: dict[str, np.ndarray] = {}
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)  # numbers of contexts
        here = np.flatnonzero(np.isin(places.context, alike))  # rows in them
        labels = subject.label(np.stack([places.contexts[number] for number in alike]))
        for name, values in labels.items():
            of_rows = values[np.searchsorted(alike, places.context[here]), places.pos[here]]
            found.setdefault(name, np.empty((len(places.context), *of_rows.shape[1:]), of_rows.dtype))[here] = of_rows
    if not found:
        raise SaescaleError(f"the subject {subject.name} has no labels")
    return found
