"""The blocks of a live source on the disk: which are there, which are made, and whether they came out as before."""

import json
import re
from collections.abc import Sequence, Set

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError
from saescale.storage.live import name_of
from saescale.trainers.harvest.make_shard import Made
from saescale.trainers.harvest.room import Room

MADE = "made"  # a folder of the checksums of blocks, a file for each thousand
_BLOCK = re.compile(r"train-(\d+)\.parquet")


class Blocks:
    """Those in the folder `url`, for which there is `room`: `present` ones, and those that somebody is `making`.

    What was left there without a checksum may be half of something, and goes.
    """

    def __init__(self, url: str, room: Room) -> None:
        self._url, self._room = url, room
        self._sums: dict[int, dict[str, str]] = {}  # by thousands
        found = blocks_in(url)
        self.present = {block for block in found if str(block) in self._checksums(block)}
        for block in found - self.present:
            files.remove(files.join(url, name_of(block)))
        self.making: set[int] = set()

    def __len__(self) -> int:
        return len(self.present | self.making)

    def see(self) -> None:
        """Those that lie there already, though nobody has said yet that they are made."""
        self.present |= blocks_in(self._url) & self.making

    def lacking(self, wanted: Sequence[int]) -> list[int]:
        """Those of `wanted` that nobody makes."""
        return [block for block in wanted if block not in self.present and block not in self.making]

    def made(self, made: Made) -> bool:
        """Takes one that was made; whether it had been made before. SaescaleError where it had other bytes then."""
        shard = made.records[0].shard
        match = _BLOCK.fullmatch(shard.name)
        assert match is not None
        block = int(match[1])
        self.making.discard(block)
        self.present.add(block)
        known = self._checksums(block)
        if (before := known.get(str(block))) not in (None, shard.xxh3):
            self.remove(block)
            raise SaescaleError(
                f"{self._url}: block {block} was made again with other bytes ({shard.xxh3}, not {before}): the corpus "
                "or the subject was changed, or machines of another kind round otherwise; restore it, or begin anew "
                "in another folder"
            )
        if before is None:
            known[str(block)] = shard.xxh3
            files.write_atomic(files.join(self._url, MADE, f"{block // 1000:05d}.json"), json.dumps(known).encode())
        return before is not None

    def make_room(self, wanted: Set[int], need: int, of: int) -> bool:
        """Removes a block that is not wanted now, if there is one: that which is needed last, after block `need` of a
        pass of so many. Those that were just passed go last."""
        spare = self.present - wanted - self.making
        if spare:
            self.remove(max(spare, key=lambda block: (need - 1 - block) % of))
        return bool(spare)

    @property
    def full(self) -> bool:
        """Whether there is no room for one more."""
        return len(self) >= self._room.blocks

    def remove(self, block: int) -> None:
        files.remove(files.join(self._url, name_of(block)))
        self.present.discard(block)

    def _checksums(self, block: int) -> dict[str, str]:
        thousand = block // 1000
        if thousand not in self._sums:
            where = files.join(self._url, MADE, f"{thousand:05d}.json")
            try:
                self._sums[thousand] = read_json(where, f"remove {self._url}, or name another folder")
            except FileNotFoundError:
                self._sums[thousand] = {}
        return self._sums[thousand]


def blocks_in(url: str) -> set[int]:
    """Of what lies in the folder."""
    return {int(match[1]) for name in files.list_names(url) if (match := _BLOCK.fullmatch(name))}
