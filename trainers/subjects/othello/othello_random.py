"""`othello-random`, `othello-random:PATH`: the subject `othello` before any training, for numbers to compare with."""

from collections.abc import Callable
from pathlib import Path

from saescale.trainers.subjects.othello import othello

NAMES_A_PATH = True


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> othello.Othello:
    """Of the same shape as the trained one, with random weights from seed 0. Raises what that raises."""
    return othello.load(rest, cache, dtype, notify).untrained()
