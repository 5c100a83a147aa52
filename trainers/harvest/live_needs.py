"""Which blocks of a live source those who stream from it need now, by what they say (storage/live.py)."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from saescale.storage import files
from saescale.storage.live import CONSUMERS, Heard, Place, Places
from saescale.trainers.harvest.room import Room

LOOK_S = 0.1  # between two looks at the folder


class GoesOn(NamedTuple):
    """Where a cell that is still to be trained goes on: at the first row behind its newest checkpoint, or behind the
    one before; rows are counted on over passes."""

    newest: int
    before: int


# The cells that are still to be trained, by their ids; None while that is not known.
Awaited = Callable[[], Mapping[str, GoesOn] | None]
AwaitedBlocks = Callable[[Mapping[str, int]], Mapping[str, int] | None]


class Needs:
    """Of the consumers in the folder `url`, of a source with so many `blocks` a pass. Blocks are counted on over
    passes: `need` is the first one that the slowest consumer needs, of none before `passed` anybody asks again who
    lives, and of none before `held` anybody at all.

    Where what is gone cannot be made again, `awaited` says which cells are still to be trained and the block from which
    each goes on (None: that is not known yet, and so all is held); it is told those whose consumers were killed.
    """

    def __init__(self, url: str, blocks: int, room: Room, awaited: AwaitedBlocks | None = None) -> None:
        self._url, self._blocks, self._room, self._awaited = url, blocks, room, awaited
        self._heard = Heard()
        self._looked = 0.0
        self._cells: dict[str, int] = {}  # of which block on each was last heard to need them
        self.furthest: int | None = blocks  # behind the last block that anybody will need; None: without end
        self.need = self.passed = self.held = self.living = 0

    def look(self) -> bool:
        """Sees where they are; False where it was done just now."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        places = Places.of(self._url, self._heard)
        known = places.living or places.gone
        if places.living:
            self.need = min(map(self._needed, places.living.values()))
        elif places.gone:
            self.need = min(place.passed for place in places.gone.values())  # where they will go on
        ends = [place.end for place in known.values()] or [self._blocks]
        self.furthest = None if None in ends else max(end for end in ends if end is not None)
        self.passed = min((place.passed for place in known.values()), default=self.need)
        self.living = len(places.living)
        self._hold(places)
        return True

    def _hold(self, places: Places) -> None:
        """Where cells stand whose consumer is away: what they go on from is kept until another one has come for them,
        or they are awaited no more."""
        here, away = _by_cell(places.living.values()), _by_cell(places.gone.values())
        self._cells |= away | here
        away = {cell: block for cell, block in away.items() if cell not in here}
        awaited = {} if self._awaited is None else self._awaited(away)
        if awaited is None:
            self.held = 0
            return
        # Both are places before which it will not ask; the newest of its checkpoints may not have been heard of.
        begins = (max(self._cells.get(cell, block), block) for cell, block in awaited.items())
        self.held = min([self.passed, *begins])
        for name, place in places.gone.items() if places.living else ():
            if not any(cell in away and cell in awaited for cell in place.cells):
                files.remove(files.join(self._url, CONSUMERS, name))

    def _needed(self, place: Place) -> int:
        """The first block that a consumer is to find. Where all of them have room it keeps those behind it too: it may
        only have looked at the first rows, or go back to them."""
        short = place.end is not None and place.end - place.passed <= self._room.blocks
        return place.passed if short else place.need

    @property
    def first(self) -> int:
        """`need` within its pass."""
        return self.need % self._blocks

    def wanted(self) -> list[int]:
        """The blocks that are to lie on the disk, the most urgent first."""
        last = self.need + min(self._room.blocks, self._blocks)
        last = last if self.furthest is None else min(last, self.furthest)
        return [number % self._blocks for number in range(self.need, last)]

    def kept(self) -> set[int]:
        """Those, and those that somebody may go back to."""
        return {number % self._blocks for number in range(self.held, self.need)} | set(self.wanted())

    def all_passed(self, block: int) -> bool:
        """Whether all consumers did."""
        return block < self.passed % self._blocks or self.passed >= self._blocks


def _by_cell(places: Iterable[Place]) -> dict[str, int]:
    """The first block that may be asked for again for each cell that they name."""
    found: dict[str, int] = {}
    for place in places:
        for cell in place.cells:
            found[cell] = min(found.get(cell, place.passed), place.passed)
    return found
