"""Which blocks of a live source those who stream from it need now, by what they say (storage/live.py)."""

import time

from saescale.storage import files
from saescale.storage.live import CONSUMERS, Heard, Place, Places
from saescale.trainers.harvest.room import Room

LOOK_S = 0.1  # between two looks at the folder


class Needs:
    """Of the consumers in the folder `url`, of a source with so many `blocks` a pass. Blocks are counted on over
    passes: `need` is the first one that the slowest consumer needs, of none before `passed` anybody asks again."""

    def __init__(self, url: str, blocks: int, room: Room) -> None:
        self._url, self._blocks, self._room = url, blocks, room
        self._heard = Heard()
        self._looked = 0.0
        self.furthest: int | None = blocks  # behind the last block that anybody will need; None: without end
        self.need = self.passed = self.living = 0

    def look(self) -> bool:
        """Sees where they are; False where it was done just now."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        places = Places.of(self._url, self._heard)
        known = places.living or places.gone
        if places.living:
            self.need = min(map(self._needed, places.living.values()))
            for name in places.gone:
                files.remove(files.join(self._url, CONSUMERS, name))
        elif places.gone:
            self.need = min(place.passed for place in places.gone.values())  # where they will go on
        ends = [place.end for place in known.values()] or [self._blocks]
        self.furthest = None if None in ends else max(end for end in ends if end is not None)
        self.passed = min((place.passed for place in known.values()), default=self.need)
        self.living = len(places.living)
        return True

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
        return {number % self._blocks for number in range(self.passed, self.need)} | set(self.wanted())

    def all_passed(self, block: int) -> bool:
        """Whether all consumers did."""
        return block < self.passed % self._blocks or self.passed >= self._blocks
