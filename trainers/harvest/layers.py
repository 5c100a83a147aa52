"""Several layers in one pass of the subject: which are meant, and the store of each."""

import os
import re
from collections.abc import Callable, Iterable

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import MANIFEST, Site
from saescale.trainers.harvest.spec import PLAN, HarvestSpec
from saescale.trainers.subjects.subject import count_layers

ALL = "all"
_MOST = 10_000  # of a subject: what names more is a slip
_PART = re.compile(r"(\d+)(?:-(\d+))?")


def each_layer(
    spec: HarvestSpec,
    layers: str | Iterable[int],
    cache: str | os.PathLike[str] | None = None,
    notify: Callable[[str], None] | None = None,
) -> list[HarvestSpec]:
    """What one pass harvests: a spec for each layer, ascending, whose store lies in the folder `spec.out` and is named
    after its site (resid_post.3); `spec.layer` says nothing.

    `layers` is "0-11", "0,4,8-11", "all" or the numbers. Raises SaescaleError where it names none, or where `spec.out`
    is a store itself, and for "all" what `count_layers` raises.
    """
    if there := [name for name in (MANIFEST, PLAN) if files.exists(files.join(spec.out, name))]:
        raise SaescaleError(
            f"{spec.out} is a store itself (it holds {there[0]}); --layers writes a store for each layer into a "
            "folder: give another one"
        )
    if isinstance(layers, str):
        trusted = spec.trust_remote_code
        named = _named(layers)
        numbers = range(count_layers(spec.subject, cache, notify, trusted)) if named is None else named
    else:
        numbers = sorted(set(layers))
        if not numbers:
            raise SaescaleError("harvest: no layer is named")
    return [spec.model_copy(update={"layer": layer, "out": store_of_layer(spec.out, layer)}) for layer in numbers]


def store_of_layer(folder: str, layer: int) -> str:
    """Where in the folder the store of a layer lies."""
    return files.join(folder, Site(layer=layer, positions="all").name)


def stores_of_all(folder: str) -> str:
    """The pattern of them, as a sweep file takes it."""
    return store_of_layer(folder, 0).removesuffix("0") + "*"


def _named(layers: str) -> list[int] | None:
    """The layers that the text names, ascending, each once; None where it names all."""
    if layers.strip().lower() == ALL:
        return None
    found: set[int] = set()
    for part in layers.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise SaescaleError(
                f"--layers must be numbers and ranges (0-11, or 0,4,8) or {ALL}, not {layers!r}: "
                f"{part.strip()!r} is none"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise SaescaleError(f"--layers {layers}: {part.strip()} counts down; write {last}-{first}")
        if last >= _MOST:
            raise SaescaleError(f"--layers {layers}: no subject has a layer {last}")
        found |= set(range(first, last + 1))
    return sorted(found)
