"""What a harvest takes on the disk and in memory, said before it begins, and what of a live one may lie there."""

from collections.abc import Sequence

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.live import most_bytes
from saescale.storage.writable import free_bytes
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.live_places import KEY_BYTES, NOTE_BYTES
from saescale.trainers.harvest.live_spec import HELDOUT_EVERY, LiveSpec
from saescale.trainers.harvest.spec import HarvestSpec

_NOTES = 2**20  # bytes of a live source's notes and consumers; the checksum of a block has 40 besides
AHEAD = 2  # blocks whose tokens are known before they can be made, at least
_BESIDE = 10  # bytes of a row beside its activation: token, pos, doc


def check_room(specs: Sequence[HarvestSpec], d_model: int) -> str:
    """What the stores of `specs` take, in words: on the disk in all, and in the memory of a process at a time.

    Raises SaescaleError where the disk of a local folder has no room for what is missing of them.
    """
    spec, row = specs[0], 2 * d_model + _BESIDE
    whole = len(specs) * spec.rows * row
    missing = whole - sum(sum(files.sizes(each.out).values()) for each in specs)
    free = free_bytes(spec.out)
    stores = "1 store" if len(specs) == 1 else f"{len(specs)} stores (layers {_ranges([s.layer for s in specs])})"
    if free is not None and missing > free:
        raise SaescaleError(
            f"{stores} of {spec.rows:,} rows take {_size(whole)}, of which {_size(missing)} are missing, and the disk "
            f"of {spec.out} has {_size(free)} free; make room, harvest fewer rows (--tokens) or elsewhere (--out)"
        )
    held = (len(specs) + 1) * min(spec.shard_rows, spec.rows) * row
    room = "" if free is None else f" ({_size(free)} free)"
    return f"{stores} of {spec.rows:,} rows: {_size(whole)}{room}, {_size(held)} in memory at a time"


class Room:
    """What may lie on the disk: `blocks` files of blocks, `tokens` bytes of token ids, the held-out rows, the notes."""

    def __init__(self, spec: LiveSpec, harvest: HarvestSpec, d_model: int) -> None:
        size, groups = harvest.shard_rows, harvest.row_group_rows
        self.block = most_bytes(size, d_model, groups)
        firsts = range(0, harvest.heldout_tokens, size)
        self.heldout = sum(most_bytes(min(size, harvest.heldout_tokens - first), d_model, groups) for first in firsts)
        # Ids of the blocks of a window and of those ahead; documents that are held out or repeated have some too.
        self.tokens = 32 * contexts.BLOCK_CHARACTERS + 16 * size * (spec.window_blocks + AHEAD)
        self.tokens += 6 * HELDOUT_EVERY * harvest.heldout_tokens
        self.notes = _NOTES + (40 + NOTE_BYTES) * -(-harvest.tokens // size) + KEY_BYTES * harvest.heldout_tokens
        self._max_bytes, self._window = spec.max_bytes, min(spec.window_blocks, -(-harvest.tokens // size))
        self.foreign = 0  # what the files of a server take now

    @property
    def blocks(self) -> int:
        """How many there is room for."""
        return (self._max_bytes - self.beside - self.foreign) // self.block

    @property
    def most_foreign(self) -> int:
        """Bytes that the files of a server may take until a window of blocks has no room any more."""
        return self._max_bytes - self.beside - self._window * self.block

    @property
    def beside(self) -> int:
        """Bytes that are kept for what is no block."""
        return self.heldout + self.tokens + self.notes

    def require(self) -> None:
        """Raises SaescaleError where there is no room for a window of blocks."""
        if self.foreign <= self.most_foreign:
            return
        window = self._window * self.block
        holds = f"a window of {self._window} blocks, which takes {window:,} bytes, and {self.beside:,} beside it"
        least = window + self.beside + self.foreign
        if not self.foreign:
            raise SaescaleError(
                f"live: max_bytes must hold {holds}; give at least {least:,}, or lower block_rows or window_blocks"
            )
        raise SaescaleError(
            f"live: the server's files take {self.foreign:,} bytes, and max_bytes must hold them with {holds}; let "
            "whoever sends it requests wait where its files take server_max_bytes (producer.json), have files removed "
            f"that all cells have passed (remove_hidden_states: true), or give at least {least:,}; then run "
            "again, nothing is lost"
        )

    def require_files(self, rows: int, row_bytes: int, of: str) -> None:
        """Raises SaescaleError where a server's files of so many rows, which lie there at one time, have no room beside
        a window. `of`: which rows."""
        size, own = rows * row_bytes, self._max_bytes - self.most_foreign
        if size > self.most_foreign:
            raise SaescaleError(
                f"live: the server's files of {rows:,} rows ({of}) take {size:,} bytes at least, and lie there at one "
                f"time, beside {own:,} of blocks and notes: give max_bytes at least {size + own:,}"
            )


def _ranges(layers: list[int]) -> str:
    """Ascending numbers, neighbours as one range: 0-3, 7."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
