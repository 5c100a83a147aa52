"""A mesh whose processes are threads of this one: the same code over channels that only copy."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from saescale.trainers.mesh.channel import Traffic
from saescale.trainers.mesh.distributed import ProcessMesh
from saescale.trainers.mesh.layout import Layout


class Place:
    """What the members of one group of threads hand to each other."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.there = size, threading.Barrier(size, timeout=120), [torch.empty(0)] * size


class ThreadChannel:
    """channel.Channel, as far as what is said; `traffic` counts what the other one would."""

    def __init__(self, place: Place, rank: int, traffic: Traffic) -> None:
        self.place, self.rank, self.size, self.traffic = place, rank, place.size, traffic

    def gather(self, t: torch.Tensor, kind: str) -> torch.Tensor:
        if self.size == 1:
            return t[None]
        self.traffic.bytes[kind] += (self.size - 1) * t.numel() * t.element_size()
        return torch.stack(self._all(t))

    def exchange(self, t: torch.Tensor, kind: str) -> torch.Tensor:
        if self.size == 1:
            return t
        self.traffic.bytes[kind] += (self.size - 1) * t.numel() * t.element_size() // self.size
        return torch.stack([other[self.rank] for other in self._all(t)])

    def _all(self, t: torch.Tensor) -> list[torch.Tensor]:
        self.place.there[self.rank] = t.clone()
        self.place.barrier.wait()
        found = list(self.place.there)
        self.place.barrier.wait()
        return found


class _Processes:
    """What ProcessMesh wants of distributed.Processes."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank, self.traffic = layout, rank, Traffic()
        self.shard, self.replica = layout.place(rank)


def on_threads(layout: Layout, n_latents: int, work: Callable[[ProcessMesh], Any]) -> list[Any]:
    """What `work` gives in each of the mesh's threads, in the order of the ranks."""
    shards = [Place(layout.shards) for _ in range(layout.replicas)]
    replicas = [Place(layout.replicas) for _ in range(layout.shards)]
    everyone = Place(layout.ranks)

    def one(rank: int) -> Any:
        processes = _Processes(layout, rank)
        shard, replica = layout.place(rank)
        mesh = ProcessMesh(
            processes,  # type: ignore[arg-type]
            n_latents,
            ThreadChannel(shards[replica], shard, processes.traffic),  # type: ignore[arg-type]
            ThreadChannel(replicas[shard], replica, processes.traffic),  # type: ignore[arg-type]
            ThreadChannel(everyone, rank, processes.traffic),  # type: ignore[arg-type]
        )
        try:
            return work(mesh)
        except BaseException:
            everyone.barrier.abort()
            shards[replica].barrier.abort()
            replicas[shard].barrier.abort()
            raise

    with ThreadPoolExecutor(layout.ranks) as pool:
        return list(pool.map(one, range(layout.ranks)))
