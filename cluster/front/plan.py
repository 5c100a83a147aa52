"""The command that plans: which cells to train next."""

import json
import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saescale.cluster.front.console import ArchitectureFile, Json, command, console, say, table, use_architectures
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.sweep.proposal import Proposal
    from saescale.cluster.sweep.reach import ReachPlan

_MOST = 1e18  # tokens, hours, FLOP/s


def plan(
    source: Annotated[
        str | None, typer.Argument(help="A run or table to plan from (default: the published law of GPT-4's SAEs).")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time on one device: 200h, 90min or 2d.")] = "24h",
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100, l40s, rtx4090 or cpu.")] = "h100",
    target: Annotated[
        str, typer.Option(help="What to narrow: exponent, floor, prediction (with --at) or coefficients.")
    ] = "exponent",
    at: Annotated[
        str | None, typer.Option(help="The cell to predict (n=65536,k=64), or the k of an exponent or floor (k=32).")
    ] = None,
    write: Annotated[str | None, typer.Option(help="The sweep file to write (default: only shown).")] = None,
    store: Annotated[str | None, typer.Option(help="Activation store to name in the sweep file.")] = None,
    d_model: Annotated[int, typer.Option(help="Where the source does not say it.", min=1, max=2**20)] = 768,
    tokens: Annotated[
        float, typer.Option(help="Tokens of a cell of n = 32768, without a source; they grow as n^0.6.")
    ] = 1e9,
    n_min: Annotated[int | None, typer.Option(help="Smallest n; the others double from it.", min=2)] = None,
    n_max: Annotated[int | None, typer.Option(help="Largest n.", min=2)] = None,
    k: Annotated[list[int] | None, typer.Option(help="A k that cells may have; repeatable.", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="At most so many new cells of one n and k.", min=1)] = 3,
    noise: Annotated[float | None, typer.Option(help="Scatter of ln nmse between cells, if you know it.")] = None,
    flops_per_s: Annotated[float | None, typer.Option(help="Sparse training FLOP/s that the device sustains.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Plan the least compute for a value of this metric, as downstream_loss.ce.")
    ] = None,
    within: Annotated[
        str | None, typer.Option(help="With --metric: how near to what a lossless SAE would have, as 1%.")
    ] = None,
    reach: Annotated[float | None, typer.Option(help="With --metric: the value to reach.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A sweep file, or a description (deploy/plans): what does it take on a cluster?")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="With --cluster: how many, 8 without.")] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="With --cluster: NAME=VALUE in place of what is assumed; repeatable.")
    ] = None,
    architecture_file: ArchitectureFile = None,
    as_json: Json = False,
) -> None:
    """Proposes the cells (n, k, tokens, seeds) that narrow an interval the most within a budget.

    Example: [bold]saescale plan runs/quickstart --budget 1h --gpu cpu --write more.yaml[/]

    With --metric: which (n, k) is good enough for the least training compute, whatever the budget.

    Example: [bold]saescale plan runs/quickstart --metric downstream_loss.ce --within 1% --gpu cpu[/]

    With --cluster: hours, memory, disk and network of a sweep on GPUs of nodes that fail now and then.

    Example: [bold]saescale plan --cluster sweep.yaml --gpu h100 --gpus 64[/]
    """
    from saescale.cluster.front.cluster_plan import plan_for_cluster
    from saescale.cluster.sweep.propose import Request, make_proposal, sweep_of, write_proposal
    from saescale.cluster.sweep.reach import make_reach
    from saescale.cluster.sweep.spec import NO_STORE
    from saescale.scaling.laws.predict import parse_point
    from saescale.scaling.planning.devices import find_device
    from saescale.storage.files import join
    from saescale.storage.writable import require_lasting, require_writable

    use_architectures(architecture_file)
    for name, value in (("tokens", tokens), ("flops-per-s", flops_per_s)):
        if value is not None and not 0 < value < _MOST:
            raise SaescaleError(f"--{name} {value:g}: give a number above 0 and below {_MOST:g}")
    if cluster is not None:
        _require_alone(source, metric, write, target, at)
        plan_for_cluster(cluster, find_device(gpu, flops_per_s), gpus, assume or (), as_json)
        return
    if gpus is not None or assume:
        raise SaescaleError("--gpus and --assume are of a cluster: name the sweep with --cluster SWEEP.yaml")
    request = Request(
        hours=_hours(budget), device=find_device(gpu, flops_per_s), target=target, source=source, store=store,
        at=parse_point(at) if at else {}, d_model=d_model, tokens=tokens, n_range=(n_min, n_max), ks=tuple(k or ()),
        noise=noise, seeds=seeds,
    )  # fmt: skip
    if (within is not None or reach is not None) and metric is None:
        raise SaescaleError("--within and --reach are of a metric: name it with --metric, such as downstream_loss.ce")
    if within is not None and reach is not None:
        raise SaescaleError("--within and --reach say two things to reach: give one of them")
    if write:
        require_lasting(write)
        require_writable(os.path.dirname(write) or ".")
    made: Proposal | ReachPlan
    if metric is None:
        made = make_proposal(request)
    else:
        made = make_reach(request, metric, None if within is None else _share(within), reach)
    document = made.document()
    if write:
        write_proposal(made, write)
    if as_json:
        print(json.dumps(document))
        return
    _show(document) if metric is None else _show_reach(document)
    # Cells of a run are added to its sweep: by themselves they would be another sweep in the same directory.
    run = source if source and sweep_of(source) else None
    file = write or "plan.yaml"
    next_ = command("sweep", join(run, "sweep.yaml"), "--extend", file) if run else command("sweep", file)
    edit = f" (edit its store first: {NO_STORE})" if made.spec.store == NO_STORE else ""
    if write:
        say(f"wrote {write}")
        say(f"Next: {next_}{edit}")
    else:
        say(f"Next: the same with --write {shlex.quote(file)}, then {next_}{edit}")


def _require_alone(source: str | None, metric: str | None, write: str | None, target: str, at: str | None) -> None:
    """Raises SaescaleError where --cluster stands beside what chooses cells."""
    if source or metric or write or at or target != "exponent":
        raise SaescaleError(
            "--cluster SWEEP.yaml says what the cells of that sweep take; it goes with --gpu, --gpus, --assume, "
            "--flops-per-s and --json alone"
        )


def _share(text: str) -> float:
    """`1%` or `0.01` as 0.01. Raises SaescaleError."""
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise SaescaleError(f"--within {text} is no share; write such as 1% or 0.01")
    return found


def _hours(text: str) -> float:
    """`200h`, `90min` or `2d` in hours; a bare number is hours. Raises SaescaleError."""
    for unit, hours in (("min", 1 / 60), ("h", 1.0), ("d", 24.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                found = float(text.removesuffix(unit)) * hours
            except ValueError:
                break
            if 0 < found < _MOST:
                return found
            break
    raise SaescaleError(f"--budget {text} is no time; write such as 200h, 90min or 2d")


def _show_reach(document: dict[str, Any]) -> None:
    """What reaches the target at each k, and which of it takes the least compute."""
    say(f"To have {document['reach']}, by {document['prior']['from']}")
    shown = table("k", "n", "there", "a new cell, 95 %", "tokens", "FLOPs (sparse)", "hours", "n for 97.5 %", "FLOPs")
    for way in document["ways"]:
        if way["n_latents"] is None:
            shown.add_row(str(way["k"]), "none", *[""] * 7)
            continue
        ends = "" if way["low"] is None else f"{way['low']:.4g} to {way['high']:.4g}"
        sure = ("none", "") if way["sure"] is None else (f"{way['sure']:,}", f"{way['sure_flops']:.3g}")
        numbers = (f"{way['tokens']:,}", f"{way['flops']:.3g}", f"{way['hours']:.3g}")
        shown.add_row(str(way["k"]), f"{way['n_latents']:,}", f"{way['value']:.4g}", ends, *numbers, *sure)
    console.print(shown)
    best, surest = document["best"], document["surest"]
    far = f"; n is {best['beyond']:.3g} times the largest that was fitted" if best["beyond"] > 1 else ""
    say(f"Least compute by the law: n = {best['n_latents']:,}, k = {best['k']}, {best['flops']:.3g} FLOPs{far}")
    if surest:
        text = f"n = {surest['sure']:,}, k = {surest['k']}, {surest['sure_flops']:.3g} FLOPs"
        say(f"So that a new cell reaches it in 97.5 % of cases: {text}")


def _show(document: dict[str, Any]) -> None:
    device = document["device"]
    say(f"Prior: {document['prior']['from']}")
    shown = table("n", "k", "seeds", "tokens", "FLOPs (sparse)", "hours")
    for cell in document["cells"]:
        seeds = ", ".join(map(str, cell["seeds"]))
        numbers = (f"{cell['tokens']:,}", f"{cell['flops']:.3g}", f"{cell['hours']:.3g}")
        shown.add_row(f"{cell['n_latents']:,}", str(cell["k"]), seeds, *numbers)
    console.print(shown)
    stores = document["stores"]
    count = stores * sum(len(cell["seeds"]) for cell in document["cells"])
    cells = f"{count} cells over {stores} stores" if stores > 1 else f"{count} cells"
    console.print(
        f"\n{cells} in {stores * len(document['packs'])} packs, {document['hours']:.3g} h on one "
        f"{device['name']} at {device['flops_per_s']:.3g} sparse training FLOP/s, {device['speed_from']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    rectangle = document["rectangle"]
    columns = [("before", document["before"]), ("with the plan", document["expected"])]
    columns.append(("best full grid", rectangle and rectangle["expected"]))
    expected = table("95 % interval to expect", "value", *(name for name, _ in columns))
    for i, row in enumerate(document["expected"]):
        halves = ["" if not rows else f"± {(rows[i]['high'] - rows[i]['low']) / 2:.3g}" for _, rows in columns]
        expected.add_row(row["quantity"], f"{row['value']:.3g}", *halves)
    console.print(expected)
    if rectangle:
        console.print(f"best full grid: {rectangle['cells']} cells, {rectangle['hours']:.3g} h", highlight=False)
