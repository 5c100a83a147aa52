"""The packs that wait for workers, the longest first; those over a store that cannot be used are set aside."""

import time
from collections.abc import Sequence
from contextlib import suppress

from saescale.cluster.crew.claims import Needs
from saescale.cluster.crew.crew import back_off
from saescale.cluster.crew.train_crew import BACKOFF_S
from saescale.cluster.sweep.gang import Meshes
from saescale.cluster.sweep.ledger import Ledger
from saescale.cluster.sweep.packing import cost, split
from saescale.cluster.sweep.standing import Pack
from saescale.cluster.sweep.turns import Turns
from saescale.storage.errors import SaescaleError, Unavailable
from saescale.storage.live import is_source
from saescale.trainers.cell import Cell


class Packs:
    """Those that wait, and how far the cells of any pack are."""

    def __init__(self, ledger: Ledger, needs: Needs, meshes: Meshes, turns: Turns) -> None:
        self.ledger, self.needs, self.meshes, self.turns = ledger, needs, meshes, turns
        self.waiting: list[Pack] = []
        self.unusable: dict[str, SaescaleError] = {}  # why packs of a store cannot be trained, by its fingerprint

    def put(self, cells: list[Cell], reached: int, attempt: int = 1, why: str = "") -> None:
        """Cells that are to be trained together, after a pause where that did not go well before."""
        self.turns.waits(cells)
        pause = back_off(attempt - 1, *BACKOFF_S) if attempt > 1 else 0.0
        total = sum(cost(cell) for cell in cells)
        layout = self.meshes.of(cells)
        size = self.needs(cells) if layout.ranks == 1 else self.meshes.needs(cells[0], layout)
        pack = Pack(cells, size, total, reached, attempt, time.monotonic() + pause, why, layout)
        if pack.store not in self.unusable:
            self.waiting.append(pack)
            self.waiting.sort(key=lambda pack: -pack.cost)

    def put_parts(self, cells: list[Cell], count: int, most: float = float("inf")) -> None:
        """The same in about so many packs, none of which takes more than `most` bytes. Raises SaescaleError where a
        cell alone does."""
        for part in split(cells, count, most, self.needs):
            self.put(part, self.reached(part))

    def due(self) -> list[Pack]:
        """Those that need not wait any longer."""
        now = time.monotonic()
        return self.turns.first([pack for pack in self.waiting if pack.due <= now])

    # --- stores

    def is_gone(self, store: str) -> bool:
        """Whether not even this process sees a store any more that it once opened: no other node will."""
        try:
            return not is_source(self.ledger.stores[store].url)
        except Unavailable:
            return False

    def set_aside(self, store: str, cause: SaescaleError) -> None:
        """No pack over that store is begun any more; those over others are."""
        self.unusable.setdefault(store, cause)
        self.waiting = [pack for pack in self.waiting if pack.store != store]

    def left_over(self, cells: Sequence[Cell]) -> SaescaleError:
        """Why a sweep of these cells ends with some of them undone."""
        cause = next(iter(self.unusable.values()))
        if len(self.ledger.stores) == 1:
            return cause
        left = [cell for cell in cells if cell.cell_id not in self.ledger.results]
        urls = ", ".join(self.ledger.stores[store].url for store in self.unusable)
        return SaescaleError(
            f"{cause}; {len(left)} cells over {urls} are left, those of other stores are done: run the same command "
            "again when it can be read"
        )

    # --- how far they are

    def left(self, pack: Pack) -> tuple[list[Cell], int]:
        """The cells without a result, and how far those of the pack are for good."""
        with suppress(Unavailable):  # the next worker will find what this did not
            self.ledger.take_up(pack.cells)
        left = [cell for cell in pack.cells if cell.cell_id not in self.ledger.results]
        return left, self.reached(pack.cells, otherwise=pack.reached)

    def reached(self, cells: Sequence[Cell], otherwise: int = 0) -> int:
        """Steps that no kill can undo; `otherwise` while the run directory does not answer."""
        try:
            return self.ledger.steps_reached(cells)
        except Unavailable:
            return otherwise
