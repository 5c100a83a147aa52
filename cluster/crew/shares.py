"""What each process on a cluster has of its cores and GPUs, and how many actors a harvest has there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saescale.storage.errors import SaescaleError


class Shares(NamedTuple):
    """`actors` that each claim so many CPUs and GPUs, in Ray's sense, and compute on `threads`."""

    actors: int
    threads: int
    cpus: float
    gpus: float


def share_out(nodes: Sequence[Mapping[str, float]], actors: int | str, shards: int, spread: bool = False) -> Shares:
    """What each of `actors` ("auto": one for each GPU, or for each node where there are none, no more than `shards`)
    has of nodes with these resources ("CPU", "GPU").

    An actor has one GPU where there are any, and the CPU cores are shared out. With `spread`, of a subject over several
    GPUs, it has as many of a node as all can have, and "auto" is one for each node. Raises SaescaleError when there are
    fewer GPUs than actors.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    useful = sum(node.get("GPU" if gpus else "CPU", 0) >= 1 for node in nodes)
    most = gpus if gpus and not spread else useful
    size = max(1, min(shards, most)) if isinstance(actors, str) else actors
    if gpus and size > gpus:
        raise SaescaleError(f"{size} actors with a GPU each, but the cluster has {gpus}; ask for fewer (--actors)")
    each = gpus_each(nodes, size) if spread else min(1, gpus)
    cpus = cpus_each(nodes, size, float(each))
    return Shares(size, max(1, int(cpus)), cpus, each)


def share_beside(nodes: Sequence[Mapping[str, float]], actors: int | str, blocks: int, spread: bool = False) -> Shares:
    """What each of `actors` has that harvest beside workers, to whom at least half of these nodes is left.

    "auto": one for each GPU of the other half, for each node of it with `spread` (a subject over several GPUs of a
    node), or for each node where there are no GPUs; no more than `blocks`. An only GPU is shared.
    """
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    useful = sum(node.get("GPU" if gpus else "CPU", 0.0) >= 1 for node in nodes)
    of_half = useful if not gpus else useful // 2 if spread else int(gpus) // 2
    size = max(1, min(blocks, of_half)) if isinstance(actors, str) else actors
    if gpus:
        most = min(gpus_each(nodes, size), int(gpus) // (2 * size)) if spread else 1
        each = max(1.0, float(most)) if gpus > size else gpus / (2 * size)
        return Shares(size, max(1, int(each * cpus / (2 * gpus))), 1.0, each)
    share = (cpus or 1.0) / (2 * size)
    return Shares(size, max(1, int(share)), float(int(share)) if share >= 1 else share, 0.0)


def gpus_each(nodes: Sequence[Mapping[str, float]], processes: int) -> int:
    """The most GPUs, all of one node, that each of `processes` can have; 0 where there are too few."""
    of_nodes = [int(node.get("GPU", 0)) for node in nodes]
    return next((n for n in range(max(of_nodes, default=0), 0, -1) if sum(g // n for g in of_nodes) >= processes), 0)


def cpus_each(nodes: Sequence[Mapping[str, float]], processes: int, gpus: float) -> float:
    """CPUs that each of `processes`, with so many GPUs each, can claim on nodes with these resources ("CPU", "GPU").

    Claimed in full, so that Ray spreads them over the nodes; but never so many that a GPU is left without, or that a
    process finds no room.
    """
    if gpus:
        beside = [node.get("CPU", 0.0) * gpus / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= gpus]
        each = min(beside, default=1.0)
        return float(int(each)) if each >= 1 else each
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        return 1.0
    if processes > sum(cores):
        return 1 / -(-processes // sum(cores))
    return float(threads_for(cores, processes))


def without(nodes: Sequence[Mapping[str, float]], taken: Mapping[str, float]) -> list[Mapping[str, float]]:
    """What others leave of nodes who claim `taken` of them together: they have it from those that have most."""
    left = [dict(node) for node in nodes]
    for name, share in taken.items():
        for node in sorted(left, key=lambda node: -node.get(name, 0.0)):
            part = min(share, node.get(name, 0.0))
            node[name] = node.get(name, 0.0) - part
            share -= part
    return list(left)


def threads_for(cores: list[int], workers: int) -> int:
    """The most threads that each of `workers` can have on nodes with so many `cores`; at least 1."""
    return next((t for t in range(max(cores), 1, -1) if sum(c // t for c in cores) >= workers), 1)
