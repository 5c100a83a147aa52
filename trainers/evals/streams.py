"""The residual stream of another model on the rows of a store: of the same subject before training, say."""

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
    assert isinstance(source, ActivationStore), "rows of others do not lead back to sequences"
    places = heldout_places(source, subject, rows)
    found = torch.empty(rows, reader.d_model)
    lengths = np.array([len(ids) for ids in places.contexts])
    site = Site(layer=source.site.layer, positions=source.site.positions)
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for some in np.split(alike, range(256, len(alike), 256)):
            ids = torch.from_numpy(np.stack([places.contexts[context] for context in some]))
            (stream,) = reader.run(ids, [site]).resid
            here = np.flatnonzero(np.isin(places.context, some))
            context, pos = np.searchsorted(some, places.context[here]), places.pos[here]
            found[torch.from_numpy(here)] = stream.float().cpu()[torch.from_numpy(context), torch.from_numpy(pos)]
    return found
