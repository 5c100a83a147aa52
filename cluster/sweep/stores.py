"""The stores of a sweep: opened and checked before anything is trained, each told by its URL where it is at fault."""

from collections.abc import Sequence

from saescale.cluster.sweep.spec import SweepSpec
from saescale.cluster.sweep.watcher import SweepDisplay
from saescale.storage.errors import SaescaleError
from saescale.storage.live import open_source
from saescale.storage.store import ActivationStore

FULL_VERIFY_BYTES = 2 * 2**30  # stores of up to this size together are read whole before training starts


def open_stores(spec: SweepSpec) -> list[ActivationStore]:
    """All of them, in the order of the sweep file.

    Raises SaescaleError for one that cannot be opened, and where two are the same rows: a cell would stand there twice.
    """
    stores: dict[str, ActivationStore] = {}
    for url in spec.stores:
        store = open_source(url)
        if twin := stores.get(store.fingerprint):
            raise SaescaleError(f"store: {twin.url} and {url} are one store ({store.fingerprint}): name it once")
        stores[store.fingerprint] = store
    return list(stores.values())


def verify(stores: Sequence[ActivationStore], eval_tokens: int, display: SweepDisplay) -> None:
    """Before any training time is spent: every shard's size and schema, and all bytes where that is soon done."""
    for store in stores:
        store.require_rows("train", 1, "a sweep")
        store.require_rows("heldout", eval_tokens, "eval.tokens")
    total = sum(shard.bytes for store in stores for shard in store.manifest.shards)
    display.stage("checking the activation store" if len(stores) == 1 else f"checking {len(stores)} activation stores")
    for store in stores:
        store.verify(full=total <= FULL_VERIFY_BYTES)
