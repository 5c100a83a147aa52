"""Packs over a server's files that go after use (remove_hidden_states), where there are more of them than workers.

What a pack without a worker goes on from is kept for it. Where that fills the room, the server waits, and so do the
packs that have a worker, for ever if none of them made way. So the one that is furthest ahead saves and gives its
worker to the one that is furthest back, and files go again; then another one does.
"""

import time
from collections.abc import Collection, Set

from saescale.cluster.sweep.awaited import AwaitedCells
from saescale.cluster.sweep.standing import Attempt, Pack
from saescale.trainers.cell import Cell

GIVE_WAY_S = 20.0  # for which a pack has waited for rows; it takes some seconds to begin again


class Turns:
    """Those over the stores with these fingerprints."""

    def __init__(self, awaited: AwaitedCells, stores: Set[str] = frozenset()) -> None:
        self._awaited, self._stores = awaited, stores

    def has(self, cells: Collection[Cell]) -> bool:
        """Whether cells of a pack are among them."""
        return any(cell.store in self._stores for cell in cells)

    def waits(self, cells: Collection[Cell]) -> None:
        """Cells of a pack have no worker now: what they have saved says where they go on."""
        if self.has(cells):
            self._awaited.renew(cells)

    def first(self, due: list[Pack]) -> list[Pack]:
        """Of the packs that may begin those that are to: nobody before one that is further back."""
        back: dict[str, int] = {}
        for pack in due:
            if pack.store in self._stores:
                back[pack.store] = min(self._rows(pack), back.get(pack.store, self._rows(pack)))
        return [pack for pack in due if pack.store not in back or self._rows(pack) == back[pack.store]]

    def gives_way(self, running: Collection[Attempt], waiting: Collection[Pack]) -> Attempt | None:
        """The attempt that is to make way now."""
        for store in self._stores:
            back = min((self._rows(pack) for pack in waiting if pack.store == store), default=None)
            mine = [attempt for attempt in running if attempt.pack.store == store]
            if back is None or any(attempt.parting for attempt in mine):
                continue
            held_up = [attempt for attempt in mine if _waits(attempt) and self._reached(attempt) > back]
            if held_up:
                return max(held_up, key=self._reached)
        return None

    def _reached(self, attempt: Attempt) -> int:
        if attempt.progress is None:
            return self._rows(attempt.pack)
        return attempt.progress.step * attempt.pack.cells[0].batch_tokens

    def _rows(self, pack: Pack) -> int:
        """That its cells have behind them for good."""
        return self._awaited.rows(pack.cells)


def _waits(attempt: Attempt) -> bool:
    return any(wait_is_for_rows(wait.what) and time.time() - wait.since > GIVE_WAY_S for wait in attempt.waits)


def wait_is_for_rows(what: str) -> bool:
    """Whether a worker that waits for this waits for its stream."""
    return "activations of" in what
