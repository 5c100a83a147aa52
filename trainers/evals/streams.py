"""What models have at the rows of a store: the stream of the same subject before training, say, or its neurons."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.subjects.subject import Subject


def streams_of_rows(source: Source, reader: Subject, subject: Subject, rows: int) -> Tensor:
    """The residual stream of `reader`, a model of the same sequences as the subject, at the source's site for the first
    held-out rows, float32 [rows, d_model]."""
    site = Site(layer=source.site.layer, positions=source.site.positions)
    return of_rows(source, lambda ids: reader.run(ids, [site]).resid[0], subject, rows)


def of_rows(source: Source, read: Callable[[Tensor], Tensor], subject: Subject, rows: int) -> Tensor:
    """What `read` gives for contexts of the subject ([batch, length] to [batch, length, width]), at the first held-out
    rows of the source: float32 [rows, width]."""
    assert isinstance(source, ActivationStore), "rows of others do not lead back to sequences"
    places = heldout_places(source, subject, rows)
    found = torch.empty(0)
    lengths = np.array([len(ids) for ids in places.contexts])
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for some in np.split(alike, range(256, len(alike), 256)):
            ids = torch.from_numpy(np.stack([places.contexts[context] for context in some]))
            values = read(ids).float().cpu()
            if not len(found):
                found = torch.empty(rows, values.shape[-1])
            here = np.flatnonzero(np.isin(places.context, some))
            context, pos = np.searchsorted(some, places.context[here]), places.pos[here]
            found[torch.from_numpy(here)] = values[torch.from_numpy(context), torch.from_numpy(pos)]
    return found
