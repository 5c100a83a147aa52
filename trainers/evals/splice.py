"""Held-out contexts of a store as the subject reads them again, and the rest of the model on another stream."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.evaluation import Unsuited
from saescale.trainers.harvest.retrace import Places, heldout_places
from saescale.trainers.subjects.subject import Resumes, Subject

TOKENS_AT_A_TIME = 1_024  # in a forward pass: logits of a large vocabulary are 256 kB a token


class Contexts(NamedTuple):
    """Contexts of one length: ids int32 [contexts, length], and where rows of the store are: keep, and the document of
    each, -1 elsewhere, [contexts, length]."""

    ids: Tensor
    keep: Tensor
    doc: np.ndarray


def places_of(source: Source, subject: Subject, most: int | None = None) -> Places:
    """Where the first held-out rows stood, `most` of them at most. Raises SaescaleError where rows of the source do not
    lead back to contexts."""
    if not isinstance(source, ActivationStore):
        raise SaescaleError(f"contexts are found again for activation stores, not for {type(source).__name__}")
    return heldout_places(source, subject, None if most is None else min(most, source.rows("heldout")))


def heldout_contexts(source: Source, subject: Subject, rows: int | None = None) -> Iterator[Contexts]:
    """The first held-out contexts that have at least `rows` rows together (None: all), some at a time.

    Contexts are whole: every row of them that the store has is kept. Raises SaescaleError where rows of the source do
    not lead back to contexts.
    """
    places = places_of(source, subject)
    of_each = np.cumsum(np.bincount(places.context, minlength=len(places.contexts)))
    number = len(of_each) if rows is None else min(len(of_each), int(np.searchsorted(of_each, rows)) + 1)
    doc = source.heldout(columns=("doc",)).doc
    lengths = np.array([len(ids) for ids in places.contexts[:number]])
    order = np.argsort(places.context, kind="stable")
    ends = np.concatenate([[0], of_each])
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for some in np.split(alike, range(step := max(1, TOKENS_AT_A_TIME // length), len(alike), step)):
            docs = np.full((len(some), length), -1, np.int64)
            for line, context in enumerate(some):
                here = order[ends[context] : ends[context + 1]]
                docs[line, places.pos[here]] = doc[here]
            ids = torch.from_numpy(np.stack([places.contexts[context] for context in some]))
            yield Contexts(ids, torch.from_numpy(docs >= 0), docs)


def logits_from(subject: Subject, ids: Tensor, site: Site, resid: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] with `resid` [batch, length, d_model] in place of the stream at the site.

    Raises SaescaleError where the subject gives none.
    """
    if isinstance(subject, Resumes):
        return subject.resume(ids, site, resid)
    logits = subject.run(ids, [], {site: lambda stream: resid}, logits=True).logits
    if logits is None:
        raise Unsuited(f"the subject {subject.name} gives no logits")
    return logits
