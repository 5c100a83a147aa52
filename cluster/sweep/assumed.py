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
from saescale.cluster.sweep.spec import SweepSpec, named_stores, parse_spec, read_keys, require_keys
from saescale.storage.errors import SaescaleError
from saescale.storage.mistakes import problems
from saescale.trainers.cell import Cell
from saescale.trainers.harvest.live_spec import LiveSpec

Amount = Annotated[float, Field(gt=0, lt=1e30)]


class Assumed(Section):
    """d_model and rows (distinct activations) of the store, or of the live source with the subject's `parameters`, and
    the cluster that trains."""

    d_model: Annotated[int, Field(gt=0, le=2**16, strict=True)] | None = None  # Llama 3.1 405B's: 16,384
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
    """A sweep, and what is assumed about it."""

    spec: SweepSpec
    assumed: Assumed

    @property
    def harvested(self) -> list[LiveSpec]:
        """Its live sources that are harvested while the cells train; others come from a server."""
        return [live for live in self.spec.lives.values() if live.hidden_states is None]


def describe(url: str, given: Sequence[str] = ()) -> Described:
    """Reads a sweep file, or a description with `sweep` and `assume`; `given` are NAME=VALUE over what it assumes.

    Raises SaescaleError that names the file and the key.
    """
    document = read_keys(url, "plan or sweep", ("sweep", "assume"), "deploy/plans and deploy/sweeps hold")
    assume: Any = {}
    if "sweep" in document:
        if wrong := sorted(set(document) - {"sweep", "assume"}):
            raise SaescaleError(f"{url}: {wrong[0]} is not a key beside sweep and assume")
        assume, inner = document.get("assume") or {}, document["sweep"]
        if isinstance(inner, str):
            path = os.path.join(os.path.dirname(url), inner)
            document = read_keys(path, "sweep", SweepSpec.model_fields)
            return describe_document(document, path, _assumed(assume, given, url))
        document = inner
    return describe_document(document, url, _assumed(assume, given, url))


def describe_document(document: Any, where: str, assumed: Assumed) -> Described:
    """Of the keys of a sweep file. Raises SaescaleError for what is wrong in them."""
    keys = require_keys(document, where, "sweep", SweepSpec.model_fields)
    spec = parse_spec(named_stores(keys, where), where)
    if spec.lives and assumed.rows is None:
        assumed = assumed.model_copy(update={"rows": float(max(live.tokens for live in spec.lives.values()))})
    return Described(spec, assumed)


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


class StoreToCome(NamedTuple):
    """A store that is not there yet."""

    fingerprint: str
    d_model: int


def cells_to_come(spec: SweepSpec, d_model: int, number: int = 0) -> list[Cell]:
    """The cells over a store of which only d_model is known, the `number`-th of the sweep."""
    return spec.cells(StoreToCome(f"planned{number or ''}", d_model), "bf16")
