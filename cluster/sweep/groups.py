"""Cells that train side by side, for a plan: a pack on one device, or one cell on a mesh, and how long it takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from saescale.cluster.sweep.assumed import Described
from saescale.cluster.sweep.sharding import Step
from saescale.cluster.sweep.work import work_of_step
from saescale.scaling.compute import forward_flops
from saescale.scaling.planning.devices import Device, Work
from saescale.scaling.planning.schedule import Job
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.traffic import Sent
from saescale.trainers.training.memory import weights_bytes


class Group(NamedTuple):
    """`step`: of a pack the memory of all its cells, and one step of each. `seconds` of training and evaluation without
    checkpoints and failures, `waiting_s` of it for batches; `state` bytes of their checkpoint, `sent` bytes that a
    mesh's processes send in all."""

    cells: tuple[Cell, ...]
    step: Step
    seconds: float
    waiting_s: float
    state: float
    sent: float
    read_s: float  # that a batch takes to come: no step is faster
    job: Job

    def document(self) -> dict[str, Any]:
        """As JSON."""
        mesh = {"shards": self.step.mesh.shards, "replicas": self.step.mesh.replicas}
        return {
            "cells": [[cell.n_latents, cell.k, cell.architecture, cell.seed] for cell in self.cells],
            "mesh": mesh, "memory_per_gpu": self.step.bytes, "steps": max(cell.steps for cell in self.cells),
            "step_s": self.step.seconds, "network_s": self.step.network_s, "read_s": self.read_s,
            "sent_per_step": {**self.step.sent._asdict()}, "hours": self.seconds / 3600, "checkpoint": self.state,
        }  # fmt: skip


def pack_of(described: Described, device: Device, pack: Sequence[Cell], taken: float) -> Group:
    """Cells that read one stream: a step lasts until all have done theirs, and no less than its batch takes to come;
    those with fewer steps leave early."""
    cells = sorted(pack, key=lambda cell: cell.steps)
    each = [device.seconds(work_of_step(cell)) for cell in cells]
    read = _read_s(described, cells[0])
    working, waiting, before = 0.0, 0.0, 0
    for i, cell in enumerate(cells):
        working += (cell.steps - before) * sum(each[i:])
        waiting += (cell.steps - before) * max(read - sum(each[i:]), 0.0)
        before = cell.steps
    return _group(described, device, cells, Step(Layout(), taken, Sent(), sum(each), 0.0), working, waiting, read)


def gang_of(described: Described, device: Device, cell: Cell, step: Step) -> Group:
    """One cell on a mesh, each process of which reads the whole batch."""
    read = _read_s(described, cell)
    waiting = cell.steps * max(read - step.seconds, 0.0)
    return _group(described, device, [cell], step, cell.steps * step.seconds, waiting, read)


def _read_s(described: Described, cell: Cell) -> float:
    return 2 * cell.d_model * cell.batch_tokens / (1e9 * described.assumed.disk_gb_s)


def _group(
    described: Described, device: Device, cells: Sequence[Cell], step: Step, working_s: float, waiting_s: float,
    read_s: float,
) -> Group:  # fmt: skip
    evaluating = sum(_evaluation_s(described, device, cell) for cell in cells) / step.mesh.ranks
    state = sum(4 * weights_bytes(cell) for cell in cells)  # parameters, two moments and the average
    seconds = working_s + waiting_s + evaluating
    written = state / step.mesh.shards / (1e9 * described.assumed.disk_gb_s)
    job = Job(described.assumed.pack_s + seconds, step.mesh.ranks, written)
    told = step.sent.bytes * step.mesh.ranks * cells[0].steps
    return Group(tuple(cells), step, seconds, waiting_s, state, told, read_s, job)


def _evaluation_s(described: Described, device: Device, cell: Cell) -> float:
    """Of all points of its curve."""
    settings = described.spec.eval
    pairs = cell.whole_settings.pairs_per_token(cell.n_latents) * settings.tokens
    flops = forward_flops(cell.d_model, cell.n_latents, tokens=settings.tokens, selected=round(pairs)).sparse
    decoding = min(2.0 * cell.d_model * pairs, flops)
    return max(1, cell.tokens // settings.every_tokens) * device.seconds(Work(flops - decoding, decoding))
