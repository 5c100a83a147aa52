"""The door of sources: what a sweep streams from: a sealed store (store.py), or a live harvest (live.py).

How to add one: README.md of this floor.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from saescale.storage.manifest import Dtype, Site, Split
from saescale.storage.rows import Rows


class Order(NamedTuple):
    """What fixes the endless order of a split's rows, whatever the number of ranks."""

    split: Split
    seed: int
    batch_tokens: int  # rows of a global batch
    mix_row_groups: int = 8  # mixed together


class SourceBatch(NamedTuple):
    """One rank's slice of a global batch, raw: float16, or bfloat16 as uint16 bit patterns.

    `x` is [batch, d_model]. `target` is what x_hat is compared with where that is not x itself: the rows of another
    site at the same positions (transcoders), [batch, d_target].
    """

    x: np.ndarray
    target: np.ndarray | None = None


class Batches(Protocol):
    """An iterator of SourceBatch, owned by its consumer, who closes it."""

    wait_seconds: float  # how long the consumer waited for it
    # Whenever rows are needed, if it may have to wait for them: returns when what it is given, which waits for so many
    # seconds at most, says that they are there. None: the consumer has nothing to do meanwhile.
    while_waiting: Callable[[Callable[[float], bool]], None] | None

    def state(self) -> dict[str, Any]:
        """A small cursor (JSON), from which `Source.resume` goes on with exactly the batches that would have come."""

    def passed(self, batch: int) -> None:
        """Nobody goes back before that global batch any more: what only earlier ones need may go."""

    def close(self) -> None: ...

    def __iter__(self) -> "Batches": ...

    def __next__(self) -> SourceBatch: ...

    def __enter__(self) -> "Batches": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Source(Protocol):
    """Rows of activations of one subject at one site.

    `identity` names the rows: two sources with the same one give the same batches for the same Order. What stands at a
    row's position (`token`, `pos`, `doc` of Rows) is the subject's affair: a token of a text, a patch of an image, a
    gene of a cell.
    """

    @property
    def identity(self) -> str: ...

    @property
    def d_model(self) -> int: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def subject(self) -> str:
        """As `trainers.subjects` takes it."""

    @property
    def site(self) -> Site: ...

    def batches(self, order: Order, start: int = 0, stop: int | None = None, rank: int = 0, ranks: int = 1) -> Batches:
        """Global batches `start` to `stop` (None: without end) of that order, this rank's slice of each."""

    def resume(self, state: dict[str, Any], stop: int | None = None, rank: int = 0, ranks: int = 1) -> Batches:
        """Goes on where `state()` of such an iterator was taken, also on another number of ranks.

        Raises SaescaleError where the state is of another source.
        """

    def heldout(self, rows: int | None = None, columns: Sequence[str] = ("act",)) -> Rows:
        """The first `rows` held-out rows (None: all); of `token`, `pos` and `doc` those that `columns` names.

        Columns that were not asked for are empty. Raises SaescaleError where there are fewer rows.
        """
