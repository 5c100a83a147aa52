"""What `saescale plan --cluster` shows."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from saescale.cluster.front.console import console, say, table
from saescale.scaling.planning.devices import Device
from saescale.scaling.words import counted
from saescale.storage.errors import SaescaleError

_MOST_GPUS = 100_000


def plan_for_cluster(url: str, device: Device, gpus: int | None, assume: Sequence[str], as_json: bool) -> None:
    """Plans, and prints it with its error against runs that were measured. Raises SaescaleError."""
    from saescale.cluster.sweep.assumed import describe
    from saescale.cluster.sweep.cluster_plan import plan_cluster
    from saescale.cluster.sweep.held import held_to_runs

    count = 8 if gpus is None else gpus
    if not 0 < count <= _MOST_GPUS:
        raise SaescaleError(f"--gpus {count}: give a number from 1 to {_MOST_GPUS:,}")
    document = plan_cluster(describe(url, assume), device, count).document()
    document["held"] = [row._asdict() for row in held_to_runs()]
    if as_json:
        print(json.dumps(document))
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    device = document["device"]
    console.print(_groups(document["groups"]))
    hours, disk, network = document["hours"], document["disk"], document["network"]
    harvest = document["harvest_gpus"]
    harvesting = f", {harvest} more harvest meanwhile ({_figure(document['harvest_gpu_hours'])} GPU hours)"
    idle = f", {document['idle_gpus']} of which have nothing to do" if document["idle_gpus"] else ""
    beside = harvesting if harvest else ""
    say(f"\n{counted(document['cells'], 'cell')} on {document['gpus'] - harvest} {device['name']}{idle}{beside}")
    say(
        f"hours: {_figure(hours['median'])} ({_figure(hours['low'])} to {_figure(hours['high'])} in 90 % of "
        f"{hours['courses']} simulated courses; {_figure(document['hours_without_failures'])} if nothing fails); "
        f"{_figure(document['failures'])} jobs hit by failures, which cost {_figure(document['lost_gpu_hours'])} GPU "
        "hours of work"
    )
    say(
        f"work: {document['flops']:.3g} sparse training FLOPs, as if no latent died; {_figure(document['gpu_hours'])} "
        f"GPU hours at {device['flops_per_s']:.3g} FLOP/s ({device['share']:.0%} of the peak), {device['speed_from']}"
    )
    if waiting := document["waiting_gpu_hours"]:
        gives = document["assumed"]["disk_gb_s"]["value"]
        say(
            f"waiting: {_figure(waiting)} of these GPU hours for activations, of which a process gets {gives:g} GB/s "
            "(--assume disk_gb_s=...)"
        )
    say(f"memory: {_bytes(document['memory_per_gpu'])} of {_bytes(device['memory'])} a GPU")
    say(
        f"disk at once: {_bytes(disk['source'])} of activations, {_bytes(disk['checkpoints'])} of checkpoints, "
        f"{_bytes(disk['results'])} of results"
    )
    say(
        f"network in all: {_bytes(network['source'])} of activations, {_bytes(network['checkpoints'])} of checkpoints, "
        f"{_bytes(network['mesh'])} within meshes"
    )
    best = document["best_checkpoint_every_s"]
    say(f"checkpoints: every {document['checkpoint_every_s']:g} s of work; the least is lost at every {best:,.0f} s")
    assumed = table("assumed", "", "from")
    assumed.columns[2].justify = "left"
    for name, row in document["assumed"].items():
        assumed.add_row(name, f"{row['value']:,.6g}", row["from"])
    console.print(assumed)
    if not document["held"]:
        say("No measured run is at hand to hold this to: run it from a checkout of the repository")
        return
    held = table("held to runs: predicted / measured", "constants from", "cells", "in all", "median", "90 % of cells")
    for row in document["held"]:
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        numbers = (str(row["cells"]), f"{row['ratio']:.2f}", f"{row['median']:.2f}", spread)
        held.add_row(f"{row['run']} ({row['seconds']:,.0f} s)", row["constants_from"], *numbers)
    console.print(held)


def _groups(groups: Sequence[dict[str, Any]]) -> Any:
    """Rows of cells of one N on one kind of mesh, shards x replicas."""
    rows: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        largest = max(cell[0] for cell in group["cells"])
        rows[largest, group["mesh"]["shards"], group["mesh"]["replicas"]].append(group)
    # Narrow enough for 80 columns. Reading goes on beside a step: above 100 % it is waited for.
    shown = table("n up to", "k", "in packs", "mesh", "GiB a GPU", "ms a step", "network", "reading", "GPU hours")
    for column in shown.columns[:4]:
        column.no_wrap = True
    for (n, shards, replicas), of in sorted(rows.items()):
        ks = sorted({cell[1] for group in of for cell in group["cells"]})
        k = str(ks[0]) if len(ks) == 1 else f"{ks[0]} to {ks[-1]}"
        steps = sum(group["step_s"] * group["steps"] for group in of)
        network = sum(group["network_s"] * group["steps"] for group in of) / steps
        mean = 1000 * steps / sum(group["steps"] for group in of)
        reading = sum(group["read_s"] * group["steps"] for group in of) / steps
        memory = max(group["memory_per_gpu"] for group in of) / 2**30
        spent = sum(group["hours"] for group in of) * shards * replicas
        cells = sum(len(group["cells"]) for group in of)
        shown.add_row(
            f"{n:,}", k, f"{cells} in {len(of)}", f"{shards} x {replicas}", f"{memory:,.1f}", _figure(mean),
            f"{network:.0%}", f"{reading:.0%}", _figure(spent),
        )  # fmt: skip
    return shown


def _figure(amount: float) -> str:
    """Three digits of it, and no exponent."""
    return f"{float(f'{amount:.3g}'):,.12g}"


def _bytes(amount: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if amount >= size:
            return f"{amount / size:,.3g} {unit}"
    return f"{amount / 1e6:,.3g} MB"
