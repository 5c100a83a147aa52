"""From a run directory to fits.json, figures and a report: one self-contained HTML page, or Markdown."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import jinja2
import pyarrow as pa
import xxhash
from markupsafe import Markup

from saescale.scaling.comparison.compare import SideBySide, side_by_side
from saescale.scaling.comparison.disagree import find_disagreements
from saescale.scaling.comparison.peaks import find_peaks
from saescale.scaling.comparison.sentences import limits
from saescale.scaling.figures.figures import MOST_KINDS, Figure, Part, draw_figures, parts_of
from saescale.scaling.figures.interactive import theme
from saescale.scaling.figures.palette import colour
from saescale.scaling.figures.views_metrics import leading
from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.fit import FORMAT, describe_input, fit_laws
from saescale.scaling.laws.notes import fit_notes, kinds_of_document
from saescale.scaling.laws.over_metrics import DEFAULT, distinct_metrics, fit_metrics, nmse_scatter
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import declared
from saescale.scaling.order import in_order
from saescale.scaling.report import text
from saescale.scaling.report.evaluations import evaluation_tables
from saescale.scaling.report.metrics import (
    metric_notes,
    metric_sentences,
    metric_tables,
    peak_documents,
    peak_sentences,
)
from saescale.scaling.report.side_by_side import comparison_tables, depth_table, heading, said, summary
from saescale.scaling.tables import Table, load_curves, load_results
from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists, join, write_atomic
from saescale.storage.rundir import RunDirectory

Format = Literal["html", "md"]
REPORT = "report.html"
_SETTINGS = FitSettings()
_EVALUATED = "evaluations"  # a key of fits.json
FILES: dict[Format, str] = {"html": REPORT, "md": "report.md"}


class Analysis(NamedTuple):
    """What `analyse` made: the document of fits.json, the figures as they lie in figures/, the URLs of the reports."""

    document: dict[str, Any]
    figures: tuple[Figure, ...]
    reports: tuple[str, ...]

    def figure_files(self) -> dict[str, bytes]:
        """Every file of every figure, by its name in figures/."""
        return {name: content for figure in self.figures for name, content in figure.named_files().items()}


class Drawn(NamedTuple):
    """The figures of a run: which belong together, and what was drawn of them; and what is said of its metrics."""

    parts: tuple[Part, ...]
    figures: tuple[Figure, ...]
    said_of_metrics: Sequence[str] = ()
    tables_of_metrics: Sequence[text.TextTable] = ()
    notes_of_metrics: Sequence[str] = ()


class Section(NamedTuple):
    """A part of a report: sentences, figures and tables under one heading. `folded`: opened by the reader."""

    id: str
    title: str
    sentences: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[text.TextTable]
    folded: bool


def analyse(
    run: RunDirectory,
    settings: FitSettings = _SETTINGS,
    *,
    provenance: Mapping[str, Any] | None = None,
    formats: Sequence[Format] = ("html",),
) -> Analysis:
    """Fits the laws to a run's finished cells; writes figures/, the report and last fits.json into the run.

    `provenance` (subject, store fingerprint, versions ...) is shown in the report. `formats` are those of the report
    besides html, which is always written; so is Markdown that is there already. No report stays behind its fits.
    Deterministic. Raises SaescaleError when the run has no finished cell,
    for an unknown law, and when the run cannot be written.
    """
    results, curves = load_results(run), load_curves(run)
    results.require(("n_latents", "k"))
    fitted = fit_laws(results, curves, settings)
    sides = side_by_side(fitted, curves)
    document = fitted.document() | sides.document()
    evals = run.read_evals()
    metrics = fit_metrics(fitted, evals, distinct_metrics(fitted, evals), replace(settings, laws=DEFAULT))
    shown = leading(metrics)
    disagreements, peaks = find_disagreements(shown, nmse_scatter(fitted)), find_peaks(metrics)
    if metrics:
        document["metrics"] = [laws.document() for laws in metrics]
        document["disagreements"] = [found.document() for found in disagreements]
        document["peaks"] = peak_documents(peaks)
    parts = parts_of(fitted, sides, curves, metrics, evals)
    figures = draw_figures(parts, join(run.url, "figures"))
    written = [kind for kind in FILES if kind == "html" or kind in formats or exists(join(run.url, FILES[kind]))]
    document |= _evaluated(evals)
    said_of_metrics = [*peak_sentences(peaks), *metric_sentences(disagreements)]
    there = leading(metrics, lawful=False)
    of_metrics = said_of_metrics, metric_tables(metrics, there, peaks), metric_notes(document, shown)
    drawn = Drawn(tuple(parts), tuple(figures), *of_metrics)
    reports = write_report(run.url, document, fitted.results, evals, sides, drawn, provenance or {}, written)
    # Last, so that what fits.json says it was made from holds for the rest too.
    run.write_json("fits.json", document)
    return Analysis(document, tuple(figures), tuple(reports))


def is_current(run: RunDirectory, settings: FitSettings = _SETTINGS) -> bool:
    """Whether `analyse` with these arguments would write the fits and the report that are there already.

    False too where files are missing or damaged, or no cell is finished. Provenance and times do not count. Raises
    SaescaleError for an unknown law.
    """
    try:
        there = run.read_fits()
        if there is None or there.get("format") != FORMAT or not exists(join(run.url, REPORT)):
            return False
        if there.get(_EVALUATED) != _evaluated(run.read_evals()).get(_EVALUATED):
            return False
        results, curves = load_results(run), load_curves(run)
    except SaescaleError:
        return False
    return there.get("made_from") == describe_input(results, curves, settings)


def _evaluated(evals: pa.Table) -> dict[str, str]:
    """Which evaluations a report is of, for the document of fits.json; nothing where there are none."""
    content = f"{evals.to_pylist()} {declared(evals)}"
    return {_EVALUATED: xxhash.xxh3_128_hexdigest(content.encode())} if len(evals) else {}


def write_report(
    run_url: str,
    document: Mapping[str, Any],
    results: Table,
    evals: pa.Table,
    sides: SideBySide,
    drawn: Drawn,
    provenance: Mapping[str, Any],
    formats: Sequence[Format] = ("html",),
) -> list[str]:
    """Writes RUN/report.html (one page with its figures and plotly.js inside, about 6 MB, nothing fetched when read)
    and RUN/report.md (which shows the files in RUN/figures), as `formats` say. Returns their URLs.

    `document` is that of fits.json, `results` the cells that it describes, with n_latents and k, `evals` what else was
    measured on them (evals.parquet), `sides` what compares them. Raises SaescaleError
    when a file cannot be written.
    """
    shared = {
        "title": text.title(results),
        "summary": [*text.summarise(document, results), *summary(sides), *_drawn_of(document, drawn)],
        "notes": [
            *limits(sides.comparisons),
            *fit_notes(document),
            *drawn.notes_of_metrics,
        ],
        "fits": document["fits"],
        "formulas": text.formulas(document),
        "tables": text.law_tables(document),
        "evaluations": evaluation_tables(evals, results),
        "common": text.common_columns(results),
        "columns": text.cell_columns(results),
        "cells": text.cell_rows(results),
        "excluded": document["excluded"],
        "provenance": {**text.totals(document, results), **provenance},
    }
    urls = []
    for kind in formats:
        page = _html(shared, document, results, sides, drawn) if kind == "html" else _markdown(shared, sides, drawn)
        urls.append(join(run_url, FILES[kind]))
        write_atomic(urls[-1], page.encode())
    return urls


def _drawn_of(document: Mapping[str, Any], drawn: Drawn) -> list[str]:
    """A sentence where not every kind of cells has figures; nothing else."""
    kinds, of = len(kinds_of_document(document)), sum(part.what == "kind" for part in drawn.parts)
    return [f"Figures of their own have the first {of} of {kinds} kinds of cells."] if MOST_KINDS <= of < kinds else []


def sections(sides: SideBySide, drawn: Drawn) -> list[Section]:
    """What compares kinds of cells, then the figures of each kind: folded where there are several."""
    figures = {figure.view.name: figure for figure in drawn.figures}
    compared = {kind_label(c.arms.of): c for c in sides.comparisons}
    several = sum(part.what != "metrics" for part in drawn.parts) > 1
    found = []
    for i, part in enumerate(drawn.parts):
        own = [figures[view.name] for view in part.views if view.name in figures]
        if part.what == "comparison":
            comparison = compared[kind_label(part.of)]
            tables = comparison_tables(comparison)
            found.append(Section(f"side-by-side-{i}", heading(comparison), said(comparison), own, tables, i > 0))
        elif part.what == "depth":
            table = depth_table(sides.depth)
            found.append(Section("depth", "Over depth", (), own, [table] if table else [], False))
        elif part.what == "metrics":
            words = drawn.said_of_metrics
            found.append(Section("metrics", "nmse and other metrics", words, own, drawn.tables_of_metrics, False))
        else:
            title = kind_label(part.of) or "Figures"
            found.append(Section(f"kind-{i}", title, (), own, (), several))
    return found


def _html(
    shared: Mapping[str, Any], document: Mapping[str, Any], results: Table, sides: SideBySide, drawn: Drawn
) -> str:
    ks = tuple(sorted({float(k) for k in results["k"]}))
    views = [figure.view for figure in drawn.figures]
    data = {
        "figures": {figure.view.name: figure.plotly for figure in drawn.figures},
        "dark": theme(ks, [view for view in views if view.ramp != "k"]),
    }
    names = in_order(level for view in views if view.ramp == "name" for level in view.levels if isinstance(level, str))
    return _environment(True).get_template("report.html.j2").render(
        **shared,
        tiles=text.tiles(document, results),
        ks=[{"value": f"{k:g}", "light": colour(k, ks), "dark": colour(k, ks, dark=True)} for k in ks],
        names=[{"value": name, "light": colour(name, names), "dark": colour(name, names, dark=True)}
               for name in names],
        sections=[
            section._asdict() | {"figures": [
                {**_words(figure), "svg": base64.b64encode(figure.files["svg"]).decode()} for figure in section.figures
            ]}
            for section in sections(sides, drawn)
        ],
        # Within <script> "<" could end it; in JSON strings it may be written otherwise.
        data=Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c")),
        style=Markup(_own("report.css")),
        script=Markup(_own("report.js")),
        plotly=Markup(_plotly()),
    )  # fmt: skip


def _markdown(shared: Mapping[str, Any], sides: SideBySide, drawn: Drawn) -> str:
    template = _environment(False).get_template("report.md.j2")
    parts = [
        section._asdict() | {"figures": [_words(figure) for figure in section.figures]}
        for section in sections(sides, drawn)
    ]
    return template.render(**shared, sections=parts)


def _words(figure: Figure) -> dict[str, str]:
    view = figure.view
    words = {"title": view.title, "caption": view.caption, "key": view.key}
    return {"name": view.name} | {name: text.typeset(value) for name, value in words.items()}


@cache
def _own(name: str) -> str:
    return files("saescale.scaling.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly.js as its Python package brings it; read as a file, without importing the package's Python side."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


@cache
def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saescale.scaling.report", "."),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = text.markdown
    return environment
