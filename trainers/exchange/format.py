"""The door of exchange formats: a trained SAE on disk, as saescale or another library writes it.

A format is a file of this folder that defines `write` and `read` at its top level: see README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from saescale.storage.registry import Room

if TYPE_CHECKING:
    from saescale.trainers.exchange.trained import Trained

FORMATS = Room("saescale.trainers.exchange", "exchange format", marker="write")


class Format(Protocol):
    """What the file of a format defines at its top level."""

    def write(self, trained: Trained, url: str) -> list[str]:
        """Writes the SAE to the file or folder `url`; the URLs of the files that it wrote."""

    def read(self, url: str) -> Trained:
        """Reads one. Raises SaescaleError where there is none of this format, or none that saescale can run."""


def find_format(name: str) -> Format:
    """The format of that name. Raises SaescaleError with the nearest name for an unknown one."""
    return FORMATS.load(name)
