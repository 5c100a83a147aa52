"""A harvest shared by the actors of a Ray cluster: the same stores, whatever their number and whichever died."""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from saescale.cluster.crew.harvest_crew import HarvestCrew, ShowHarvest
from saescale.cluster.crew.harvest_worker import ActorRow
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Manifest
from saescale.storage.secrets import hide_secrets
from saescale.trainers.harvest.conduct import SPOOL_PREFIX, conduct, is_sealed
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import name_for_other_processes


class Harvest(NamedTuple):
    """The manifests of a finished harvest, and what each actor did for it in this call."""

    manifests: list[Manifest]
    actors: list[ActorRow]


def harvest_on_actors(
    specs: Sequence[HarvestSpec], actors: int | str, address: str | None, show: ShowHarvest
) -> Harvest:
    """A harvest (trainers/harvest/conduct.py) by `actors` processes ("auto": one for each GPU or node) of the Ray
    cluster at `address` (default: RAY_ADDRESS, else a local one). `specs` differ in `layer` and `out` alone.

    All share the documents, then the shards. The stores' folders have to be in sight of every node; the corpus only of
    this one. On machines of one kind a store is the same to the last bit whatever `actors` is, and the one that
    `harvest` writes; another kind may round otherwise. Memory here: less than 100 bytes for each document, no tokens;
    those lie in a folder of a store's folder until the end. Two calls at a time do no harm, see `conduct`. Raises what
    `harvest` and `HarvestCrew` raise.
    """
    specs = [for_other_nodes(spec) for spec in specs]
    # A folder for this call alone: another one removes its own, and all of them only in stores that are sealed, when
    # nobody needs them any more.
    first = next((spec for spec in specs if not is_sealed(spec)), specs[0])
    spool = files.join(first.out, SPOOL_PREFIX + uuid.uuid4().hex)
    try:
        with HarvestCrew(specs[0].rows, spool, actors, address, show) as crew:
            manifests = conduct(specs, crew, spool, crew.say)
            return Harvest(manifests, crew.rows())
    finally:
        with suppress(SaescaleError):  # the next harvest of this store that ends well removes it
            files.remove(spool)


def for_other_nodes(spec: HarvestSpec) -> HarvestSpec:
    """The spec with paths that mean the same in every process."""
    update = {
        "out": _absolute(spec.out), "subject": name_for_other_processes(spec.subject),
        "corpus": hide_secrets(spec.corpus),  # which only this process reads
    }  # fmt: skip
    return spec.model_copy(update=update)


def _absolute(url: str) -> str:
    return files.local_path(url) or url
