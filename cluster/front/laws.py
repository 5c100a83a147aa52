"""The commands about laws: fit, reproduce. Each imports what it needs when it runs."""

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from saescale.cluster.front.console import Bootstraps, Json, command, console, say, show_notes, table
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.front.wandb_source import Project
    from saescale.scaling.comparison.compare import SideBySide


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
        list[str] | None, typer.Option(help="A Python file that defines `forms`, a law of your own; repeatable.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="The laws of what saescale eval measured, such as downstream_loss.kl, in place of nmse; of a part of "
            "it board_probe.accuracy_x_hat@corner; repeatable."
        ),
    ] = None,
    predict: Annotated[
        list[str] | None, typer.Option(help="Predict nmse, or the metrics, there, such as n=65536,k=64; repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for fits.json (default: only shown).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The document of fits.json alone on stdout.")] = False,
    bootstraps: Bootstraps = 1000,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Fit these cells alone: architecture=topk, k>=16, cell_id!=3f2a91; repeatable."),
    ] = None,
    keep_diverged: Annotated[
        bool, typer.Option("--keep-diverged", help="Fit cells with nmse above 1 too; else they are left out and named.")
    ] = False,
) -> None:
    """Fits the scaling laws to a run or to a table of results, and predicts cells that were not trained.

    Example: [bold]saescale fit runs/quickstart --law n_k --predict n=16384,k=32[/]

    Of a metric: [bold]saescale fit runs/quickstart --metric downstream_loss.kl[/]
    """
    from saescale.cluster.front.display import coefficient_table
    from saescale.scaling.comparison.compare import side_by_side
    from saescale.scaling.comparison.peaks import find_peaks
    from saescale.scaling.comparison.sentences import limits
    from saescale.scaling.laws.fit import fit_laws
    from saescale.scaling.laws.law import load_laws
    from saescale.scaling.laws.notes import fit_notes
    from saescale.scaling.laws.over_metrics import fit_metrics, require_metrics
    from saescale.scaling.laws.predict import metric_predictions, parse_point, predictions
    from saescale.scaling.laws.settings import DEFAULT_LAWS, FitSettings
    from saescale.scaling.report.metrics import peak_documents, peak_sentences
    from saescale.scaling.sources import load_evals, load_sources
    from saescale.scaling.where import parse_condition
    from saescale.scaling.words import listed
    from saescale.storage.rundir import RunDirectory
    from saescale.storage.writable import require_lasting, require_writable

    own = tuple(dict.fromkeys(found.name for path in law_file or () for found in load_laws(path)))
    asked = (*(law or ()), *(name for name in own if name not in (law or ())))
    points = [parse_point(text) for text in predict or ()]
    settings = FitSettings(bootstraps, laws=asked or DEFAULT_LAWS, keep_diverged=keep_diverged)
    conditions = [parse_condition(text) for text in where or ()]
    if out:
        require_lasting(out)
        require_writable(out)
    project = functools.cache(_read_wandb)  # cells and metrics are asked for one after the other
    results, curves = load_sources(sources, lambda path: project(path)[:2], conditions)
    evals = load_evals(sources if metric else (), lambda path: project(path).evals)
    require_metrics(metric or (), results, evals)  # before anything is fitted
    fitted = fit_laws(results, curves, settings)
    of_metrics = fit_metrics(fitted, evals, metric, settings) if metric else ()
    sides = side_by_side(fitted, curves)
    document = fitted.document() | sides.document()
    if points and fitted.fits:
        rows = [row for point in points for row in predictions(fitted.fits, point, fitted.results)]
        document["predictions"] = rows
    peaks = find_peaks(of_metrics)
    if of_metrics:
        document["metrics"] = [found.document() for found in of_metrics]
        document["peaks"] = peak_documents(peaks)
    if of_metrics and points and any(found.fits for found in of_metrics):
        document["predictions"] = [row for point in points for row in metric_predictions(of_metrics, point)]
    if out:
        RunDirectory(out).write_json("fits.json", document)
    if as_json:
        print(json.dumps(document))
    elif of_metrics:
        _show_metrics(document)
        for sentence in peak_sentences(peaks):
            say(sentence)
    else:
        if document["fits"]:
            console.print(coefficient_table(document))
        if "predictions" in document:
            _show_predictions(document["predictions"])
        for found in _each(document["tokens_to_convergence"]):
            _show_convergence(found)
        _show_rates(document)
        _show_side_by_side(sides)
        limited = limits(sides.comparisons)
        show_notes([*limited, *fit_notes(document), *_comparisons(document, (*asked, "n_k"))])
    if of_metrics and not any(found.fits for found in of_metrics):
        named = listed(dict.fromkeys(found.name for found in of_metrics), ", ")
        reasons = dict.fromkeys(entry.reason for found in of_metrics for entry in found.skipped)
        raise SaescaleError(f"{fitted.results.source}: no law of {named} could be fitted: {next(iter(reasons))}")
    if not of_metrics and not document["fits"] and not sides.comparisons:
        named = fitted.results.source
        reason = document["skipped"][0]["reason"].removeprefix(f"{named}: ")
        raise SaescaleError(f"{named}: no law could be fitted: {reason}")
    if as_json:
        return
    if out:
        say(f"wrote {out}/fits.json")
        say(f"Next: {command('fit', *sources)}")
        return
    # A plan adds to a run or a table, not to a W&B project.
    planned = next((source for source in sources if not source.startswith("wandb:")), None)
    next_ = ("plan", planned, "--budget", "1h", "--gpu", "cpu") if points and planned else ("fit", *sources, "--json")
    say(f"Next: {command(*next_)}")


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
        shown = table("quantity", "expected", "found", "")
        for line in found.lines:
            shown.add_row(line.quantity, line.expected, line.found, "[green]met[/]" if line.met else "[red]not met[/]")
        say(f"{found.title}\n")
        console.print(shown)
        say(f"Source: {found.source}")
    if not found.met:
        raise typer.Exit(1)


def _read_wandb(path: str) -> "Project":
    from saescale.cluster.front.wandb_source import read_project

    return read_project(path)


def _show_metrics(document: dict[str, Any]) -> None:
    """The laws of each metric, with what must be said of them."""
    from saescale.cluster.front.display import coefficient_table
    from saescale.scaling.laws.notes import about, fit_notes, metric_document

    names = list(dict.fromkeys(entry["metric"] for entry in document["metrics"]))
    notes = []
    for name in names:
        own = metric_document(document["metrics"], name)
        say(f"{name}, {own['better']} is better; laws are of {own['fitted']}\n")
        if own["fits"]:
            console.print(coefficient_table(own))
        own_notes = [*fit_notes(own), *_comparisons(own, ("n_k",))]
        notes += [about(name, note) if len(names) > 1 else note for note in own_notes]
    if "predictions" in document:
        _show_predictions(document["predictions"])
    show_notes(notes)


def _show_side_by_side(sides: "SideBySide") -> None:
    """Architectures in their order, and laws over depth."""
    from saescale.scaling.comparison.sentences import hierarchy, outcome
    from saescale.scaling.kinds import kind_label
    from saescale.scaling.report.side_by_side import depth_table, heading, overall_table

    shown = [(heading(found), overall_table(found, one_k=True)) for found in sides.comparisons]
    if over_depth := depth_table(sides.depth):
        shown.append((over_depth.title, over_depth))
    for title, found in shown:
        lines = table(*found.header)
        for row in found.rows:
            lines.add_row(*map(escape, row))
        say(f"\n{title}\n")
        console.print(lines)
    for comparison in sides.comparisons:
        where = kind_label(comparison.arms.of)
        for sentence in (*outcome(comparison), *(f"{where}: {s}" if where else s for s in hierarchy(comparison))):
            say(sentence)


def _show_predictions(rows: Sequence[dict[str, Any]]) -> None:
    from saescale.scaling.laws.notes import law_label

    several = len({row.get("predicts") for row in rows}) > 1
    shown = table("predicted by", "at", "value", "a new cell, 95 %", "the law, 95 %")
    for row in rows:
        at = ", ".join(f"{name} = {value:g}" for name, value in row["point"].items())
        ends = [
            "" if row[low] is None else f"{row[low]:.4g} to {row[high]:.4g}"
            for low, high in (("low", "high"), ("law_low", "law_high"))
        ]
        label = f"{row['predicts']}: {law_label(row)}" if several else law_label(row)
        shown.add_row(label, at, f"{row['value']:.4g}", *ends)
    console.print()
    console.print(shown)
    show_notes(list(dict.fromkeys(f"prediction: {words}" for row in rows for words in row["far"])))


def _each(found: Any) -> list[dict[str, Any]]:
    """Of one kind of cells, or of those of several that have a law: the others would be a page of reasons."""
    if isinstance(found, list):
        return [entry for entry in found if "reason" not in entry]
    return [found] if found else []


def _kind(found: dict[str, Any]) -> str:
    from saescale.scaling.kinds import kind_label

    label = kind_label(found.get("of", {}))
    return f"{label}: " if label else ""


def _show_rates(document: dict[str, Any]) -> None:
    """The law of the best rate of each kind of cells, and whether the rate of small cells does for large ones."""
    from saescale.scaling.laws.notes import rate_rows

    rows = rate_rows(document)
    if not rows:
        return
    kinds = any(row[0] for row in rows)
    shown = table(*(("kind of cells",) if kinds else ()), "best rate at k", "~ N^", "~ k^", "smallest N's at largest N")
    for row in rows:
        shown.add_row(*(row if kinds else row[1:]))
    console.print()
    console.print(shown)


def _show_convergence(found: dict[str, Any]) -> None:
    counts = f"{len(found['cells'])} cells converged, {found['unconverged']} did not"
    if early := found["converged_before_first_evaluation"]:
        counts += f", {early} converged before their first evaluation"
    if "reason" in found:
        say(f"{_kind(found)}tokens to convergence: {found['reason']}")
        return
    g = found["exponent_of_n"]
    ends = "" if g["low"] is None else f" ({g['low']:.3g} to {g['high']:.3g})"
    console.print(
        f"{_kind(found)}tokens until nmse is within {found['within']:.0%} of its end grow as "
        f"n^{g['value']:.3g}{ends}; {counts}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _comparisons(document: dict[str, Any], laws: Sequence[str]) -> list[str]:
    """Of the named laws whether they need their last term, and that they fit where no warning says otherwise."""
    from saescale.scaling.laws.notes import law_label

    return [
        f"{law_label(entry)}: {entry[key]['words']}"
        for entry in document["fits"]
        for key in ("lack_of_fit", "without_last_term")
        if entry["law"] in laws and key in entry and not entry[key].get("significant")
    ]
