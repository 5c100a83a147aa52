"""`saescale plan --cluster`: GPUs, hours, memory, bytes of disk and of the network that a sweep takes on a cluster
whose nodes fail."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saescale.cluster.crew.claims import CPU_SHARE, GPU_SHARE
from saescale.cluster.sweep.assumed import SOURCES, Described, cells_to_come
from saescale.cluster.sweep.groups import Group, gang_of, pack_of
from saescale.cluster.sweep.meshes import check_meshes, plan_meshes
from saescale.cluster.sweep.packing import BATCH_FLOPS, cost, pack_cells
from saescale.cluster.sweep.sharding import step_on
from saescale.scaling.planning.devices import Device
from saescale.scaling.planning.network import Network
from saescale.scaling.planning.schedule import Cluster, Outcome, best_interval, courses, simulate
from saescale.storage.checkpoint import KEPT
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.training.memory import PROCESS_BYTES, StreamSize, pack_memory, weights_bytes

_STREAM = StreamSize(8_192, 2**40)
_COURSES = 200
_EVENTS = 200_000  # of all courses together; fewer courses of a large sweep, but never fewer than _FEW
_FEW = 20


@dataclass(frozen=True)
class ClusterPlan:
    """The answer. `quiet` is the course without failures, `hours` those of the simulated ones [courses] in order."""

    described: Described
    device: Device
    d_model: int
    gpus: int
    harvest_gpus: int
    harvest_s: float  # of one device, all of it
    groups: tuple[Group, ...]
    cluster: Cluster
    quiet: Outcome
    hours: np.ndarray
    found: Sequence[Outcome]

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        assumed = self.described.assumed
        low, median, high = np.quantile(self.hours, [0.05, 0.5, 0.95]).tolist()
        used = sum(group.seconds * group.step.mesh.ranks for group in self.groups)
        flops = sum(cost(cell) for group in self.groups for cell in group.cells)
        return {
            "sweep": self.described.spec.name,
            "device": self.device.document(flops / used),
            "gpus": self.gpus, "harvest_gpus": self.harvest_gpus, "d_model": self.d_model,
            "idle_gpus": max(0, self.cluster.gpus - sum(group.job.gpus for group in self.groups)),
            "cells": sum(len(group.cells) for group in self.groups),
            "flops": flops,
            "gpu_hours": used / 3600,
            "waiting_gpu_hours": sum(group.waiting_s * group.step.mesh.ranks for group in self.groups) / 3600,
            "harvest_gpu_hours": self.harvest_s / 3600,
            "hours_without_failures": self.quiet.seconds / 3600,
            "hours": {"median": median, "low": low, "high": high, "courses": len(self.hours)},
            "failures": float(np.mean([course.failures for course in self.found])),
            "lost_gpu_hours": float(np.mean([course.lost_s for course in self.found])) / 3600,
            "memory_per_gpu": max(group.step.bytes for group in self.groups),
            "disk": self._disk(), "network": self._network(),
            "checkpoint_every_s": self.cluster.checkpoint_every_s,
            "best_checkpoint_every_s": self._best_interval(),
            "groups": [group.document() for group in self.groups],
            "assumed": {
                name: {"value": value, "from": "stated" if name in assumed.model_fields_set else SOURCES[name]}
                for name, value in assumed
                if value is not None
            },
        }  # fmt: skip

    def _best_interval(self) -> float:
        """Of the largest group: the one that pays most for its checkpoints."""
        largest = max(self.groups, key=lambda group: (group.step.mesh.ranks, group.job.checkpoint_s))
        nodes = math.ceil(largest.job.gpus / self.cluster.per_node)
        return best_interval(largest.job.checkpoint_s, self.cluster.mtbf_s / nodes)

    def _disk(self) -> dict[str, float]:
        """Bytes at once: the source, checkpoints of what trains at the same time, and the results."""
        edges = sorted(
            edge
            for group, (began, ended) in zip(self.groups, self.quiet.spans, strict=True)
            for edge in ((began, 1, KEPT * group.state), (ended, 0, -KEPT * group.state))
        )
        held = np.cumsum([change for _, _, change in edges])
        cells = [cell for group in self.groups for cell in group.cells]
        lives = self.described.spec.lives.values()
        stored = len(self.described.spec.stores) - len(lives)
        source = sum(live.max_bytes for live in lives) + self._rows() * self.d_model * 2 * stored
        return {
            "source": source, "checkpoints": float(held.max(initial=0.0)),
            "results": sum(weights_bytes(cell) for cell in cells),
        }  # fmt: skip

    def _network(self) -> dict[str, float]:
        """Bytes in all: read from the source, written as checkpoints, sent between the processes of meshes."""
        every = self.cluster.checkpoint_every_s
        return {
            "source": sum(
                max(cell.tokens for cell in group.cells) * self.d_model * 2 * group.step.mesh.ranks
                for group in self.groups
            ),
            "checkpoints": sum(group.state * max(1, math.ceil(group.seconds / every) - 1) for group in self.groups),
            "mesh": sum(group.sent for group in self.groups),
        }

    def _rows(self) -> float:
        return rows_of(self.described, [cell for group in self.groups for cell in group.cells])


def rows_of(described: Described, cells: Sequence[Cell]) -> float:
    """Distinct activations of one store."""
    return described.assumed.rows or float(max(cell.tokens for cell in cells))


def plan_cluster(described: Described, device: Device, gpus: int, seed: int = 0) -> ClusterPlan:
    """What the sweep takes on `gpus` devices.

    Raises SaescaleError where d_model is not known, a cell finds no room, and where nodes fail too often to get ahead.
    """
    assumed, spec = described.assumed, described.spec
    d_model = assumed.d_model or _d_model(described)
    stores = range(len(spec.stores))
    cells = [cell for number in stores for cell in cells_to_come(spec, d_model, number)]
    kernels: KernelKind = "cpu" if device.name == "cpu" else "cuda"
    memory = device.memory * (CPU_SHARE if kernels == "cpu" else GPU_SHARE)
    process = PROCESS_BYTES if kernels == "cpu" else 0  # which shares that memory
    network = Network(assumed.gpus_per_node, 1e9 * assumed.link_gb_s if assumed.link_gb_s else device.link,
                      1e9 * assumed.network_gb_s)  # fmt: skip

    def needs(pack: Sequence[Cell]) -> float:
        return pack_memory(pack, spec.eval.tokens, _STREAM, kernels).total + process

    def cluster_of(count: int) -> Cluster:
        return Cluster(count, assumed.gpus_per_node, 3600 * assumed.mtbf_hours, assumed.restart_s, assumed.repair_s,
                       spec.resources.checkpoint_every_s)  # fmt: skip

    def on_mesh(cell: Cell, layout: Layout) -> float:
        return pack_memory([cell], spec.eval.tokens, _STREAM, kernels, layout=layout).total + process

    # As the driver does it.
    check_meshes(spec.planned, spec.resources)
    workers = max(1, gpus - 1) if described.harvested else gpus  # the others harvest, one at least
    layouts = plan_meshes(cells, spec.resources, workers, memory, needs, on_mesh)
    alone = [cell for cell in cells if cell.cell_id not in layouts]
    meshed = [
        (cell, step_on(cell, layout, on_mesh(cell, layout), device, network))
        for cell in cells
        if (layout := layouts.get(cell.cell_id)) is not None
    ]
    for cell, step in meshed:
        if step.bytes > memory:
            raise SaescaleError(
                f"cell {cell.cell_id} takes {step.bytes / 2**30:,.0f} GiB of each process on a mesh of {step.mesh} and "
                f"a {device.name} has {memory / 2**30:.0f}: give more shards (resources.mesh)"
            )
    flops = BATCH_FLOPS[kernels]

    def planned(count: int) -> tuple[tuple[Group, ...], Outcome]:
        packs = pack_cells(alone, {}, max(1, min(count, len(alone))), memory, needs, flops) if alone else []
        groups = [pack_of(described, device, pack, needs(pack)) for pack in packs]
        groups += [gang_of(described, device, cell, step) for cell, step in meshed]
        groups.sort(key=lambda group: -sum(cost(cell) for cell in group.cells))
        quiet = cluster_of(count)._replace(mtbf_s=math.inf)
        _require_room(groups, count, gpus)
        return tuple(groups), simulate([group.job for group in groups], quiet, np.random.default_rng(0))

    harvest_s = _harvest_s(described, device, cells) if described.harvested else 0.0
    harvesters = _harvesters(harvest_s, gpus, meshed, lambda count: planned(count)[1].seconds)
    groups, quiet = planned(gpus - harvesters)
    cluster = cluster_of(gpus - harvesters)
    count = max(_FEW, min(_COURSES, _EVENTS // len(groups)))
    found = courses([group.job for group in groups], cluster, count, seed)
    # A harvest that cannot keep pace is what the sweep waits for.
    least = harvest_s / harvesters if harvesters else 0.0
    hours = np.sort([max(course.seconds, least) for course in found]) / 3600
    return ClusterPlan(described, device, d_model, gpus, harvesters, harvest_s, groups, cluster, quiet, hours, found)


def _d_model(described: Described) -> int:
    """Of the sweep's store. Raises SaescaleError where it cannot be read."""
    from saescale.cluster.sweep.stores import open_stores

    hint = "say what it has, as --assume d_model=768"
    if described.spec.lives:
        raise SaescaleError(f"the width of a live source's subject is not known before it is loaded; {hint}")
    try:
        widths = {store.d_model for store in open_stores(described.spec)}
    except SaescaleError as error:
        raise SaescaleError(f"{error}; to plan without its store {hint}") from error
    if len(widths) > 1:
        raise SaescaleError(f"the stores are {', '.join(map(str, sorted(widths)))} wide; plan for one width: {hint}")
    return widths.pop()


def _require_room(groups: Sequence[Group], count: int, gpus: int) -> None:
    most = max(group.job.gpus for group in groups)
    if most > count:
        beside = f" beside {gpus - count} for the harvest" if count < gpus else ""
        raise SaescaleError(f"a cell needs a mesh of {most} GPUs, and there are {count}{beside}: give more (--gpus)")


def _harvesters(harvest_s: float, gpus: int, meshed: Sequence[Any], seconds: Any) -> int:
    """Devices to set apart for a live harvest, so that both take about equally long."""
    if not harvest_s:
        return 0
    if gpus < 2:
        raise SaescaleError("a live source needs a GPU for its harvest beside those that train: give more (--gpus)")
    most = gpus - max((step.mesh.ranks for _, step in meshed), default=1)
    if most < 1:
        raise SaescaleError(
            f"a cell needs a mesh of {gpus - most} GPUs, and its live source one or more besides; there are {gpus}: "
            "give more (--gpus)"
        )
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if harvest_s / middle <= seconds(gpus - middle):
            high = middle
        else:
            low = middle + 1
    return low


def _harvest_s(described: Described, device: Device, cells: Sequence[Cell]) -> float:
    """Of one device: a forward pass of the subject over every activation once, 2 FLOPs a parameter."""
    if described.assumed.parameters is None:
        raise SaescaleError("a live source is harvested while the cells train: say how large its subject is, such as "
                            "--assume parameters=1.24e8")  # fmt: skip
    flops = 2 * described.assumed.parameters * rows_of(described, cells) * len(described.harvested)
    return flops / (device.rates.products * described.assumed.harvest_share)
