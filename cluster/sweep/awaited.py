"""What the producers of live sources have to know of a sweep's cells: which are still to be trained, and from where."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from saescale.cluster.sweep.ledger import Ledger
from saescale.storage import checkpoint
from saescale.storage.errors import Unavailable
from saescale.trainers.cell import Cell
from saescale.trainers.harvest.live_needs import GoesOn
from saescale.trainers.harvest.live_spec import LiveSpec


def kept_for_later(
    lives: Mapping[str, LiveSpec], ledger: Ledger, packs: Sequence[Sequence[Cell]], workers: int
) -> list[str]:
    """A line for each live source whose server's files are removed after use, and whose packs cannot all be trained at
    one time by so many workers."""
    of = Counter(ledger.stores[pack[0].store].url for pack in packs)
    return [
        f"{url}: {of[url]} packs, and {workers} workers train at a time; a server's files are kept for others "
        "(remove_hidden_states), and packs take turns where these leave no room; more workers, or a larger max_bytes, "
        "are quicker"
        for url, spec in lives.items()
        if spec.remove_hidden_states and of[url] > workers
    ]


class AwaitedCells:
    """Nobody knows them until `begin`."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._begins: dict[str, GoesOn] = {}

    def begin(self, ledger: Ledger, steps: Mapping[str, Sequence[int]]) -> None:
        """`steps`: ledger.checkpoint_steps(), from which the cells go on."""
        self._begins = {cell.cell_id: _goes_on(cell, steps.get(cell.cell_id, ())) for cell in ledger.pending}
        self._ledger = ledger

    def renew(self, cells: Iterable[Cell]) -> None:
        """They have no worker any more: from now on what they saved counts."""
        assert self._ledger is not None, "begin comes first"
        with suppress(Unavailable):  # then what was known of them stays true
            urls = [(cell, self._ledger.run.checkpoint_url(cell.cell_id)) for cell in cells]
            # Anew, since a producer's thread reads it.
            self._begins = self._begins | {cell.cell_id: _goes_on(cell, checkpoint.steps(url)) for cell, url in urls}

    def rows(self, cells: Iterable[Cell]) -> int:
        """That cells of a pack have behind them, as their checkpoints say."""
        return min(self._begins[cell.cell_id].newest for cell in cells)

    def of(self, url: str) -> dict[str, GoesOn] | None:
        """Those without a result over the store at `url`; None while nobody knows."""
        if (ledger := self._ledger) is None:
            return None
        (store,) = (name for name, store in ledger.stores.items() if store.url == url)
        return {cell.cell_id: self._begins[cell.cell_id] for cell in ledger.pending if cell.store == store}


def _goes_on(cell: Cell, steps: Sequence[int]) -> GoesOn:
    """`steps` of its checkpoints, from the newest or the older one of which it goes on."""
    rows = [step * cell.batch_tokens for step in steps or [0]]
    return GoesOn(max(rows), min(rows))
