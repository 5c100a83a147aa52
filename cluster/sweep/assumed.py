"""What a plan for a cluster rests on beside what was measured: every number with where it comes from, and the file that
may state others.

    sweep: ../sweeps/gpt2-small.yaml     # a sweep file, or its keys here
    assume: {d_model: 768, rows: 134217728}
"""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from saescale.cluster.crew.claims import Positive, Section
from saescale.cluster.sweep.spec import NO_STORE, SweepSpec, named_stores, parse_spec
from saescale.storage.documents import read_yaml
from saescale.storage.errors import SaescaleError
from saescale.storage.mistakes import problems
from saescale.trainers.cell import Cell

Amount = Annotated[float, Field(gt=0, lt=1e30)]


class Assumed(Section):
    """d_model and rows (distinct activations) of the store, or of the live source with the subject's `parameters`, and
    the cluster that trains."""

    d_model: Positive | None = None
    rows: Amount | None = None
    parameters: Amount | None = None
    gpus_per_node: Positive = 8
    link_gb_s: Amount | None = None
    network_gb_s: Amount = 50.0
    disk_gb_s: Amount = 1.0
    mtbf_hours: Amount = 6000.0
    restart_s: Annotated[float, Field(ge=0, lt=1e9)] = 28.0
    repair_s: Annotated[float, Field(ge=0, lt=1e9)] = 600.0
    pack_s: Annotated[float, Field(ge=0, lt=1e9)] = 2.0
    harvest_share: Annotated[float, Field(gt=0, le=1)] = 0.4


# Where the default of each comes from.
SOURCES = {
    "d_model": "of the store",
    "rows": "activations of the store; without: as many as the longest cell trains on",
    "parameters": "of the subject, for a live source",
    "gpus_per_node": "assumed",
    "link_gb_s": "between GPUs of a node, one way each; the vendor's",
    "network_gb_s": "between nodes, one way for each GPU: 400 Gbit/s, assumed",
    "disk_gb_s": "of one process to and from the store, assumed; 2.9 were measured from a local disk",
    "mtbf_hours": "between failures of one node, assumed",
    "restart_s": "measured: 18 until Ray takes a node for dead, 10 for a worker to start",
    "repair_s": "until there is another node, assumed",
    "pack_s": "measured: what a pack costs by itself",
    "harvest_share": "of a device's product rate in a forward pass of the subject, assumed",
}


class Described(NamedTuple):
    """A sweep, what is assumed about it, and of a live source max_bytes."""

    spec: SweepSpec
    assumed: Assumed
    live: bool
    max_bytes: float | None


def describe(url: str, given: Sequence[str] = ()) -> Described:
    """Reads a sweep file, or a description with `sweep` and `assume`; `given` are NAME=VALUE over what it assumes.

    Raises SaescaleError that names the file and the key.
    """
    try:
        document = read_yaml(url)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no file at {url}; deploy/plans and deploy/sweeps hold examples") from error
    if not isinstance(document, dict):
        raise SaescaleError(f"{url} holds neither a sweep nor a description of one (keys sweep, assume)")
    assume: Any = {}
    if "sweep" in document:
        if wrong := sorted(set(document) - {"sweep", "assume"}):
            raise SaescaleError(f"{url}: {wrong[0]} is not a key beside sweep and assume")
        assume, inner = document.get("assume") or {}, document["sweep"]
        if isinstance(inner, str):
            path = os.path.join(os.path.dirname(url), inner)
            return describe_document(_mapping(path), path, _assumed(assume, given, url))
        document = inner
    return describe_document(document, url, _assumed(assume, given, url))


def describe_document(document: Any, where: str, assumed: Assumed) -> Described:
    """Of the keys of a sweep file. Raises SaescaleError for what is wrong in them."""
    if not isinstance(document, Mapping):
        raise SaescaleError(f"{where} holds no sweep: it should have the keys {', '.join(SweepSpec.model_fields)}")
    store = document.get("store")
    live = store.get("live") if isinstance(store, Mapping) else None
    if live is not None:
        if not isinstance(live, Mapping):
            raise SaescaleError(f"{where}: store.live should have keys, such as subject, corpus, tokens, max_bytes")
        document = {**document, "store": NO_STORE}
        rows = assumed.rows or _amount(live.get("tokens"), f"{where}: store.live.tokens")
        assumed = assumed.model_copy(update={"rows": rows})
        most = _amount(live.get("max_bytes"), f"{where}: store.live.max_bytes")
        return Described(parse_spec(document, where), assumed, True, most)
    return Described(parse_spec(named_stores(document, where), where), assumed, False, None)


def _mapping(url: str) -> Any:
    try:
        return read_yaml(url)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no sweep file at {url}") from error


def _assumed(assume: Any, given: Sequence[str], url: str) -> Assumed:
    if not isinstance(assume, Mapping):
        raise SaescaleError(f"{url}: assume should have keys, such as {', '.join(SOURCES)}")
    own: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            names = ", ".join(SOURCES)
            raise SaescaleError(f"--assume {one}: write NAME=VALUE, such as mtbf_hours=2000; there are {names}")
        own[name.strip()] = int(value) if value.strip().isascii() and value.strip().isdigit() else value.strip()
    for where, section in ((f"{url}: assume", assume), ("--assume", own)):
        try:
            Assumed.model_validate(section)
        except ValidationError as error:
            raise SaescaleError(f"{where}: {'; '.join(problems(error, Assumed, 'what is assumed'))}") from error
    return Assumed.model_validate({**assume, **own})


_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}


def _amount(given: Any, what: str) -> float | None:
    """A number, or a text such as `200 GB` or 4.0e10; None where nothing is given."""
    if given is None:
        return None
    text = str(given).strip().replace("_", "")
    unit = next((unit for unit in _UNITS if text.upper().endswith(unit)), "")
    try:
        found = float(text[: len(text) - len(unit)]) * _UNITS.get(unit, 1.0)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e30:
        raise SaescaleError(f"{what}: {given!r} is no amount; write such as 4.0e10 or 200 GB")
    return found


class StoreToCome(NamedTuple):
    """A store that is not there yet."""

    fingerprint: str
    d_model: int


def cells_to_come(spec: SweepSpec, d_model: int, number: int = 0) -> list[Cell]:
    """The cells over a store of which only d_model is known, the `number`-th of the sweep."""
    return spec.cells(StoreToCome(f"planned{number or ''}", d_model), "bf16")
