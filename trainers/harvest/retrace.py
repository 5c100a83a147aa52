"""From rows of a store back to the contexts that they were in: any activation leads back to what the subject read."""

from typing import NamedTuple

import numpy as np

from saescale.storage.errors import SaescaleError
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest.make_shard import mixed, prefix_of
from saescale.trainers.subjects.numbered import find_sequences
from saescale.trainers.subjects.subject import Generates, Subject


class Places(NamedTuple):
    """Where rows stood: row i at position `pos[i]` of `contexts[context[i]]`.

    `contexts` are ids int32 [length] as the subject read them, what was dropped (BOS) included.
    """

    contexts: list[np.ndarray]
    context: np.ndarray  # int64 [rows]
    pos: np.ndarray  # int64 [rows]


def heldout_places(store: ActivationStore, subject: Subject, rows: int | None = None) -> Places:
    """Places of the first `rows` held-out rows (None: all), in their order.

    Sequences of the subject's own are made again by their numbers; contexts of a text are put together again from all
    held-out tokens, 10 bytes each. Raises SaescaleError where the store has fewer rows, or was not written by
    `saescale harvest` so that its order is unknown.
    """
    wanted = store.rows("heldout") if rows is None else rows
    store.require_rows("heldout", wanted, "the held-out set")
    if isinstance(subject, Generates):
        found = store.heldout(wanted, ("pos", "doc"))
        numbers, context = np.unique(found.doc, return_inverse=True)
        contexts = [s.ids for s in find_sequences(subject, "heldout", store.manifest.seed, numbers.tolist())]
        return Places(contexts, context, found.pos.astype(np.int64))
    return _of_text(store, subject, wanted)


def _of_text(store: ActivationStore, subject: Subject, wanted: int) -> Places:
    length, (prefix, _) = store.manifest.context_length, prefix_of(subject)
    whole = store.heldout(columns=("token", "pos"))
    shards = [shard.rows for shard in store.manifest.shards if shard.split == "heldout"]
    contexts: list[np.ndarray] = []
    context, pos = np.empty(len(whole.token), np.int64), np.empty(len(whole.token), np.int64)
    start = 0
    for ordinal, rows in enumerate(shards):
        here = slice(start, start + rows)
        order = mixed(store.manifest.seed, "heldout", ordinal, rows)
        token = np.empty(rows, np.int32)
        token[order] = whole.token[here]
        context[here], pos[here] = len(contexts) + order // length, order % length + len(prefix)
        if rows % length or not np.array_equal(pos[here], whole.pos[here]):
            raise SaescaleError(
                f"{store.url}: its rows are not in the order of saescale harvest, so they do not lead back to contexts"
            )
        contexts += [np.concatenate([np.array(prefix, np.int32), ids]) for ids in token.reshape(-1, length)]
        start += rows
    return Places(contexts, context[:wanted], pos[:wanted])
