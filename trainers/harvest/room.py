"""What a harvest takes on the disk and in memory, said before it begins."""

from collections.abc import Sequence

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.writable import free_bytes
from saescale.trainers.harvest.spec import HarvestSpec

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
