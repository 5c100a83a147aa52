"""From a run directory to fits.json, figures and one self-contained report.html."""

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
import numpy as np

from scaling.figures import draw_figures
from scaling.fit import (
    BOOTSTRAPS,
    DEFAULT_LAWS,
    FORMAT,
    CoefficientRow,
    coefficient_rows,
    describe_input,
    fit_laws,
    fit_notes,
    law_label,
)
from scaling.tables import Table, load_curves, load_results, number
from storage.errors import SaescaleError
from storage.files import exists, join, write_atomic
from storage.rundir import RunDirectory

REPORT = "report.html"
CAPTIONS = {
    "nmse_against_n.png": "Held-out nmse of every cell against the number of latents N, with the fitted law.",
    "nmse_against_compute.png": "Held-out nmse during training against compute, with the frontier at each k.",
    "dead_fraction.png": "Share of dead latents at the end of training.",
}
_CELL_COLUMNS = {
    "n_latents": "N", "k": "k", "activation": "activation", "seed": "seed", "nmse": "nmse", "l0": "L0",
    "dead_fraction": "dead", "lr": "lr", "tokens": "tokens", "flops": "FLOPs (sparse)",
    "flops_dense": "FLOPs (dense)", "wall_s": "seconds", "cell_id": "cell",
}  # fmt: skip


def analyse(
    run: RunDirectory,
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    laws: Sequence[str] = DEFAULT_LAWS,
) -> dict[str, Any]:
    """Fits the laws to a run's finished cells; writes figures/*.png, report.html and last fits.json into the run.

    `provenance` (subject, store fingerprint, versions ...) is shown in the report. Deterministic in `seed`.
    Returns the document of fits.json. Raises SaescaleError when the run has no finished cell, for an unknown law, and
    when the run cannot be written.
    """
    results, curves = load_results(run), load_curves(run)
    results.require(("n_latents", "k"))
    fitted = fit_laws(results, curves, bootstraps=bootstraps, seed=seed, laws=laws)
    document = fitted.document()
    figures = draw_figures(fitted, join(run.url, "figures"))
    write_report(run.url, document, fitted.results, figures, provenance or {})
    # Last, so that what fits.json says it was made from holds for the rest too.
    run.write_json("fits.json", document)
    return document


def is_current(
    run: RunDirectory, *, bootstraps: int = BOOTSTRAPS, seed: int = 0, laws: Sequence[str] = DEFAULT_LAWS
) -> bool:
    """Whether `analyse` with these arguments would write the fits and the report that are there already.

    False too where files are missing or damaged, or no cell is finished. Provenance and times do not count. Raises
    SaescaleError for an unknown law.
    """
    try:
        there = run.read_json("fits.json")
        if not isinstance(there, dict) or there.get("format") != FORMAT or not exists(join(run.url, REPORT)):
            return False
        results, curves = load_results(run), load_curves(run)
    except SaescaleError:
        return False
    return there.get("made_from") == describe_input(results, curves, bootstraps, seed, laws)


def write_report(
    run_url: str,
    document: Mapping[str, Any],
    results: Table,
    figures: Mapping[str, bytes],
    provenance: Mapping[str, Any],
) -> str:
    """Writes RUN/report.html: one page with its figures inside, nothing fetched when read. Returns its URL.

    `document` is that of fits.json, `results` the cells that it describes, with n_latents and k; `figures` are PNGs
    by file name, in order. Raises SaescaleError when the file cannot be written.
    """
    labelled = [{**entry, "label": law_label(entry)} for entry in document["fits"]]
    page = _template().render(
        title=_title(results),
        summary=summarise(document, results),
        rows=[_coefficient_texts(r) for r in coefficient_rows(document) if not r.coefficient.startswith("exponent")],
        notes=fit_notes(document),
        fits=labelled,
        formulas=_formulas(document),
        n_k=next((entry for entry in labelled if entry["law"] == "n_k"), None),
        excluded=document["excluded"],
        figures=[(CAPTIONS[name], base64.b64encode(png).decode()) for name, png in figures.items()],
        common=_common_columns(results),
        header=[_CELL_COLUMNS[name] for name in _shown_columns(results)],
        cells=_cell_texts(results),
        provenance={**_totals(results), **provenance},
    )
    url = join(run_url, REPORT)
    write_atomic(url, page.encode())
    return url


def summarise(document: Mapping[str, Any], results: Table) -> list[str]:
    """What the run shows, in a few sentences of plain text; `results` has n_latents, k and nmse."""
    n, k, nmse = results["n_latents"], results["k"], results["nmse"]
    best = int(np.argmin(nmse))
    sentences = [
        f"{len(results)} cells, N from {number(n.min())} to {number(n.max())} and k from {k.min():g} to {k.max():g}. "
        f"The lowest held-out nmse is {nmse[best]:.4f}, at N = {number(n[best])} and k = {k[best]:g}."
    ]
    n_k = next((entry for entry in document["fits"] if entry["law"] == "n_k"), None)
    if n_k is None:
        reasons = [s["reason"] for s in document["skipped"] if s["law"] == "n_k"]
        sentences.append("L(N, k) was not fitted" + (f" ({reasons[0]})." if reasons else "."))
    else:
        exponents = n_k["exponent_of_n_at_k"]
        first, last = min(exponents, key=float), max(exponents, key=float)
        sentences.append(
            f"At fixed k the reducible part of nmse falls as a power of n: exponent {_value(exponents[first])} at "
            f"k = {first}, {_value(exponents[last])} at k = {last} (95 % bootstrap intervals over cells). "
            f"The law L(N, k) leaves {n_k['rms_log_residual']:.2%} rms of nmse unexplained over {n_k['points']} cells."
        )
        if n_k["holdout"]:
            sentences.append(
                f"Fitted without {n_k['holdout']['held_out']}, it predicts those cells within "
                f"{n_k['holdout']['rms_log_error']:.2%} rms."
            )
    return sentences


def _formulas(document: Mapping[str, Any]) -> dict[str, str]:
    """The formula of each law that was fitted, by its name with or without floor."""
    return {law_label(entry | {"at": {}}): entry["formula"] for entry in document["fits"]}


def _title(results: Table) -> str:
    names = [results[name][0] for name in ("subject", "site") if name in results and results[name].dtype.kind == "U"]
    return " of ".join(["Scaling of sparse autoencoders", *filter(None, [", ".join(filter(None, names))])])


def _totals(results: Table) -> dict[str, str]:
    totals = {"source": results.source}
    for column, label, unit in (
        ("flops", "training FLOPs (sparse)", ""),
        ("flops_dense", "training FLOPs (dense equivalent)", ""),
        ("wall_s", "training time summed over cells", " s"),
    ):
        if column in results and np.isfinite(results[column]).all():
            totals[label] = f"{results[column].sum():.4g}{unit}"
    return totals


def _coefficient_texts(row: CoefficientRow) -> tuple[str, str, str, str]:
    interval = "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"
    return row.law, row.coefficient, f"{row.value:.4g}", interval


def _value(value: Mapping[str, float | None]) -> str:
    text = f"{value['value']:.3f}"
    return text if value["low"] is None else text + f" [{value['low']:.3f}, {value['high']:.3f}]"


def _shown_columns(results: Table) -> list[str]:
    """The columns in which cells differ; N and k always."""
    always = ("n_latents", "k", "nmse")
    names = [name for name in _CELL_COLUMNS if name in results]
    return [name for name in names if name in always or len(np.unique(results[name])) > 1]


def _common_columns(results: Table) -> str:
    """What all cells have in common, such as "activation topk, seed 0"."""
    names = [name for name in _CELL_COLUMNS if name in results and name not in _shown_columns(results)]
    texts = {_CELL_COLUMNS[name]: _text(results[name][0]) for name in names}
    return ", ".join(f"{label} {text}" for label, text in texts.items() if text)


def _cell_texts(results: Table) -> list[list[str]]:
    order = np.lexsort([results["k"], results["n_latents"]])
    columns = [results[name] for name in _shown_columns(results)]
    return [[_text(column[row]) for column in columns] for row in order]


def _text(value: Any) -> str:
    """Text as it is; whole numbers in full, others to five digits; nothing for a missing number."""
    if isinstance(value, str):
        return value
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e10 else f"{value:.5g}"


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("scaling", ".")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html.j2"
    )
