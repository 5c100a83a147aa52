"""Lists and counts in prose: a warning about sixty cells names a few of them."""

from collections.abc import Iterable

MOST = 5  # cases that a sentence names


def listed(cases: Iterable[str], between: str = "; ", most: int = MOST) -> str:
    """The first five of the cases, and how many more there are: "a; b; c; d; e; ... and 54 more"."""
    everything = list(cases)
    shown = between.join(everything[:most])
    return shown + (f"{between}... and {len(everything) - most} more" if len(everything) > most else "")


def counted(number: int, noun: str) -> str:
    """As "1 pack" and "4,096 packs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
