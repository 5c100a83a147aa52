"""What the producers of live sources have to know of a sweep's cells: which are still to be trained, and from where."""

from collections import Counter
from collections.abc import Mapping, Sequence

from saescale.cluster.sweep.ledger import Ledger
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
        "(remove_hidden_states), so max_bytes has to hold them, or there have to be more workers"
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
        for cell in ledger.pending:
            rows = [step * cell.batch_tokens for step in steps.get(cell.cell_id, [0])]
            self._begins[cell.cell_id] = GoesOn(max(rows), min(rows))
        self._ledger = ledger

    def of(self, url: str) -> dict[str, GoesOn] | None:
        """Those without a result over the store at `url`; None while nobody knows."""
        if (ledger := self._ledger) is None:
            return None
        (store,) = (name for name, store in ledger.stores.items() if store.url == url)
        return {cell.cell_id: self._begins[cell.cell_id] for cell in ledger.pending if cell.store == store}
