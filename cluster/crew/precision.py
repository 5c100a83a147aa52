"""What `precision: auto` is for a sweep, before any worker exists: the same for all its cells."""

from contextlib import ExitStack
from typing import Any

import ray

from saescale.cluster.crew.claims import Resources
from saescale.cluster.crew.connect import connect, disconnect, wanted_address
from saescale.cluster.crew.head import resources
from saescale.trainers.device import default_device, fast_precision
from saescale.trainers.precision import Precision, cpu_precision, gpu_precision, this_processor

_KIND = "accelerator_type:"  # Ray's resources that say which GPUs there are


def auto_precision(asked: Resources, address: str | None, held: ExitStack) -> Precision:
    """By the GPUs of the cluster at `address` (default: RAY_ADDRESS) where its workers get any, else by the CPU of this
    machine. Without a cluster, by this machine alone.

    Joins the cluster until `held` ends. Raises SaescaleError when it cannot be reached.
    """
    wants_gpus = not isinstance(asked.gpus_per_worker, str)
    if asked.gpus_per_worker == 0:
        return cpu_precision(this_processor())
    if not ray.is_initialized():
        if wanted_address(address) is None:
            return fast_precision(default_device())  # its workers will be processes of this machine
        connect(address)
        held.callback(disconnect)
    return precision_on(resources(), wants_gpus)


def precision_on(there: dict[str, Any], wants_gpus: bool = False) -> Precision:
    """On a cluster of these resources ("GPU", "accelerator_type:A100"), whose GPUs are still to come where workers want
    some and there are none."""
    if not there.get("GPU") and not wants_gpus:
        return cpu_precision(this_processor())
    return gpu_precision(name.removeprefix(_KIND) for name in there if name.startswith(_KIND))
