"""Where in the corpus the blocks of a live source begin, noted so that none of it is read twice for them.

A block can be made by whoever knows where its first tokens stand, how many train rows came before them, and which texts
are held out. These are noted as `places/` in the source's folder: numbers for each block, and the held-out texts once.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.trainers.harvest.assignment import Reached
from saescale.trainers.subjects.texts.text import Place
from saescale.trainers.subjects.texts.text_files import Where

PLACES = "places"  # a folder: held.json, and a file for each thousand blocks
_HELD = "held.json"
NOTE_BYTES, KEY_BYTES = 160, 24  # of a block, of a held-out text, at most


class Begin(NamedTuple):
    """From where tokens can be read on: block of text `text`, which begins at `place` of a corpus (None: a block of
    sequences, or a file of a server), and how far the assignment is there."""

    text: int
    place: Place | None
    reached: Reached


class Places:
    """The notes of the live source `url`, whose corpus has that digest: with another one they are begun anew."""

    def __init__(self, url: str, corpus: str) -> None:
        self._url, self._corpus = url, corpus
        self._thousands: dict[int, dict[str, list[int]]] = {}
        self._last: Begin | None = None
        noted = self._read(_HELD)
        self.held: list[int] | None = noted["held"] if noted and noted["corpus"] == corpus else None

    def hold(self, held: list[int]) -> None:
        """Notes the held-out texts, before any block."""
        if self.held is None:
            files.remove(files.join(self._url, PLACES))
            self._thousands, self.held = {}, held
            content = json.dumps({"corpus": self._corpus, "held": held})
            files.write_atomic(self._file(_HELD), content.encode())

    def note(self, block: int, begin: Begin) -> None:
        """Notes where a block begins, unless it is where the one before it does."""
        if begin == self._last:
            return
        self._last = begin
        known = self._thousand(block // 1000)
        numbers = _numbers(begin)
        if known.get(str(block)) != numbers:
            known[str(block)] = numbers
            files.write_atomic(self._file(_name(block // 1000)), json.dumps(known).encode())

    def before(self, block: int) -> Begin | None:
        """From where the tokens of the block can be read, as near as was noted."""
        for thousand in range(block // 1000, -1, -1) if self.held is not None else ():
            known = self._thousand(thousand)
            if near := [int(number) for number in known if int(number) <= block]:
                return _begin(known[str(max(near))])
        return None

    def _thousand(self, thousand: int) -> dict[str, list[int]]:
        if thousand not in self._thousands:
            self._thousands = {thousand: self._read(_name(thousand)) or {}}
        return self._thousands[thousand]

    def _read(self, name: str) -> Any:
        try:
            return read_json(self._file(name), f"remove {files.join(self._url, PLACES)}, which only saves time")
        except FileNotFoundError:
            return None

    def _file(self, name: str) -> str:
        return files.join(self._url, PLACES, name)


def _name(thousand: int) -> str:
    return f"{thousand:05d}.json"


def _numbers(begin: Begin) -> list[int]:
    text, place, reached = begin
    parts: Iterable[int] = () if place is None else (*place.where, place.doc, int(place.inside))
    return [text, reached.rows, reached.doc, int(reached.held), *parts]


def _begin(numbers: list[int]) -> Begin:
    text, rows, doc, held, *where = numbers
    place = Place(Where(*where[:4]), where[4], bool(where[5])) if where else None
    return Begin(text, place, Reached(rows, doc, bool(held)))
