"""A harvest shared by the actors of a Ray cluster: the same store, whatever their number and whichever died."""

import uuid
from contextlib import suppress
from typing import NamedTuple

from saescale.cluster.crew.harvest_crew import HarvestCrew, ShowHarvest
from saescale.cluster.crew.harvest_worker import ActorRow
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Manifest
from saescale.storage.secrets import hide_secrets
from saescale.trainers.harvest.conduct import SPOOL_PREFIX, conduct
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import name_for_other_processes


class Harvest(NamedTuple):
    """The manifest of a finished harvest, and what each actor did for it in this call."""

    manifest: Manifest
    actors: list[ActorRow]


def harvest_on_actors(spec: HarvestSpec, actors: int | str, address: str | None, show: ShowHarvest) -> Harvest:
    """A harvest (trainers/harvest/conduct.py) by `actors` processes ("auto": one for each GPU or node) of the Ray
    cluster at `address` (default: RAY_ADDRESS, else a local one).

    All share the documents, then the shards. The store's folder has to be in sight of every node; the corpus only of
    this one. On machines of one kind the store is the same to the last bit whatever `actors` is, and the one that
    `harvest` writes; another kind may round otherwise. Memory here: less than 100 bytes for each document, no tokens;
    those lie in a folder of the store's folder until the end. Two calls at a time on one store do no harm, see
    `conduct`. Raises what `harvest` and `HarvestCrew` raise.
    """
    # A folder for this call alone: another one on the same store removes its own, and all of them only when the
    # store is sealed and nobody needs them any more.
    spool = files.join(_absolute(spec.out), SPOOL_PREFIX + uuid.uuid4().hex)
    try:
        with HarvestCrew(_for_other_nodes(spec), spool, actors, address, show) as crew:
            manifest = conduct(spec, crew, spool, crew.say)
            return Harvest(manifest, crew.rows())
    finally:
        with suppress(SaescaleError):  # the next harvest of this store that ends well removes it
            files.remove(spool)


def _for_other_nodes(spec: HarvestSpec) -> HarvestSpec:
    """The spec with paths that mean the same in every process."""
    update = {
        "out": _absolute(spec.out), "subject": name_for_other_processes(spec.subject),
        "corpus": hide_secrets(spec.corpus),  # which only this process reads
    }  # fmt: skip
    return spec.model_copy(update=update)


def _absolute(url: str) -> str:
    return files.local_path(url) or url
