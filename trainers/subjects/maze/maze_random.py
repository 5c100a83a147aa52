"""`maze-random`, `maze-random:PATH`: the subject `maze` before any training, for numbers to compare with."""

from collections.abc import Callable
from pathlib import Path

from saescale.trainers.subjects.maze import maze

NAMES_A_PATH = True


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> maze.Maze:
    """Of the same shape as the trained one, with random weights from seed 0. Raises what that raises."""
    return maze.load(rest, cache, dtype, notify).untrained()
