"""What each process on a cluster has of its cores and GPUs, and how many actors a harvest has there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from storage.errors import SaescaleError


class Shares(NamedTuple):
    """`actors` that each claim so many CPUs and GPUs, in Ray's sense, and compute on `threads`."""

    actors: int
    threads: int
    cpus: float
    gpus: int


def share_out(nodes: Sequence[Mapping[str, float]], actors: int | str, shards: int) -> Shares:
    """What each of `actors` ("auto": one for each GPU, or for each node where there are none, no more than `shards`)
    has of nodes with these resources ("CPU", "GPU").

    An actor has one GPU where there are any, and the CPU cores are shared out. Raises SaescaleError when there are
    fewer GPUs than actors.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    size = max(1, min(shards, gpus or len(cores))) if isinstance(actors, str) else actors
    if gpus:
        if size > gpus:
            raise SaescaleError(f"{size} actors with a GPU each, but the cluster has {gpus}; ask for fewer (--actors)")
        # As many as stand beside each GPU everywhere, so that no GPU is left without.
        cpus = min(node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) >= 1)
        return Shares(size, max(1, int(cpus)), float(int(cpus)) if cpus >= 1 else cpus, 1)
    if size > sum(cores):
        return Shares(size, 1, 1 / -(-size // max(1, sum(cores))), 0)
    threads = threads_for(cores, size)
    return Shares(size, threads, float(threads), 0)


def threads_for(cores: list[int], workers: int) -> int:
    """The most threads that each of `workers` can have on nodes with so many `cores`; at least 1."""
    return next((t for t in range(max(cores), 1, -1) if sum(c // t for c in cores) >= workers), 1)
