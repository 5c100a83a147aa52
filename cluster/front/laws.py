"""The commands about laws: fit, plan, reproduce. Each imports what it needs when it runs."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from saescale.storage.errors import SaescaleError

console = Console()

Bootstraps = Annotated[int, typer.Option(help="Bootstrap fits behind each interval.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document alone on stdout.")]


def fit(
    sources: Annotated[
        list[str],
        typer.Argument(help="Run directories, CSV or Parquet tables, wandb:entity/project; several are put together."),
    ],
    law: Annotated[
        list[str] | None,
        typer.Option(help="n_k, n, c, n_d, n_s, n_of_c, d_of_c, n_flattens, n_steepens or your own; repeatable."),
    ] = None,
    law_file: Annotated[
        list[str] | None, typer.Option(help="A Python file that registers laws of your own; repeatable.")
    ] = None,
    predict: Annotated[
        list[str] | None, typer.Option(help="Predict nmse there, such as n=65536,k=64; repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for fits.json (default: only shown).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The document of fits.json alone on stdout.")] = False,
    bootstraps: Bootstraps = 1000,
) -> None:
    """Fits the scaling laws to a run or to a table of results, and predicts cells that were not trained.

    Example: [bold]saescale fit runs/quickstart --law n_k --predict n=16384,k=32[/]
    """
    from saescale.cluster.front.display import coefficient_table
    from saescale.scaling.laws.fit import fit_laws, fit_notes
    from saescale.scaling.laws.known import load_laws
    from saescale.scaling.laws.predict import parse_point, predictions
    from saescale.scaling.laws.settings import DEFAULT_LAWS, FitSettings
    from saescale.scaling.sources import load_sources
    from saescale.storage.rundir import RunDirectory

    own = tuple(dict.fromkeys(found.name for path in law_file or () for found in load_laws(path)))
    asked = (*(law or ()), *(name for name in own if name not in (law or ())))
    points = [parse_point(text) for text in predict or ()]
    settings = FitSettings(bootstraps, laws=asked or DEFAULT_LAWS)
    fitted = fit_laws(*load_sources(sources, _read_wandb), settings)
    document = fitted.document()
    if points and fitted.fits:
        document["predictions"] = [row for point in points for row in predictions(fitted.fits, point)]
    if out:
        RunDirectory(out).write_json("fits.json", document)
    if as_json:
        print(json.dumps(document))
    else:
        if document["fits"]:
            console.print(coefficient_table(document))
        if "predictions" in document:
            _show_predictions(document["predictions"])
        _show_convergence(document["tokens_to_convergence"])
        show_notes([*fit_notes(document), *_comparisons(document, (*asked, "n_k"))])
    named = " ".join(sources)
    if asked and not document["fits"]:
        raise SaescaleError(f"{named}: {document['skipped'][0]['reason']}")
    if points and not document["fits"]:
        raise SaescaleError(f"{named}: no law could be fitted, so nothing is predicted; see saescale fit {named}")
    if as_json:
        return
    if out:
        console.print(f"wrote {out}/fits.json", highlight=False)
        console.print(f"Next: saescale fit {named}", highlight=False, soft_wrap=True)
        return
    # A plan adds to a run or a table, not to a W&B project.
    planned = next((source for source in sources if not source.startswith("wandb:")), None)
    next_ = f"plan {planned} --budget 1h --gpu cpu" if points and planned else f"fit {named} --json"
    console.print(f"Next: saescale {next_}", highlight=False, soft_wrap=True)


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
    d_model: Annotated[int, typer.Option(help="Where the source does not say it.", min=1)] = 768,
    tokens: Annotated[
        float, typer.Option(help="Tokens of a cell of n = 32768, without a source; they grow as n^0.6.")
    ] = 1e9,
    n_min: Annotated[int | None, typer.Option(help="Smallest n; the others double from it.", min=2)] = None,
    n_max: Annotated[int | None, typer.Option(help="Largest n.", min=2)] = None,
    k: Annotated[list[int] | None, typer.Option(help="A k that cells may have; repeatable.", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="At most so many new cells of one n and k.", min=1)] = 3,
    noise: Annotated[float | None, typer.Option(help="Scatter of ln nmse between cells, if you know it.")] = None,
    flops_per_s: Annotated[float | None, typer.Option(help="Sparse training FLOP/s that the device sustains.")] = None,
    as_json: Json = False,
) -> None:
    """Proposes the cells (n, k, tokens, seeds) that narrow an interval the most within a budget.

    Example: [bold]saescale plan runs/quickstart --budget 1h --gpu cpu --write more.yaml[/]
    """
    from saescale.cluster.sweep.propose import Request, make_plan, sweep_of, write_plan
    from saescale.cluster.sweep.spec import NO_STORE
    from saescale.scaling.laws.predict import parse_point
    from saescale.scaling.planning.devices import find_device
    from saescale.storage.files import join

    request = Request(
        hours=_hours(budget), device=find_device(gpu, flops_per_s), target=target, source=source, store=store,
        at=parse_point(at) if at else {}, d_model=d_model, tokens=tokens, n_range=(n_min, n_max), ks=tuple(k or ()),
        noise=noise, seeds=seeds,
    )  # fmt: skip
    made = make_plan(request)
    document = made.document()
    if write:
        write_plan(made, write)
    if as_json:
        print(json.dumps(document))
        return
    _show_plan(document)
    # Cells of a run are added to its sweep: by themselves they would be another sweep in the same directory.
    run = source if source and sweep_of(source) else None
    file = write or "plan.yaml"
    next_ = f"saescale sweep {join(run, 'sweep.yaml')} --extend {file}" if run else f"saescale sweep {file}"
    edit = f" (edit its store first: {NO_STORE})" if made.spec.store == NO_STORE else ""
    if write:
        console.print(f"wrote {write}", highlight=False, soft_wrap=True)
        console.print(f"Next: {next_}{edit}", highlight=False, soft_wrap=True)
    else:
        console.print(f"Next: the same with --write {file}, then {next_}{edit}", highlight=False, soft_wrap=True)


def reproduce(
    name: Annotated[str, typer.Argument(help="chinchilla, gpt4-nk or quickstart.")],
    seeds: Annotated[int, typer.Option(help="Simulated sweeps of gpt4-nk.", min=1)] = 200,
    as_json: Json = False,
) -> None:
    """Fits published numbers again and compares, line by line; exits with 1 where one is not met.

    Example: [bold]saescale reproduce chinchilla[/]
    """
    from saescale.scaling.reproduce import reproduce as run

    found = run(name, seeds)
    if as_json:
        print(json.dumps(found.document()))
    else:
        table = _table("quantity", "expected", "found", "")
        for line in found.lines:
            table.add_row(line.quantity, line.expected, line.found, "[green]met[/]" if line.met else "[red]not met[/]")
        console.print(f"{found.title}\n", highlight=False, soft_wrap=True)
        console.print(table)
        console.print(f"Source: {found.source}", highlight=False, soft_wrap=True)
    if not found.met:
        raise typer.Exit(1)


def show_notes(notes: Sequence[str]) -> None:
    """What must be said beside numbers, a line each."""
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


def _read_wandb(path: str) -> Any:
    from saescale.cluster.front.wandb_source import read_project

    return read_project(path)


def _hours(text: str) -> float:
    """`200h`, `90min` or `2d` in hours; a bare number is hours. Raises SaescaleError."""
    for unit, hours in (("min", 1 / 60), ("h", 1.0), ("d", 24.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                found = float(text.removesuffix(unit)) * hours
            except ValueError:
                break
            if found > 0:
                return found
            break
    raise SaescaleError(f"--budget {text} is no time; write such as 200h, 90min or 2d")


def _show_predictions(rows: Sequence[dict[str, Any]]) -> None:
    from saescale.scaling.laws.fit import law_label

    table = _table("predicted by", "at", "value", "a new cell, 95 %", "the law, 95 %")
    for row in rows:
        at = ", ".join(f"{name} = {value:g}" for name, value in row["point"].items())
        ends = [
            "" if row[low] is None else f"{row[low]:.4g} to {row[high]:.4g}"
            for low, high in (("low", "high"), ("law_low", "law_high"))
        ]
        table.add_row(law_label(row), at, f"{row['value']:.4g}", *ends)
    console.print()
    console.print(table)
    show_notes(list(dict.fromkeys(f"prediction: {words}" for row in rows for words in row["far"])))


def _show_convergence(found: dict[str, Any] | None) -> None:
    if not found:
        return
    counts = f"{len(found['cells'])} cells converged, {found['unconverged']} did not"
    if early := found["converged_before_first_evaluation"]:
        counts += f", {early} converged before their first evaluation"
    if "reason" in found:
        console.print(f"tokens to convergence: {found['reason']}", highlight=False, soft_wrap=True)
        return
    g = found["exponent_of_n"]
    ends = "" if g["low"] is None else f" ({g['low']:.3g} to {g['high']:.3g})"
    console.print(
        f"tokens until nmse is within {found['within']:.0%} of its end grow as n^{g['value']:.3g}{ends}; {counts}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _comparisons(document: dict[str, Any], laws: Sequence[str]) -> list[str]:
    """Whether the last term is needed, of the named laws."""
    from saescale.scaling.laws.fit import law_label

    return [
        f"{law_label(entry)}: {entry['without_last_term']['words']}"
        for entry in document["fits"]
        if entry["law"] in laws and "without_last_term" in entry
    ]


def _show_plan(document: dict[str, Any]) -> None:
    device = document["device"]
    console.print(f"Prior: {document['prior']['from']}", highlight=False, soft_wrap=True)
    table = _table("n", "k", "seeds", "tokens", "FLOPs (sparse)", "hours")
    for cell in document["cells"]:
        seeds = ", ".join(map(str, cell["seeds"]))
        numbers = (f"{cell['tokens']:,}", f"{cell['flops']:.3g}", f"{cell['hours']:.3g}")
        table.add_row(f"{cell['n_latents']:,}", str(cell["k"]), seeds, *numbers)
    console.print(table)
    count = sum(len(cell["seeds"]) for cell in document["cells"])
    console.print(
        f"\n{count} cells in {len(document['packs'])} packs, {document['hours']:.3g} h on one {device['name']} at an "
        f"assumed {device['flops_per_s']:.3g} sparse training FLOP/s (--flops-per-s sets it)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    rectangle = document["rectangle"]
    columns = [("before", document["before"]), ("with the plan", document["expected"])]
    columns.append(("best full grid", rectangle and rectangle["expected"]))
    expected = _table("95 % interval to expect", "value", *(name for name, _ in columns))
    for i, row in enumerate(document["expected"]):
        halves = ["" if not rows else f"± {(rows[i]['high'] - rows[i]['low']) / 2:.3g}" for _, rows in columns]
        expected.add_row(row["quantity"], f"{row['value']:.3g}", *halves)
    console.print(expected)
    if rectangle:
        console.print(f"best full grid: {rectangle['cells']} cells, {rectangle['hours']:.3g} h", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
